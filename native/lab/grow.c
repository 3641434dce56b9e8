/* Arenas that grow in other ways than by chunks. What a growth leaves is a list of segments as the product
 * knows it, of segment_bytes each, so that attention reads it and arena_free() frees it without knowing
 * how it was made. */
#include "grow.h"

#include "clock.h"
#include "error.h"
#include "memory.h"
#include "model.h"
#include "space.h"

#include <string.h>

struct growth {
    struct arena *arena;
    int64_t rows, rows_used;
    bool touch;
    bmc_growth_cost *cost;
};

static size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

static int64_t tiles_of(int64_t rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS; }

static int64_t segments_of(const struct arena *a, int64_t rows) {
    return (rows + a->config.r - 1) / a->config.r;
}

/* One write in each page. */
static void touch(const struct growth *g, char *memory, size_t bytes) {
    enum { SMALLEST_PAGE = 4096 };
    if (!g->touch)
        return;
    double began = seconds();
    for (size_t i = 0; i < bytes; i += SMALLEST_PAGE)
        *(volatile char *)(memory + i) = 0;
    g->cost->touch += seconds() - began;
}

static int grow_chunk(const struct growth *g) {
    struct arena *a = g->arena;
    int64_t before = a->n_segments;
    int status = arena_reserve(a, g->rows);
    for (int64_t i = before; i < a->n_segments; i++)
        touch(g, a->segments[i], a->segment_bytes);
    return status;
}

/* The rows in use, to a larger segment. Each run is touched right before its copy, while its zeroed pages
 * are in the cache, as they are when the copy itself touches them. */
static void copy_rows(const struct growth *g, char *to, int64_t to_tiles) {
    const struct arena *a = g->arena;
    const struct arena_config *c = &a->config;
    int64_t used = tiles_of(g->rows_used);
    for (int stream = 0; stream < c->n_streams; stream++)
        for (int head = 0; head < c->streams[stream].n_heads; head++) {
            size_t new_bytes = (size_t)(to_tiles * c->streams[stream].tile_bytes);
            size_t copied = (size_t)(used * c->streams[stream].tile_bytes);
            touch(g, to, new_bytes);
            double began = seconds();
            memcpy(to, arena_tile(a, stream, head, 0), copied);
            g->cost->copy += seconds() - began;
            g->cost->bytes_copied += (int64_t)copied;
            to += new_bytes;
        }
}

static int grow_copy(const struct growth *g) {
    struct arena *a = g->arena;
    int64_t tiles = tiles_of(g->rows);
    size_t bytes = arena_bytes(&a->config, tiles);
    char *segment = bytes && !arena_slots(a, 1) ? memory_map(bytes = memory_whole(bytes)) : NULL;
    if (!segment)
        return arena_no_memory(a, g->rows);
    if (a->n_segments) {
        copy_rows(g, segment, tiles);
        memory_unmap(a->segments[0], a->segment_bytes);
    } else
        touch(g, segment, bytes);
    a->segments[0] = segment;
    a->n_segments = 1;
    a->segment_tiles = tiles;
    a->segment_bytes = bytes;
    a->rows_reserved = g->rows;
    return 0;
}

/* The list of segments in a space that begins with the first of them. */
static void lay_out(struct arena *a, char *space, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        a->segments[i] = space + (size_t)i * a->segment_bytes;
    a->n_segments = n;
}

/* Segments in one space have no room between them, whole pages apart. */
static size_t in_space(struct arena *a) {
    if (!a->n_segments)
        a->segment_bytes = round_up(arena_bytes(&a->config, a->segment_tiles), page_size());
    return a->segment_bytes;
}

/* All segments of the cap are in the list from the first growth on; rows_reserved tells which ones are
 * memory. */
static int grow_reserve(const struct growth *g) {
    struct arena *a = g->arena;
    size_t size = in_space(a), total, before = (size_t)segments_of(a, a->rows_reserved) * size;
    int64_t after = segments_of(a, g->rows), all = segments_of(a, a->config.cap);
    if (!a->n_segments) {
        bool fits = !__builtin_mul_overflow(size, (size_t)all, &total) && total <= SIZE_MAX / 4;
        char *space = fits && !arena_slots(a, all) ? space_map(total) : NULL;
        if (!space)
            return arena_no_memory(a, a->config.cap);
        lay_out(a, space, all);
        a->config.cap = 0;                              /* until some of it is memory */
    }
    if (after > a->n_segments)
        return fail(BMC_EFULL, "the space of %lld segments is used up", (long long)a->n_segments);
    if (space_use(a->segments[0] + before, (size_t)after * size - before))
        return arena_no_memory(a, g->rows);
    touch(g, a->segments[0] + before, (size_t)after * size - before);
    a->rows_reserved = after * a->config.r;
    return 0;
}

static int grow_remap(const struct growth *g) {
    struct arena *a = g->arena;
    int64_t after = segments_of(a, g->rows);
    size_t size = in_space(a), before = (size_t)a->n_segments * size, wanted = (size_t)after * size;
    if (!space_moves())
        return fail(BMC_EINVAL, "this system cannot remap memory (Linux can): choose another way to grow");
    if (arena_slots(a, after))
        return arena_no_memory(a, g->rows);
    char *space = before ? space_move(a->segments[0], before, wanted) : memory_map(wanted);
    if (!space)
        return arena_no_memory(a, g->rows);
    lay_out(a, space, after);
    touch(g, space + before, wanted - before);
    a->rows_reserved = a->n_segments * a->config.r;
    return 0;
}

static int (*const GROWTHS[])(const struct growth *) = {
    [BMC_GROW_CHUNK] = grow_chunk, [BMC_GROW_COPY] = grow_copy, [BMC_GROW_RESERVE] = grow_reserve,
    [BMC_GROW_REMAP] = grow_remap,
};

int arena_grow(struct arena *a, int growth, int64_t rows, int64_t rows_used, bool touched,
               bmc_growth_cost *cost) {
    *cost = (bmc_growth_cost){ 0 };
    if (growth < 0 || growth > BMC_GROW_REMAP)
        return fail(BMC_EINVAL, "growth: expected 0 to %d, found %d", BMC_GROW_REMAP, growth);
    if (rows < 0 || rows > MAX_ROWS)
        return fail(BMC_EINVAL, "rows: expected 0 to %d, found %lld", MAX_ROWS, (long long)rows);
    if (rows <= a->rows_reserved)
        return 0;
    double began = seconds();
    int status = GROWTHS[growth](&(struct growth){ a, rows, rows_used, touched, cost });
    cost->allocate = seconds() - began - cost->copy - cost->touch;
    if (!status && growth != BMC_GROW_CHUNK)
        a->config.cap = a->rows_reserved;
    return status;
}

int bmc_session_grow(bmc_session *s, int growth, int64_t rows, int touched, bmc_growth_cost *cost) {
    if (!cost)
        return fail(BMC_EINVAL, "bmc_session_grow: cost is NULL");
    return arena_grow(&s->arenas[ALL_ROWS], growth, rows, s->position, touched, cost);
}
