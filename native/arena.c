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

int64_t arena_streams(struct arena_stream *streams, int n) {
    int64_t sum = 0, bytes;
    for (int i = 0; i < n; i++) {
        streams[i].before = sum;
        if (streams[i].n_heads < 1 || streams[i].tile_bytes < 1
            || __builtin_mul_overflow(streams[i].n_heads, streams[i].tile_bytes, &bytes)
            || __builtin_add_overflow(sum, bytes, &sum))
            return -1;
    }
    return sum;
}

/* Bytes of one tile of every head. */
static int64_t column_bytes(const struct arena_config *c) {
    const struct arena_stream *last = c->streams + c->n_streams - 1;
    return c->n_streams ? last->before + last->n_heads * last->tile_bytes : 0;
}

size_t arena_bytes(const struct arena_config *c, int64_t tiles) {
    size_t bytes;
    if (__builtin_mul_overflow((size_t)column_bytes(c), (size_t)tiles, &bytes) || bytes > SIZE_MAX / 4)
        return 0;
    return bytes;
}

int arena_no_memory(const struct arena *a, int64_t rows) {
    const struct memory *m = a->config.memory;
    const int failed = m->failed(m->of);
    double mb = (double)column_bytes(&a->config) / TILE_ROWS * (double)rows / 1e6;
    if (failed)
        return failed;
    return fail(BMC_ENOMEM, "no memory for %lld rows of keys and values (%.0f MB)", (long long)rows, mb);
}

int arena_slots(struct arena *a, int64_t n) {
    if (n <= a->n_slots)
        return 0;
    if (n < 2 * a->n_slots)
        n = 2 * a->n_slots;
    char **segments = fails() ? NULL : realloc(a->segments, (size_t)n * sizeof *segments);
    if (!segments)
        return -1;
    a->segments = segments;
    atomic_int **users = fails() ? NULL : realloc(a->users, (size_t)n * sizeof *users);
    if (!users)
        return -1;
    memset(users + a->n_slots, 0, (size_t)(n - a->n_slots) * sizeof *users);
    a->users = users;
    a->n_slots = n;
    return 0;
}

static void unmap(const struct arena *a, char *segment) {
    a->config.memory->unmap(a->config.memory->of, segment, a->segment_bytes);
}

/* A new segment, zeroed or a copy of another; NULL without memory. */
static char *new_segment(const struct arena *a, const char *from) {
    const struct memory *m = a->config.memory;
    char *segment = fails() ? NULL : m->map(m->of, a->segment_bytes);
    if (segment && from && m->copy(m->of, segment, from, a->segment_bytes)) {
        unmap(a, segment);
        return NULL;
    }
    return segment;
}

/* One user of a segment less. */
static void release(struct arena *a, int64_t i) {
    atomic_int *users = a->users[i];
    a->users[i] = NULL;
    if (users && atomic_fetch_sub(users, 1) > 1)
        return;
    free(users);
    unmap(a, a->segments[i]);
}

/* Segments until there are n; all of them or none. */
static int add_segments(struct arena *a, int64_t n) {
    int64_t before = a->n_segments;
    if (arena_slots(a, n))
        return -1;
    while (a->n_segments < n) {
        char *segment = new_segment(a, NULL);
        if (!segment) {
            while (a->n_segments > before)
                release(a, --a->n_segments);
            return -1;
        }
        a->segments[a->n_segments++] = segment;
    }
    return 0;
}

int arena_init(struct arena *a, const struct arena_config *config) {
    memset(a, 0, sizeof *a);
    if (config->n_streams < 0 || (config->n_streams && !config->streams))
        return fail(BMC_EINVAL, "an arena needs 0 or more streams, not %d", config->n_streams);
    if (config->cap < 1 || config->cap > MAX_ROWS)
        return fail(BMC_EINVAL, "the cap on rows is between 1 and %d, not %lld", MAX_ROWS,
                    (long long)config->cap);
    if (config->r < 1)
        return fail(BMC_EINVAL, "an arena grows by 1 row or more, not by %d", config->r);
    a->config = *config;
    struct arena_config *c = &a->config;
    if (!c->memory)
        c->memory = &memory_host;
    c->r = (int)round_up(c->r < c->cap ? c->r : c->cap, TILE_ROWS);
    a->segment_tiles = c->r / TILE_ROWS;
    a->segment_bytes = arena_bytes(c, a->segment_tiles);
    if (!a->segment_bytes && c->n_streams)
        return arena_no_memory(a, c->r);
    a->segment_bytes = c->memory->whole(c->memory->of, a->segment_bytes);
    return 0;
}

void arena_clear(struct arena *a) {
    while (a->n_segments > a->n_dropped)
        release(a, --a->n_segments);
    a->n_segments = a->n_dropped = a->first = a->rows_reserved = 0;
}

void arena_free(struct arena *a) {
    arena_clear(a);
    free(a->segments);
    free(a->users);
    memset(a, 0, sizeof *a);
}

int arena_own(struct arena *a, int64_t from, int64_t to) {
    for (int64_t i = from / a->config.r; i * a->config.r < to && i < a->n_segments; i++) {
        if (i < a->n_dropped || !a->users[i])
            continue;
        if (atomic_load(a->users[i]) > 1) {
            char *segment = new_segment(a, a->segments[i]);
            if (!segment)
                return arena_no_memory(a, a->config.r);
            release(a, i);
            a->segments[i] = segment;
        }
    }
    return 0;
}

/* A segment of the parent that the child has too. */
static int share(struct arena *child, struct arena *parent, int64_t i) {
    if (!parent->users[i]) {
        atomic_int *users = fails() ? NULL : malloc(sizeof *users);
        if (!users)
            return -1;
        atomic_init(users, 1);
        parent->users[i] = users;
    }
    atomic_fetch_add(parent->users[i], 1);
    child->segments[i] = parent->segments[i];
    child->users[i] = parent->users[i];
    child->n_segments = i + 1;
    return 0;
}

int arena_fork(struct arena *child, struct arena *parent, int64_t rows) {
    const int64_t r = parent->config.r, whole = rows / r, n = (rows + r - 1) / r;
    if (!parent->config.n_streams)
        return arena_reserve(child, rows);
    int failed = arena_slots(child, n);
    for (int64_t i = 0; i < whole && !failed; i++)
        if (i < parent->n_dropped) {
            child->segments[i] = parent->segments[i];
            child->n_segments = child->n_dropped = i + 1;
        } else
            failed = share(child, parent, i);
    if (!failed && n > whole && whole < parent->n_dropped) {
        child->segments[whole] = parent->segments[whole];
        child->n_segments = child->n_dropped = n;
    } else if (!failed && n > whole) {
        char *segment = new_segment(child, parent->segments[whole]);
        failed = !segment;
        if (segment)
            child->segments[child->n_segments++] = segment;
    }
    child->rows_reserved = child->n_segments * r;
    child->first = parent->first;
    if (!failed)
        return 0;
    arena_clear(child);
    return arena_no_memory(child, rows);
}

void arena_drop(struct arena *a, int64_t rows) {
    for (; (a->n_dropped + 1) * a->config.r <= rows && a->n_dropped + 1 < a->n_segments; a->n_dropped++) {
        release(a, a->n_dropped);
        a->segments[a->n_dropped] = a->segments[a->n_segments - 1];     /* memory that can be pointed to */
    }
    if (a->first < a->n_dropped * a->config.r)
        a->first = a->n_dropped * a->config.r;
}

int64_t arena_mapped(const struct arena *a) {
    int64_t bytes = 0;
    for (int64_t i = a->n_dropped; i < a->n_segments; i++)
        bytes += (int64_t)a->segment_bytes / (a->users[i] ? atomic_load(a->users[i]) : 1);
    return bytes;
}

int arena_reserve(struct arena *a, int64_t rows) {
    if (rows > a->config.cap)
        return fail(BMC_EFULL, "the context is full: %lld rows are needed and its cap is %lld",
                    (long long)rows, (long long)a->config.cap);
    if (rows <= a->rows_reserved)
        return 0;
    int64_t wanted = round_up(rows, a->config.r);
    if (a->config.n_streams && add_segments(a, wanted / a->config.r))
        return arena_no_memory(a, wanted);
    a->rows_reserved = wanted;
    return 0;
}

int64_t arena_tile_bytes(const struct arena *a) { return column_bytes(&a->config); }

int64_t arena_row_bytes(const struct arena *a) {
    return column_bytes(&a->config) / TILE_ROWS;
}

/* Where tile number i has a head of a stream. */
static int64_t place_in_bytes(const struct arena_stream *s, int head, int64_t i, int64_t stride) {
    return i * stride + s->before + head * s->tile_bytes;
}

/* A head's tiles one after the other: in a segment they lie side by side. */
int arena_export(const struct arena *a, int64_t from, int64_t to, char *bytes, int64_t stride) {
    const struct memory *m = a->config.memory;
    for (int i = 0; i < a->config.n_streams; i++) {
        const struct arena_stream *s = &a->config.streams[i];
        for (int head = 0; head < s->n_heads; head++)
            for (int64_t tile = from; tile < to; tile++)
                m->fetch(m->of, bytes + place_in_bytes(s, head, tile - from, stride),
                         arena_tile(a, i, head, tile), (size_t)s->tile_bytes);
    }
    return m->wait(m->of);
}

int arena_import(struct arena *a, int64_t from, int64_t to, const char *bytes, int64_t stride) {
    const struct memory *m = a->config.memory;
    for (int i = 0; i < a->config.n_streams; i++) {
        const struct arena_stream *s = &a->config.streams[i];
        for (int head = 0; head < s->n_heads; head++)
            for (int64_t tile = from; tile < to; tile++)
                m->send(m->of, arena_tile(a, i, head, tile),
                        bytes + place_in_bytes(s, head, tile - from, stride), (size_t)s->tile_bytes);
    }
    return m->wait(m->of);
}

int arena_auto_rows(int64_t row_bytes) {
    int64_t rows = (4 << 20) / (row_bytes > 0 ? row_bytes : 1);
    int64_t tiles = (rows + TILE_ROWS / 2) / TILE_ROWS;
    return TILE_ROWS * (int)(tiles < 1 ? 1 : tiles > 16 ? 16 : tiles);
}
