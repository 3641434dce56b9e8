/* Arenas keep every row, through growth, rewinds and allocations that fail; so do those of native/lab,
 * which grow otherwise. */
#include "arena.h"
#include "check.h"
#include "error.h"
#include "lab/grow.h"
#include "lab/space.h"

#include <string.h>

enum { LAYERS = 3, HEADS = 2, SLICE = 8, CAP = 700 };      /* a slice is one row of one layer and head */

/* As many streams, all alike; `size` says how large they are together, -1: too large. */
static struct arena_stream streams[1 << 12];
static int64_t size;

static struct arena_config config_of(int layers, int heads, int64_t bytes, int64_t rows, int r) {
    for (int i = 0; i < layers; i++)
        streams[i] = (struct arena_stream){ .n_heads = heads, .tile_bytes = bytes };
    size = arena_streams(streams, layers);
    return (struct arena_config){ .streams = streams, .n_streams = layers, .cap = rows, .r = r };
}

static const struct way { int growth, r, touch; } WAYS[] = {
    { BMC_GROW_CHUNK, 1, 0 }, { BMC_GROW_CHUNK, 48, 1 }, { BMC_GROW_CHUNK, 9999, 0 }, { BMC_GROW_COPY, 1, 0 },
    { BMC_GROW_COPY, 7, 1 }, { BMC_GROW_COPY, 64, 0 }, { BMC_GROW_COPY, CAP, 1 }, { BMC_GROW_RESERVE, 16, 0 },
    { BMC_GROW_RESERVE, 100, 1 },
#ifdef __linux__
    { BMC_GROW_REMAP, 1, 0 }, { BMC_GROW_REMAP, 16, 1 }, { BMC_GROW_REMAP, 100, 0 },
#endif
};
enum { N_WAYS = sizeof WAYS / sizeof *WAYS };

static void init(struct arena *a, struct way way) {
    struct arena_config c = config_of(LAYERS, HEADS, TILE_ROWS * SLICE, CAP, way.r);
    CHECK(!arena_init(a, &c));
}

static bmc_growth_cost cost;        /* of the last growth */

/* Chunks without first touch are the product's own growth; with it, the same chunks through native/lab.
 * COPY takes the rows that it is told, here a multiple of r. */
static int reserve(struct arena *a, struct way way, int64_t rows, int64_t used) {
    if (way.growth == BMC_GROW_CHUNK && !way.touch)
        return arena_reserve(a, rows);
    int64_t wanted = way.growth == BMC_GROW_COPY ? (rows + way.r - 1) / way.r * way.r : rows;
    return arena_grow(a, way.growth, wanted, used, way.touch, &cost);
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

static void append(struct arena *a, struct way way, int64_t *length, int64_t n, uint64_t *state) {
    int64_t before = a->rows_reserved;
    CHECK(!reserve(a, way, *length + n, *length));
    CHECK(a->rows_reserved >= *length + n);
    check_zero(a, tiles(before), tiles(a->rows_reserved));
    for (int64_t i = 0; i < n; i++)
        write_row(a, *length + i, state);
    *length += n;
}

static void random_lives(struct way way) {
    uint64_t state = 17 + (uint64_t)way.growth * 100 + (uint64_t)way.r;
    for (int life = 0; life < 20; life++) {
        struct arena a;
        int64_t length = 0;
        init(&a, way);
        for (int step = 0; step < 40; step++) {
            int64_t n = random_below(&state, random_below(&state, 8) ? 20 : 200);
            if (random_below(&state, 4) == 0)
                length -= random_below(&state, length + 1);
            else if (length + n <= CAP)
                append(&a, way, &length, n, &state);
            check_rows(&a, length);
        }
        append(&a, way, &length, CAP - length, &state);
        check_rows(&a, CAP);
        arena_free(&a);
        arena_free(&a);
    }
}

/* Grow by steps; allocation k fails once. The arena stays as it was, and the next try succeeds. */
static int one_failure(int r, int k) {
    static const int64_t STEPS[] = {1, 5, 30, 31, 200, 201, 450, 700};
    struct arena a;
    struct way way = { BMC_GROW_CHUNK, r, 0 };
    uint64_t state = 5;
    int64_t length = 0;
    init(&a, way);
    arena_fail_in = k;
    for (size_t i = 0; i < sizeof STEPS / sizeof *STEPS; i++) {
        struct arena before = a;
        int status = arena_reserve(&a, STEPS[i]);
        if (status) {
            CHECK(status == BMC_ENOMEM && arena_fail_in == 0
                  && strstr(error_message(), "rows of keys and values"));
            CHECK(a.n_segments == before.n_segments && a.rows_reserved == before.rows_reserved);
            check_rows(&a, length);
        }
        append(&a, way, &length, STEPS[i] - length, &state);
        check_rows(&a, length);
    }
    arena_free(&a);
    int reached = arena_fail_in == 0;
    arena_fail_in = 0;
    return reached;
}

static void every_allocation_may_fail(int r) {
    int k = 1;
    while (one_failure(r, k))
        k++;
    CHECK(k > 2);
}

/* Arenas that fork, grow, go back and write: each keeps its own rows, and memory is given
 * back with the last user. */
static void forks_keep_their_rows(void) {
    enum { ARENAS = 6 };
    static char truth[ARENAS][CAP];
    for (int round = 0; round < 30; round++) {
        uint64_t state = 99 + (uint64_t)round;
        struct arena a[ARENAS] = { 0 };
        int64_t length[ARENAS] = { 0 };
        struct way way = { BMC_GROW_CHUNK, round % 2 ? 16 : 48, 0 };
        for (int i = 0; i < ARENAS; i++)
            init(&a[i], way);
        for (int step = 0; step < 200; step++) {
            int i = (int)random_below(&state, ARENAS), j = (int)random_below(&state, ARENAS);
            int64_t n = random_below(&state, 60);
            if (random_below(&state, 4) == 0 && i != j) {
                arena_clear(&a[j]);
                CHECK(!arena_fork(&a[j], &a[i], length[i]));
                memcpy(truth[j], truth[i], (size_t)length[i]);
                length[j] = length[i];
            } else if (random_below(&state, 3) == 0)
                length[i] -= random_below(&state, length[i] + 1);
            else if (length[i] + n <= CAP) {
                CHECK(!arena_reserve(&a[i], length[i] + n) && !arena_own(&a[i], length[i], length[i] + n));
                for (int64_t row = length[i]; row < length[i] + n; row++) {
                    truth[i][row] = (char)random_below(&state, 256);
                    for (int l = 0; l < LAYERS; l++)
                        *slice(&a[i], l, 1, row) = truth[i][row];
                }
                length[i] += n;
            }
            for (int k = 0; k < ARENAS; k++)
                for (int64_t row = 0; row < length[k]; row++)
                    CHECK(*slice(&a[k], LAYERS - 1, 1, row) == truth[k][row]);
        }
        for (int i = 0; i < ARENAS; i++)
            arena_free(&a[i]);
    }
}

/* Rows that are dropped are gone, those behind them stay, and a fork has what is left. */
static void dropped_rows_are_given_back(void) {
    struct arena a, fork;
    uint64_t state = 4;
    int64_t length = 0;
    struct way way = { BMC_GROW_CHUNK, 16, 0 };
    init(&a, way);
    init(&fork, way);
    append(&a, way, &length, 200, &state);
    int64_t before = arena_mapped(&a);
    arena_drop(&a, 100);
    CHECK(a.n_dropped == 6 && a.first == 96 && arena_mapped(&a) == before - 6 * (int64_t)a.segment_bytes);
    CHECK(!arena_fork(&fork, &a, 190) && fork.n_dropped == 6);
    for (int64_t row = 96; row < 190; row++)
        for (int l = 0; l < LAYERS; l++)
            CHECK(!memcmp(plain[row][l][1], slice(&a, l, 1, row), SLICE)
                  && !memcmp(plain[row][l][1], slice(&fork, l, 1, row), SLICE));
    arena_free(&fork);
    init(&fork, way);
    CHECK(!arena_fork(&fork, &a, 90) && fork.n_dropped == 6 && fork.n_segments == 6 && !arena_mapped(&fork));
    arena_free(&fork);
    arena_free(&a);
}

/* What one arena exports another one imports, whatever their segments and in whatever pieces. */
static void rows_move_as_bytes(void) {
    static char bytes[CAP * LAYERS * HEADS * SLICE];
    for (int i = 0; i < 3; i++) {
        struct arena from, to;
        uint64_t state = 5;
        int64_t length = 0;
        struct way way = { BMC_GROW_CHUNK, (int[]){ 16, 48, 9999 }[i], 0 };
        init(&from, way);
        init(&to, (struct way){ BMC_GROW_CHUNK, 64, 0 });
        append(&from, way, &length, 345, &state);
        CHECK(!arena_reserve(&to, length) && arena_tile_bytes(&to) == TILE_ROWS * LAYERS * HEADS * SLICE);
        for (int64_t tile = 0, n = 1; tile < tiles(length); tile += n, n = n % 5 + 1) {
            const int64_t end = tile + n < tiles(length) ? tile + n : tiles(length);
            CHECK(arena_export(&from, tile, end, bytes, arena_tile_bytes(&from)) == 0);
            CHECK(arena_import(&to, tile, end, bytes, arena_tile_bytes(&to)) == 0);
        }
        check_rows(&to, length);
        check_zero(&to, tiles(length), tiles(to.rows_reserved));
        arena_free(&from);
        arena_free(&to);
    }
}

static void full_means_full(void) {
    struct arena a;
    init(&a, (struct way){ BMC_GROW_CHUNK, 48, 0 });
    CHECK(arena_reserve(&a, CAP + 1) == BMC_EFULL);
    CHECK(strstr(error_message(), "701 rows") && strstr(error_message(), "cap is 700"));
    CHECK(!arena_reserve(&a, CAP));
    arena_free(&a);
}

/* An arena that was grown otherwise has no room but what it has: the product's growth would not fit its
 * segments. */
static void other_growths_set_the_cap(void) {
    for (int i = 0; i < N_WAYS; i++) {
        struct arena a;
        init(&a, WAYS[i]);
        CHECK(!reserve(&a, WAYS[i], 30, 0));
        CHECK((arena_reserve(&a, a.rows_reserved + 1) == BMC_EFULL)
              == (WAYS[i].growth != BMC_GROW_CHUNK || a.rows_reserved > CAP));
        arena_free(&a);
    }
}

static void copies_are_counted(void) {
    struct arena a;
    struct way way = { BMC_GROW_COPY, 1, 0 };
    int64_t length = 0;
    uint64_t state = 3;
    init(&a, way);
    for (int i = 0; i < 100; i++) {
        int64_t copied = tiles(length) * LAYERS * HEADS * TILE_ROWS * SLICE;
        append(&a, way, &length, 1, &state);
        CHECK(cost.bytes_copied == copied && (cost.copy > 0) == (i > 0) && cost.allocate > 0
              && cost.touch == 0);
        CHECK(a.rows_reserved == i + 1 && a.n_segments == 1);
    }
    CHECK(arena_row_bytes(&a) == LAYERS * HEADS * SLICE);
    arena_free(&a);
}

static void others_copy_nothing(void) {
    for (int i = 0; i < N_WAYS; i++) {
        struct arena a;
        int64_t length = 0;
        uint64_t state = 3;
        if (WAYS[i].growth == BMC_GROW_COPY)
            continue;
        init(&a, WAYS[i]);
        while (length < CAP) {
            cost = (bmc_growth_cost){ 0 };
            int64_t before = a.rows_reserved;
            append(&a, WAYS[i], &length, 1, &state);
            CHECK(cost.bytes_copied == 0 && cost.copy == 0);
            CHECK((cost.touch > 0) == (WAYS[i].touch && a.rows_reserved > before));
            CHECK(a.rows_reserved == before || a.rows_reserved == before + a.config.r);
        }
        CHECK(a.rows_reserved == (CAP + a.config.r - 1) / a.config.r * a.config.r);
        arena_free(&a);
    }
}

static void absurd_sizes_are_refused(void) {
    const struct arena_config bad[] = {
        config_of(1, 1, 64, 0, 1),
        config_of(1, 1, 64, 1LL << 40, 1),
        config_of(1, 1, 64, 16, 0),
        config_of(1, 1, 64, 16, -5),
        { .n_streams = -1, .cap = 16, .r = 16 },
        { .n_streams = 1, .cap = 16, .r = 16 },
    };
    struct arena a;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK(arena_init(&a, &bad[i]) == BMC_EINVAL);
    config_of(1, 0, 64, 16, 1);
    CHECK(size == -1);
    config_of(1, 1, 0, 16, 1);
    CHECK(size == -1);
    config_of(4, 1 << 30, INT64_MAX / 2, MAX_ROWS, MAX_ROWS);
    CHECK(size == -1);
    struct arena_config huge = config_of(1, 1, INT64_MAX / 2, MAX_ROWS, MAX_ROWS);
    CHECK(arena_init(&a, &huge) == BMC_ENOMEM);
    struct arena_config large = config_of(1 << 12, 1 << 12, 1 << 16, MAX_ROWS, 16);
    for (int growth = BMC_GROW_COPY; growth <= BMC_GROW_RESERVE; growth++) {
        CHECK(!arena_init(&a, &large));
        CHECK(arena_grow(&a, growth, MAX_ROWS, 0, false, &cost) == BMC_ENOMEM && a.rows_reserved == 0);
        arena_free(&a);
    }
    init(&a, WAYS[0]);
    CHECK(arena_grow(&a, -1, 1, 0, false, &cost) == BMC_EINVAL
          && arena_grow(&a, 9, 1, 0, false, &cost) == BMC_EINVAL);
    CHECK(arena_grow(&a, BMC_GROW_COPY, -1, 0, false, &cost) == BMC_EINVAL);
    arena_free(&a);
}

/* Address space for a terabyte; two segments of it become memory. */
static void reserve_costs_what_is_used(void) {
    struct arena_config config = config_of(16, 8, 4096 * TILE_ROWS, 1 << 21, 64);
    struct arena a;
    CHECK(!arena_init(&a, &config));
    CHECK(!arena_grow(&a, BMC_GROW_RESERVE, 65, 0, false, &cost));
    CHECK(arena_row_bytes(&a) == 16 * 8 * 4096 && a.rows_reserved == 128);
    CHECK((uintptr_t)arena_tile(&a, 0, 0, 0) % (2 << 20) == 0);
    *(char *)arena_tile(&a, 15, 7, 7) = 1;
    CHECK(arena_grow(&a, BMC_GROW_RESERVE, (1 << 21) + 1, 0, false, &cost) == BMC_EFULL);
    arena_free(&a);
}

/* Pages move, whole huge ones to addresses that keep them whole; what they hold does not change. */
static void remapped_pages_keep_their_rows(void) {
    struct arena_config config = config_of(2, 2, 4096 * TILE_ROWS, 4096, 64);
    struct arena a;
    CHECK(!arena_init(&a, &config));
    for (int64_t row = 0; row < 4096 && space_moves(); row += 64) {
        CHECK(!arena_grow(&a, BMC_GROW_REMAP, row + 1, row, false, &cost));
        *(int64_t *)arena_tile(&a, 1, 1, row / TILE_ROWS) = row;
        for (int64_t i = 0; i <= row; i += 64)
            CHECK(*(int64_t *)arena_tile(&a, 1, 1, i / TILE_ROWS) == i);
    }
    CHECK(!space_moves() || a.n_segments == 64);
    arena_free(&a);
}

static void auto_rows(void) {
    CHECK(arena_auto_rows(32 << 10) == 128 && arena_auto_rows(512 << 10) == 16);     /* 1B grouped, 7B MHA */
    CHECK(arena_auto_rows(1) == 256 && arena_auto_rows(INT64_MAX) == 16 && arena_auto_rows(0) == 256);
    for (int64_t row_bytes = 1; row_bytes < 1 << 22; row_bytes += 999)
        CHECK(arena_auto_rows(row_bytes) % TILE_ROWS == 0);
}

int main(void) {
    for (int i = 0; i < N_WAYS; i++)
        random_lives(WAYS[i]);
    every_allocation_may_fail(1);
    every_allocation_may_fail(48);
    forks_keep_their_rows();
    dropped_rows_are_given_back();
    rows_move_as_bytes();
    full_means_full();
    other_growths_set_the_cap();
    copies_are_counted();
    others_copy_nothing();
    absurd_sizes_are_refused();
    reserve_costs_what_is_used();
    remapped_pages_keep_their_rows();
    auto_rows();
    return 0;
}
