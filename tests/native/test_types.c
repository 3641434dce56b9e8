/* Numbers on both sides of the half formats, and block decoders that stay inside their blocks. */
#include "check.h"
#include "types.h"

#include <math.h>

static void f16_there_and_back(void) {
    for (uint32_t h = 0; h < 65536; h++) {
        float f = f16_to_f32((uint16_t)h);
        if (isnan(f))
            CHECK(f32_to_f16(f) == (h | 0x200));
        else
            CHECK(f32_to_f16(f) == h);
    }
}

/* Between neighbours the nearer one wins, in the middle the even one. */
static void f16_rounds_to_nearest_even(void) {
    for (uint32_t h = 0; h < 0x7c00; h++) {
        double low = f16_to_f32((uint16_t)h), high = h == 0x7bff ? 65536 : f16_to_f32((uint16_t)(h + 1));
        float middle = (float)((low + high) / 2);
        CHECK(f32_to_f16(middle) == h + (h & 1));
        CHECK(f32_to_f16(nextafterf(middle, 0)) == h);
        CHECK(f32_to_f16(nextafterf(middle, 1e9f)) == h + 1);
        CHECK(f32_to_f16(-middle) == (0x8000 | (h + (h & 1))));
    }
    CHECK(f32_to_f16(1e30f) == 0x7c00 && f32_to_f16(-INFINITY) == 0xfc00);
    CHECK(f32_to_f16(1e-30f) == 0 && f32_to_f16(-0.0f) == 0x8000);
    CHECK(isnan(f16_to_f32(f32_to_f16(f32_from_bits(0x7f800001)))));
}

static void bf16_rounds_to_nearest_even(void) {
    for (uint32_t h = 0; h < 0x7f80; h++) {
        CHECK(f32_to_bf16(bf16_to_f32((uint16_t)h)) == h);
        uint32_t middle = h << 16 | 0x8000;
        CHECK(f32_to_bf16(f32_from_bits(middle)) == h + (h & 1));
        CHECK(f32_to_bf16(f32_from_bits(middle - 1)) == h);
        CHECK(f32_to_bf16(f32_from_bits(middle + 1)) == h + 1);
    }
    CHECK(f32_to_bf16(-INFINITY) == 0xff80);
    CHECK(isnan(bf16_to_f32(f32_to_bf16(f32_from_bits(0x7f800001)))));
}

static void table_is_complete(void) {
    CHECK(!type_find(-1) && !type_find(N_TYPES) && !type_find(4) && !type_find(31));
    for (int i = 0; i < N_TYPES; i++) {
        const struct type *type = type_find(i);
        CHECK(!type || (type->name && type->block_size > 0 && type->type_size > 0));
    }
    CHECK(type_find(TYPE_Q4_K)->type_size == 144);
}

/* Exactly sized buffers at an odd address: a sanitizer sees any byte too many. */
static void decoders_stay_inside(void) {
    uint64_t state = 1;
    for (int i = 0; i < N_TYPES; i++) {
        if (!types[i].dequantize)
            continue;
        size_t n = 3 * (size_t)types[i].block_size, n_bytes = 3 * (size_t)types[i].type_size;
        uint8_t *bytes = malloc(n_bytes + 1);
        float *out = malloc(n * sizeof *out);
        for (size_t k = 0; k <= n_bytes; k++)
            bytes[k] = (uint8_t)random_bits(&state);
        types[i].dequantize(bytes + 1, (int64_t)n, out);
        types[i].dequantize(bytes + 1, 0, out);
        free(bytes);
        free(out);
    }
}

int main(void) {
    f16_there_and_back();
    f16_rounds_to_nearest_even();
    bf16_rounds_to_nearest_even();
    table_is_complete();
    decoders_stay_inside();
    return 0;
}
