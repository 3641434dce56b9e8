/* What no kernel of this instruction set surpasses: its arithmetic alone, from registers and the first
 * level of cache. Included after lanes_<isa>.h, as the kernels are. */
#include "spins.h"

INLINE u8x64 codes_at(const uint8_t *p, int g) { return u_load(p + 64 * g); }

enum { CHAINS = 8 };

static int64_t spin_int8(int64_t n, float *sink) {
    static const uint8_t codes[CODES_u8] = { 1, 2, 3 };
    struct act_block a[CHAINS] = { { .q = { 1, 2, 3 } } };
    f32x16 y = f_zero();
    for (int64_t i = 0; i < n; i++) {
        __asm__ volatile("" : : "r"(a) : "memory");         /* the compiler would compute it once */
        UNROLL(8)
        for (int c = 0; c < CHAINS; c += TOGETHER) {
            i32x16 t[TOGETHER];
            i_dots(t, TOGETHER, codes_at, codes, WHOLE, a + c, 0, 8);
            UNROLL(4)
            for (int k = 0; k < TOGETHER; k++)
                y = f_add(y, i_to_f(t[k]));
        }
    }
    f_store(sink, y);
    return n * CHAINS * 16 * 32;
}

static int64_t spin_f32(int64_t n, float *sink) {
    f32x16 y[ROWS_MAX], half = f_set(0.5f), sum = f_zero();
    for (int c = 0; c < ROWS_MAX; c++)
        y[c] = f_set((float)c);
    for (int64_t i = 0; i < n; i++)
        UNROLL(8)
        for (int c = 0; c < ROWS_MAX; c++)
            y[c] = f_fma(y[c], half, half);
    for (int c = 0; c < ROWS_MAX; c++)
        sum = f_add(sum, y[c]);
    f_store(sink, sum);
    return n * ROWS_MAX * 16;
}

const struct spins ISA(spins) = { .int8 = spin_int8, .f32 = spin_f32 };
