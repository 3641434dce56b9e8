#include "arena.h"

#include "clock.h"
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

static char *map(const struct arena *a, size_t bytes, bool usable) {
    char *memory = fails() ? NULL : memory_map(bytes, usable);
    if (memory && a->config.small_pages)
        memory_pages(memory, bytes, false);
    return memory;
}

/* One write a page makes it memory. */
static void touch(struct arena *a, char *memory, size_t bytes) {
    enum { SMALLEST_PAGE = 4096 };
    if (!a->config.touch)
        return;
    double began = seconds();
    for (size_t i = 0; i < bytes; i += SMALLEST_PAGE)
        *(volatile char *)(memory + i) = 0;
    a->touch_s += seconds() - began;
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

/* The rows in use, from the segment that is there to a larger one. A run is touched right before its copy, while the
 * zeroed pages are in the cache, as they are when the copy itself touches them. */
static void copy_rows(struct arena *a, char *to, int64_t to_tiles) {
    const struct arena_config *c = &a->config;
    size_t bytes = (size_t)(tiles_for(a->rows_used) * c->tile_bytes), touched = (size_t)(to_tiles * c->tile_bytes);
    double touch_s = a->touch_s, began = seconds();
    for (int64_t run = 0; run < (int64_t)c->n_layers * c->n_heads; run++, to += touched) {
        touch(a, to, touched);
        memcpy(to, a->segments[0] + run * a->segment_tiles * c->tile_bytes, bytes);
    }
    a->bytes_copied += c->n_layers * c->n_heads * (int64_t)bytes;
    a->copy_s += seconds() - began - (a->touch_s - touch_s);
}

static int64_t wanted_rows(const struct arena *a, int64_t rows) {
    const struct arena_config *c = &a->config;
    double larger = c->growth == BMC_GROW_GEOMETRIC ? c->factor * (double)a->rows_reserved : 0;
    if (larger >= (double)c->cap)
        return c->cap;
    rows = round_up(rows > (int64_t)larger ? rows : (int64_t)larger, c->r);
    return rows < c->cap ? rows : c->cap;
}

/* One segment for everything: COPY, GEOMETRIC, and once for all MAX and MAX_LAZY. */
static int grow_copy(struct arena *a, int64_t rows) {
    int64_t wanted = wanted_rows(a, rows), tiles = tiles_for(wanted);
    size_t bytes = bytes_of(&a->config, tiles);
    if (!bytes || make_slots(a, 1))
        return no_memory(&a->config, wanted, "memory");
    bytes = memory_whole(bytes);
    char *segment = map(a, bytes, true);
    if (!segment)
        return no_memory(&a->config, wanted, "memory");
    if (a->n_segments) {
        copy_rows(a, segment, tiles);
        memory_unmap(a->segments[0], a->segment_bytes);
    } else
        touch(a, segment, bytes);
    a->segments[0] = segment;
    a->n_segments = 1;
    a->segment_tiles = tiles;
    a->segment_bytes = bytes;
    a->rows_reserved = wanted;
    a->allocations++;
    a->bytes_allocated += (int64_t)bytes;
    return 0;
}

static int grow_chunk(struct arena *a, int64_t rows) {
    int64_t before = a->n_segments, wanted = round_up(rows, a->config.r), after = wanted / a->config.r;
    if (make_slots(a, after))
        return no_memory(&a->config, wanted, "memory");
    while (a->n_segments < after) {
        char *segment = map(a, a->segment_bytes, true);
        if (!segment) {
            while (a->n_segments > before)
                memory_unmap(a->segments[--a->n_segments], a->segment_bytes);
            return no_memory(&a->config, wanted, "memory");
        }
        a->segments[a->n_segments++] = segment;
    }
    for (int64_t i = before; i < after; i++)
        touch(a, a->segments[i], a->segment_bytes);
    a->allocations += after - before;
    a->bytes_allocated += (after - before) * (int64_t)a->segment_bytes;
    a->rows_reserved = wanted;
    return 0;
}

/* mprotect makes memory usable, so that the system can refuse it here and not in the middle of a write. */
static int use_space(struct arena *a, size_t bytes) {
    bytes = (size_t)round_up((int64_t)bytes, (int64_t)memory_unit(a->space_bytes));
    if (bytes > a->space_bytes)
        bytes = a->space_bytes;
    if (bytes <= a->space_usable)
        return 0;
    if (fails() || memory_use(a->space + a->space_usable, bytes - a->space_usable))
        return -1;
    a->space_usable = bytes;
    return 0;
}

static int remap_space(struct arena *a, size_t bytes) {
    bytes = memory_whole(bytes);
    if (bytes <= a->space_bytes)
        return 0;
    char *space = !a->space ? map(a, bytes, true) : fails() ? NULL : memory_grow(a->space, a->space_bytes, bytes);
    if (!space)
        return -1;
    memory_pages(space, bytes, !a->config.small_pages);
    a->space = space;
    a->space_bytes = a->space_usable = bytes;
    return 0;
}

/* RESERVE and REMAP: segments one behind the other. */
static int grow_space(struct arena *a, int64_t rows) {
    int64_t wanted = round_up(rows, a->config.r), after = wanted / a->config.r;
    size_t bytes = bytes_of(&a->config, wanted / TILE_ROWS), before = a->space_usable;
    if (!bytes || make_slots(a, after) ||
        (a->config.growth == BMC_GROW_REMAP ? remap_space(a, bytes) : use_space(a, bytes)))
        return no_memory(&a->config, wanted, "memory");
    for (int64_t i = 0; i < after; i++)
        a->segments[i] = a->space + (size_t)i * a->segment_bytes;
    touch(a, a->space + before, a->space_usable - before);
    a->n_segments = after;
    a->allocations++;
    a->bytes_allocated += (int64_t)(a->space_usable - before);
    a->rows_reserved = wanted;
    return 0;
}

/* What policies with segments of r rows fix in advance: a segment, and for RESERVE the space for all of them. */
static int plan_segments(struct arena *a) {
    struct arena_config *c = &a->config;
    c->r = (int)round_up(c->r, TILE_ROWS);
    a->segment_tiles = c->r / TILE_ROWS;
    a->segment_bytes = bytes_of(c, a->segment_tiles);
    if (!a->segment_bytes)
        return no_memory(c, c->r, "memory");
    if (c->growth == BMC_GROW_CHUNK)
        a->segment_bytes = memory_whole(a->segment_bytes);
    if (c->growth != BMC_GROW_RESERVE)
        return 0;
    size_t bytes = bytes_of(c, round_up(c->cap, c->r) / TILE_ROWS);
    a->space_bytes = bytes ? memory_whole(bytes) : 0;
    a->space = bytes ? map(a, a->space_bytes, false) : NULL;
    return a->space ? 0 : no_memory(c, c->cap, "address space");
}

static bool is_max(const struct arena_config *c) {
    return c->growth == BMC_GROW_MAX || c->growth == BMC_GROW_MAX_LAZY;
}

static int grow(struct arena *a, int64_t rows) {
    double began = seconds();
    int status;
    switch (a->config.growth) {
    case BMC_GROW_CHUNK:   status = grow_chunk(a, rows); break;
    case BMC_GROW_RESERVE:
    case BMC_GROW_REMAP:   status = grow_space(a, rows); break;
    default:               status = grow_copy(a, rows);
    }
    if (!status)
        a->grow_s += seconds() - began;
    return status;
}

static int start(struct arena *a) {
    switch (a->config.growth) {
    case BMC_GROW_CHUNK:
    case BMC_GROW_RESERVE:
    case BMC_GROW_REMAP: return plan_segments(a);
    case BMC_GROW_MAX:
    case BMC_GROW_MAX_LAZY: return grow(a, a->config.cap);
    default: return 0;
    }
}

static int check_policy(const struct arena_config *c) {
    if (c->growth < BMC_GROW_COPY || c->growth > BMC_GROW_REMAP)
        return fail(BMC_EINVAL, "there is no growth policy %d", c->growth);
    if (!is_max(c) && c->r < 1)
        return fail(BMC_EINVAL, "an arena grows by 1 row or more, not by %d", c->r);
    if (c->growth == BMC_GROW_GEOMETRIC && c->factor && !(c->factor >= 1.01 && c->factor <= 16))
        return fail(BMC_EINVAL, "geometric growth is by a factor from 1.01 to 16, not %g", c->factor);
    if (c->growth == BMC_GROW_REMAP && !memory_grows())
        return fail(BMC_EINVAL, "this system cannot remap memory (Linux can): choose another way to grow");
    return 0;
}

int arena_init(struct arena *a, const struct arena_config *config) {
    memset(a, 0, sizeof *a);
    if (config->n_layers < 1 || config->n_heads < 1 || config->tile_bytes < 1)
        return fail(BMC_EINVAL, "an arena needs layers, heads and tiles: got %d, %d and %lld bytes", config->n_layers,
                    config->n_heads, (long long)config->tile_bytes);
    if (config->cap < 1 || config->cap > MAX_ROWS)
        return fail(BMC_EINVAL, "the cap on rows is between 1 and %d, not %lld", MAX_ROWS, (long long)config->cap);
    int status = check_policy(config);
    if (status)
        return status;
    a->config = *config;
    if (is_max(config) || config->r > config->cap)
        a->config.r = (int)config->cap;
    if (config->growth == BMC_GROW_MAX)
        a->config.touch = true;             /* this policy pays for everything at once */
    if (config->growth == BMC_GROW_MAX_LAZY)
        a->config.touch = false;
    if (!config->factor)
        a->config.factor = 2;
    status = start(a);
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
    return grow(a, rows);
}

void arena_stats(const struct arena *a, bmc_arena_stats *stats) {
    const struct arena_config *c = &a->config;
    *stats = (bmc_arena_stats){
        .allocations = a->allocations,
        .bytes_allocated = a->bytes_allocated,
        .bytes_copied = a->bytes_copied,
        .rows_reserved = a->rows_reserved,
        .rows_used = a->rows_used,
        .bytes_reserved = (int64_t)(a->space ? a->space_usable : (size_t)a->n_segments * a->segment_bytes),
        .row_bytes = c->n_layers * c->n_heads * c->tile_bytes / TILE_ROWS,
        .growth = c->growth,
        .r = c->r,
        .allocate_s = a->grow_s - a->copy_s - a->touch_s,
        .copy_s = a->copy_s,
        .touch_s = a->touch_s,
    };
}

int arena_auto_rows(int64_t row_bytes) {
    int64_t rows = (4 << 20) / (row_bytes > 0 ? row_bytes : 1);
    int64_t tiles = (rows + TILE_ROWS / 2) / TILE_ROWS;
    return TILE_ROWS * (int)(tiles < 1 ? 1 : tiles > 16 ? 16 : tiles);
}
