/* Every policy keeps every row, through growth, rewinds and allocations that fail. */
#include "arena.h"
#include "check.h"
#include "error.h"

#include <string.h>

enum { LAYERS = 3, HEADS = 2, SLICE = 8, CAP = 700 };      /* a slice is one row of one layer and head */

static const struct arena_config SMALL = {
    .n_layers = LAYERS, .n_heads = HEADS, .tile_bytes = TILE_ROWS * SLICE, .cap = CAP,
};

static const struct { int growth, r; bool small_pages, touch; } POLICIES[] = {
    {BMC_GROW_COPY, 1, 0, 0}, {BMC_GROW_COPY, 7, 0, 1}, {BMC_GROW_COPY, 64, 1, 0}, {BMC_GROW_CHUNK, 1, 0, 0},
    {BMC_GROW_CHUNK, 48, 1, 1}, {BMC_GROW_CHUNK, 9999, 0, 0}, {BMC_GROW_MAX, 0, 0, 0}, {BMC_GROW_RESERVE, 16, 0, 0},
    {BMC_GROW_RESERVE, 100, 1, 1}, {BMC_GROW_GEOMETRIC, 1, 0, 0}, {BMC_GROW_GEOMETRIC, 50, 0, 1},
    {BMC_GROW_MAX_LAZY, 0, 0, 0},
#ifdef __linux__
    {BMC_GROW_REMAP, 1, 0, 0}, {BMC_GROW_REMAP, 16, 1, 1}, {BMC_GROW_REMAP, 100, 0, 0},
#endif
};
enum { N_POLICIES = sizeof POLICIES / sizeof *POLICIES };

static struct arena_config config_of(int policy) {
    struct arena_config c = SMALL;
    c.growth = POLICIES[policy].growth;
    c.r = POLICIES[policy].r;
    c.small_pages = POLICIES[policy].small_pages;
    c.touch = POLICIES[policy].touch;
    return c;
}

static char *slice(const struct arena *a, int layer, int head, int64_t row) {
    return (char *)arena_tile(a, layer, head, row / TILE_ROWS) + row % TILE_ROWS * SLICE;
}

/* The truth: the same rows in a plain array. */
static char plain[CAP][LAYERS][HEADS][SLICE];

static void write_row(struct arena *a, int64_t row, uint64_t *state) {
    for (int l = 0; l < LAYERS; l++)
        for (int h = 0; h < HEADS; h++) {
            uint64_t bits = random_bits(state);
            memcpy(plain[row][l][h], &bits, SLICE);
            memcpy(slice(a, l, h, row), &bits, SLICE);
        }
}

static void check_rows(const struct arena *a, int64_t n) {
    for (int64_t row = 0; row < n; row++)
        for (int l = 0; l < LAYERS; l++)
            for (int h = 0; h < HEADS; h++)
                CHECK(!memcmp(plain[row][l][h], slice(a, l, h, row), SLICE));
}

static void check_zero(const struct arena *a, int64_t first_tile, int64_t end_tile) {
    static const char zero[TILE_ROWS * SLICE];
    for (int64_t tile = first_tile; tile < end_tile; tile++)
        for (int l = 0; l < LAYERS; l++)
            for (int h = 0; h < HEADS; h++)
                CHECK(!memcmp(arena_tile(a, l, h, tile), zero, sizeof zero));
}

static int64_t tiles(int64_t rows) {
    return (rows + TILE_ROWS - 1) / TILE_ROWS;
}

static void append(struct arena *a, int64_t *length, int64_t n, uint64_t *state) {
    int64_t before = a->rows_reserved;
    CHECK(!arena_reserve(a, *length + n));
    CHECK(a->rows_reserved >= *length + n);
    check_zero(a, tiles(before), tiles(a->rows_reserved));
    for (int64_t i = 0; i < n; i++)
        write_row(a, *length + i, state);
    *length += n;
    arena_set_rows(a, *length);
}

static void random_lives(int policy) {
    uint64_t state = 17 + (uint64_t)policy;
    for (int life = 0; life < 20; life++) {
        struct arena a;
        struct arena_config config = config_of(policy);
        int64_t length = 0;
        CHECK(!arena_init(&a, &config));
        for (int step = 0; step < 40; step++) {
            int64_t n = random_below(&state, random_below(&state, 8) ? 20 : 200);
            if (random_below(&state, 4) == 0) {
                length -= random_below(&state, length + 1);
                arena_set_rows(&a, length);
            } else if (length + n <= CAP) {
                append(&a, &length, n, &state);
            } else {
                CHECK(arena_reserve(&a, length + n) == BMC_EFULL || length + n <= CAP);
            }
            check_rows(&a, length);
        }
        append(&a, &length, CAP - length, &state);
        check_rows(&a, CAP);
        arena_free(&a);
        arena_free(&a);
    }
}

/* Grow by steps; allocation k fails once. The arena stays as it was, and the next try succeeds. */
static int one_failure(int policy, int k) {
    static const int64_t STEPS[] = {1, 5, 30, 31, 200, 201, 450, 700};
    struct arena a;
    struct arena_config config = config_of(policy);
    uint64_t state = 5;
    int64_t length = 0;
    arena_fail_in = k;
    if (arena_init(&a, &config)) {
        CHECK(strstr(error_message(), "rows of keys and values") && a.segments == NULL && a.space == NULL);
        CHECK(!arena_init(&a, &config));
    }
    for (size_t i = 0; i < sizeof STEPS / sizeof *STEPS; i++) {
        bmc_arena_stats before, after;
        arena_stats(&a, &before);
        int status = arena_reserve(&a, STEPS[i]);
        if (status) {
            CHECK(status == BMC_ENOMEM && arena_fail_in == 0);
            arena_stats(&a, &after);
            CHECK(!memcmp(&before, &after, sizeof before));
            check_rows(&a, length);
        }
        append(&a, &length, STEPS[i] - length, &state);
        check_rows(&a, length);
    }
    arena_free(&a);
    int reached = arena_fail_in == 0;
    arena_fail_in = 0;
    return reached;
}

static void every_allocation_may_fail(int policy) {
    int k = 1;
    while (one_failure(policy, k))
        k++;
    CHECK(k > 1);
}

static void full_means_full(int policy) {
    struct arena a;
    struct arena_config config = config_of(policy);
    CHECK(!arena_init(&a, &config));
    CHECK(arena_reserve(&a, CAP + 1) == BMC_EFULL);
    CHECK(strstr(error_message(), "701 rows") && strstr(error_message(), "cap is 700"));
    CHECK(!arena_reserve(&a, CAP));
    arena_free(&a);
}

static void copy_counts_what_it_copies(void) {
    struct arena a;
    struct arena_config config = SMALL;
    bmc_arena_stats stats;
    int64_t length = 0, copied = 0;
    uint64_t state = 3;
    config.growth = BMC_GROW_COPY;
    config.r = 1;
    CHECK(!arena_init(&a, &config));
    for (int i = 0; i < 100; i++) {
        copied += tiles(length) * LAYERS * HEADS * TILE_ROWS * SLICE;
        append(&a, &length, 1, &state);
        arena_stats(&a, &stats);
        CHECK(stats.allocations == i + 1 && stats.bytes_copied == copied);
        CHECK(stats.rows_reserved == i + 1 && stats.rows_used == i + 1);
    }
    CHECK(stats.row_bytes == LAYERS * HEADS * SLICE && stats.r == 1 && stats.growth == BMC_GROW_COPY);
    arena_free(&a);
}

static bool copies(int growth) { return growth == BMC_GROW_COPY || growth == BMC_GROW_GEOMETRIC; }

static bool is_max(int growth) { return growth == BMC_GROW_MAX || growth == BMC_GROW_MAX_LAZY; }

static void others_copy_nothing(void) {
    for (int i = 0; i < N_POLICIES; i++) {
        struct arena a;
        struct arena_config config = config_of(i);
        bmc_arena_stats stats;
        int64_t length = 0;
        uint64_t state = 3;
        CHECK(!arena_init(&a, &config));
        while (length < CAP)
            append(&a, &length, 1, &state);
        arena_stats(&a, &stats);
        CHECK(copies(config.growth) || stats.bytes_copied == 0);
        CHECK(!is_max(config.growth) || (stats.allocations == 1 && stats.rows_reserved == CAP));
        CHECK(stats.bytes_allocated >= stats.bytes_reserved && stats.allocate_s > 0);
        CHECK((stats.copy_s > 0) == copies(config.growth));
        CHECK((stats.touch_s > 0) == (config.touch || config.growth == BMC_GROW_MAX));
        if (!is_max(config.growth) && config.growth != BMC_GROW_GEOMETRIC && config.r < CAP)
            CHECK(stats.allocations == (CAP + stats.r - 1) / stats.r);
        CHECK(stats.bytes_reserved >= CAP * stats.row_bytes);
        arena_free(&a);
    }
}

static void absurd_sizes_are_refused(void) {
#define CONFIG(layers, heads, bytes, rows, policy, step) \
    { .n_layers = layers, .n_heads = heads, .tile_bytes = bytes, .cap = rows, .growth = policy, .r = step }
    static const struct arena_config BAD[] = {
        CONFIG(0, 1, 64, 16, BMC_GROW_COPY, 1), CONFIG(1, 0, 64, 16, BMC_GROW_COPY, 1),
        CONFIG(1, 1, 0, 16, BMC_GROW_COPY, 1), CONFIG(1, 1, 64, 0, BMC_GROW_COPY, 1),
        CONFIG(1, 1, 64, 1LL << 40, BMC_GROW_COPY, 1), CONFIG(1, 1, 64, 16, BMC_GROW_REMAP + 1, 1),
        CONFIG(1, 1, 64, 16, -1, 1), CONFIG(1, 1, 64, 16, BMC_GROW_CHUNK, 0),
        CONFIG(1, 1, 64, 16, BMC_GROW_RESERVE, -5), CONFIG(1, 1, 64, 16, BMC_GROW_REMAP, 0),
        { 1, 1, 64, 16, BMC_GROW_GEOMETRIC, 1, 1.0, 0, 0 }, { 1, 1, 64, 16, BMC_GROW_GEOMETRIC, 1, -2, 0, 0 },
    };
    struct arena a;
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++)
        CHECK(arena_init(&a, &BAD[i]) == BMC_EINVAL);
    struct arena_config huge = CONFIG(1 << 30, 1 << 30, INT64_MAX / 2, MAX_ROWS, BMC_GROW_MAX, 0);
    CHECK(arena_init(&a, &huge) == BMC_ENOMEM);
    huge.growth = BMC_GROW_RESERVE;
    huge.r = MAX_ROWS;
    CHECK(arena_init(&a, &huge) == BMC_ENOMEM);
    huge.growth = BMC_GROW_COPY;
    CHECK(!arena_init(&a, &huge));
    CHECK(arena_reserve(&a, 1) == BMC_ENOMEM);
    arena_free(&a);
}

/* Address space for a terabyte; two segments of it become memory. */
static void reserve_costs_what_is_used(void) {
    struct arena_config config = CONFIG(16, 8, 4096 * TILE_ROWS, 1 << 21, BMC_GROW_RESERVE, 64);
    struct arena a;
    bmc_arena_stats stats;
    CHECK(!arena_init(&a, &config));
    CHECK(!arena_reserve(&a, 65));
    arena_stats(&a, &stats);
    CHECK(stats.row_bytes == 16 * 8 * 4096 && stats.rows_reserved == 128);
    CHECK(stats.bytes_reserved >= 128 * stats.row_bytes && stats.bytes_reserved < 132 * stats.row_bytes);
    CHECK((uintptr_t)arena_tile(&a, 0, 0, 0) % (2 << 20) == 0);
    *(char *)arena_tile(&a, 15, 7, 7) = 1;
    arena_free(&a);
}

/* A factor makes the number of copies a logarithm. */
static void geometric_growth_is_rare(void) {
    struct arena_config config = SMALL;
    struct arena a;
    uint64_t state = 9;
    int64_t length = 0;
    config.growth = BMC_GROW_GEOMETRIC;
    config.r = 16;
    config.factor = 1.5;
    CHECK(!arena_init(&a, &config));
    while (length < CAP)
        append(&a, &length, 1, &state);
    CHECK(a.allocations == 10 && a.rows_reserved == CAP);    /* 16 32 48 80 128 192 288 432 656, the cap */
    arena_free(&a);
}

/* Pages move, whole huge ones to addresses that keep them whole; what they hold does not change. */
static void remapped_pages_keep_their_rows(void) {
#ifdef __linux__
    struct arena_config config = CONFIG(2, 2, 4096 * TILE_ROWS, 4096, BMC_GROW_REMAP, 64);
    struct arena a;
    CHECK(!arena_init(&a, &config));
    for (int64_t row = 0; row < 4096; row += 64) {
        CHECK(!arena_reserve(&a, row + 1));
        CHECK((uintptr_t)arena_tile(&a, 0, 0, 0) % (2 << 20) == 0 || a.space_bytes < 2 << 20);
        *(int64_t *)arena_tile(&a, 1, 1, row / TILE_ROWS) = row;
        for (int64_t i = 0; i <= row; i += 64)
            CHECK(*(int64_t *)arena_tile(&a, 1, 1, i / TILE_ROWS) == i);
        CHECK(arena_reserve(&a, 4097) == BMC_EFULL);
    }
    CHECK(a.bytes_copied == 0 && a.n_segments == 64);
    arena_free(&a);
#endif
}

static void auto_rows(void) {
    CHECK(arena_auto_rows(32 << 10) == 128 && arena_auto_rows(512 << 10) == 16);     /* 1B grouped, 7B MHA */
    CHECK(arena_auto_rows(1) == 256 && arena_auto_rows(INT64_MAX) == 16 && arena_auto_rows(0) == 256);
    for (int64_t row_bytes = 1; row_bytes < 1 << 22; row_bytes += 999)
        CHECK(arena_auto_rows(row_bytes) % TILE_ROWS == 0);
}

int main(void) {
    for (int i = 0; i < N_POLICIES; i++) {
        random_lives(i);
        every_allocation_may_fail(i);
        full_means_full(i);
    }
    copy_counts_what_it_copies();
    others_copy_nothing();
    absurd_sizes_are_refused();
    reserve_costs_what_is_used();
    geometric_growth_is_rare();
    remapped_pages_keep_their_rows();
    auto_rows();
    return 0;
}
