#include "arena.h"

#include "error.h"
#include "memory.h"

#include <stdlib.h>
#include <string.h>

int arena_fail_in;

static int fails(void) {
    return arena_fail_in > 0 && --arena_fail_in == 0;
}

static int64_t round_up(int64_t n, int64_t unit) {
    return (n + unit - 1) / unit * unit;
}

static int64_t tiles_for(int64_t rows) {
    return (rows + TILE_ROWS - 1) / TILE_ROWS;
}

/* Bytes of `tiles` tiles of every layer and head; 0 when that is more than memory can be. */
static size_t bytes_of(const struct arena_config *c, int64_t tiles) {
    size_t bytes;
    if (__builtin_mul_overflow((size_t)c->n_layers * (size_t)c->n_heads, (size_t)c->tile_bytes, &bytes) ||
        __builtin_mul_overflow(bytes, (size_t)tiles, &bytes) || bytes > SIZE_MAX / 4)
        return 0;
    return bytes;
}

static int no_memory(const struct arena_config *c, int64_t rows, const char *what) {
    double mb = (double)c->n_layers * c->n_heads * (double)c->tile_bytes / TILE_ROWS * (double)rows / 1e6;
    return fail(BMC_ENOMEM, "no %s for %lld rows of keys and values (%.0f MB)", what, (long long)rows, mb);
}

static char *map(size_t bytes, bool usable) {
    return fails() ? NULL : memory_map(bytes, usable);
}

static int make_slots(struct arena *a, int64_t n) {
    if (n <= a->n_slots)
        return 0;
    if (n < 2 * a->n_slots)
        n = 2 * a->n_slots;
    char **segments = fails() ? NULL : realloc(a->segments, (size_t)n * sizeof *segments);
    if (!segments)
        return -1;
    a->segments = segments;
    a->n_slots = n;
    return 0;
}

/* The rows in use, from the segment that is there to a larger one. */
static void copy_rows(struct arena *a, char *to, int64_t to_tiles) {
    const struct arena_config *c = &a->config;
    size_t bytes = (size_t)(tiles_for(a->rows_used) * c->tile_bytes);
    for (int64_t run = 0; run < (int64_t)c->n_layers * c->n_heads; run++)
        memcpy(to + run * to_tiles * c->tile_bytes, a->segments[0] + run * a->segment_tiles * c->tile_bytes, bytes);
    a->bytes_copied += c->n_layers * c->n_heads * (int64_t)bytes;
}

static int grow_copy(struct arena *a, int64_t rows) {
    int64_t wanted = round_up(rows, a->config.r);
    if (wanted > a->config.cap)
        wanted = a->config.cap;
    int64_t tiles = tiles_for(wanted);
    size_t bytes = bytes_of(&a->config, tiles);
    if (!bytes || make_slots(a, 1))
        return no_memory(&a->config, wanted, "memory");
    bytes = memory_whole(bytes);
    char *segment = map(bytes, true);
    if (!segment)
        return no_memory(&a->config, wanted, "memory");
    if (a->n_segments) {
        copy_rows(a, segment, tiles);
        memory_unmap(a->segments[0], a->segment_bytes);
    }
    a->segments[0] = segment;
    a->n_segments = 1;
    a->segment_tiles = tiles;
    a->segment_bytes = bytes;
    a->rows_reserved = wanted;
    a->allocations++;
    return 0;
}

static int grow_chunk(struct arena *a, int64_t rows) {
    int64_t before = a->n_segments, wanted = round_up(rows, a->config.r), after = wanted / a->config.r;
    if (make_slots(a, after))
        return no_memory(&a->config, wanted, "memory");
    while (a->n_segments < after) {
        char *segment = map(a->segment_bytes, true);
        if (!segment) {
            while (a->n_segments > before)
                memory_unmap(a->segments[--a->n_segments], a->segment_bytes);
            return no_memory(&a->config, wanted, "memory");
        }
        a->segments[a->n_segments++] = segment;
    }
    a->allocations += after - before;
    a->rows_reserved = wanted;
    return 0;
}

/* mprotect makes memory usable, so that the system can refuse it here and not in the middle of a write. */
static int grow_reserve(struct arena *a, int64_t rows) {
    int64_t wanted = round_up(rows, a->config.r), after = wanted / a->config.r;
    size_t usable = (size_t)round_up(after * (int64_t)a->segment_bytes, (int64_t)memory_unit(a->space_bytes));
    if (usable > a->space_bytes)
        usable = a->space_bytes;
    if (make_slots(a, after) || fails() ||
        (usable > a->space_usable &&
         memory_use(a->space + a->space_usable, usable - a->space_usable)))
        return no_memory(&a->config, wanted, "memory");
    if (usable > a->space_usable)
        a->space_usable = usable;
    while (a->n_segments < after) {
        a->segments[a->n_segments] = a->space + (size_t)a->n_segments * a->segment_bytes;
        a->n_segments++;
    }
    a->allocations++;
    a->rows_reserved = wanted;
    return 0;
}

/* What CHUNK and RESERVE fix in advance: a segment, and for RESERVE the space for all of them. */
static int plan_segments(struct arena *a) {
    struct arena_config *c = &a->config;
    c->r = (int)round_up(c->r, TILE_ROWS);
    a->segment_tiles = c->r / TILE_ROWS;
    a->segment_bytes = bytes_of(c, a->segment_tiles);
    if (!a->segment_bytes)
        return no_memory(c, c->r, "memory");
    if (c->growth == BMC_GROW_CHUNK) {
        a->segment_bytes = memory_whole(a->segment_bytes);
        return 0;
    }
    size_t bytes = bytes_of(c, round_up(c->cap, c->r) / TILE_ROWS);
    a->space_bytes = bytes ? memory_whole(bytes) : 0;
    a->space = bytes ? map(a->space_bytes, false) : NULL;
    return a->space ? 0 : no_memory(c, c->cap, "address space");
}

static int start(struct arena *a) {
    if (a->config.growth == BMC_GROW_CHUNK || a->config.growth == BMC_GROW_RESERVE)
        return plan_segments(a);
    if (a->config.growth == BMC_GROW_COPY)
        return 0;
    int status = grow_copy(a, a->config.cap);
    if (!status)
        memset(a->segments[0], 0, a->segment_bytes);        /* touched: this policy pays for everything at once */
    return status;
}

int arena_init(struct arena *a, const struct arena_config *config) {
    memset(a, 0, sizeof *a);
    if (config->n_layers < 1 || config->n_heads < 1 || config->tile_bytes < 1)
        return fail(BMC_EINVAL, "an arena needs layers, heads and tiles: got %d, %d and %lld bytes", config->n_layers,
                    config->n_heads, (long long)config->tile_bytes);
    if (config->cap < 1 || config->cap > MAX_ROWS)
        return fail(BMC_EINVAL, "the cap on rows is between 1 and %d, not %lld", MAX_ROWS, (long long)config->cap);
    if (config->growth < BMC_GROW_COPY || config->growth > BMC_GROW_RESERVE)
        return fail(BMC_EINVAL, "there is no growth policy %d", config->growth);
    if (config->growth != BMC_GROW_MAX && config->r < 1)
        return fail(BMC_EINVAL, "an arena grows by 1 row or more, not by %d", config->r);
    a->config = *config;
    if (config->growth == BMC_GROW_MAX || config->r > config->cap)
        a->config.r = (int)config->cap;
    int status = start(a);
    if (status)
        arena_free(a);
    return status;
}

void arena_free(struct arena *a) {
    if (a->space)
        memory_unmap(a->space, a->space_bytes);
    else
        while (a->n_segments > 0)
            memory_unmap(a->segments[--a->n_segments], a->segment_bytes);
    free(a->segments);
    memset(a, 0, sizeof *a);
}

int arena_reserve(struct arena *a, int64_t rows) {
    if (rows > a->config.cap)
        return fail(BMC_EFULL, "the context is full: %lld rows are needed and its cap is %lld", (long long)rows,
                    (long long)a->config.cap);
    if (rows <= a->rows_reserved)
        return 0;
    switch (a->config.growth) {
    case BMC_GROW_CHUNK:   return grow_chunk(a, rows);
    case BMC_GROW_RESERVE: return grow_reserve(a, rows);
    default:               return grow_copy(a, rows);
    }
}

void arena_stats(const struct arena *a, bmc_arena_stats *stats) {
    const struct arena_config *c = &a->config;
    *stats = (bmc_arena_stats){
        .allocations = a->allocations,
        .bytes_copied = a->bytes_copied,
        .rows_reserved = a->rows_reserved,
        .rows_used = a->rows_used,
        .bytes_reserved = (int64_t)(a->space ? a->space_usable : (size_t)a->n_segments * a->segment_bytes),
        .row_bytes = c->n_layers * c->n_heads * c->tile_bytes / TILE_ROWS,
        .growth = c->growth,
        .r = c->r,
    };
}

int arena_auto_rows(int64_t row_bytes) {
    int64_t rows = (4 << 20) / (row_bytes > 0 ? row_bytes : 1);
    int64_t tiles = (rows + TILE_ROWS / 2) / TILE_ROWS;
    return TILE_ROWS * (int)(tiles < 1 ? 1 : tiles > 16 ? 16 : tiles);
}
