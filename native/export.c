/* What a session consists of, as bytes: for files. A tile of 16 rows has the same bytes on every CPU. */
#include "error.h"
#include "session.h"

#include <string.h>

/* What layers on a GPU keep follows what those here do, as if all were here: with the order of the layers,
 * the bytes are the same. */
enum { HALVES = 2 };

static const struct arena *half_of(const bmc_session *s, int arena, int half) {
    return &s->arenas[arena + half * GPU_ROWS];
}

static int64_t tile_bytes(const bmc_session *s, int arena) {
    return arena_tile_bytes(half_of(s, arena, 0)) + arena_tile_bytes(half_of(s, arena, 1));
}

static int64_t float_bytes(const bmc_session *s, int n_log) {
    size_t floats = 0;
    for (int i = 0; i < PLACES; i++)
        floats += states_floats(&s->states[i], n_log);
    return (int64_t)(floats * sizeof(float));
}

int bmc_session_layout(const bmc_session *s, bmc_layout *layout) {
    *layout = (bmc_layout){
        .tile_bytes = tile_bytes(s, ALL_ROWS), .window_bytes = tile_bytes(s, WINDOWS),
        .state_bytes = float_bytes(s, 0), .log_bytes = float_bytes(s, 1) - float_bytes(s, 0),
    };
    return 0;
}

int bmc_session_unchanged(const bmc_session *s) { return s->unchanged; }

int bmc_session_mark(bmc_session *s) {
    int status = claim(s);
    if (status)
        return status;
    s->unchanged = s->position;
    for (int i = WINDOWS; s->model->window && i < ARENAS; i += GPU_ROWS)
        arena_drop(&s->arenas[i], s->position - s->model->window - WINDOW_SPARE);
    release(s);
    return 0;
}

/* Which arena's rows a part is made of, or -1. */
static int arena_of(const bmc_part *part) {
    return part->kind == BMC_PART_ROWS ? ALL_ROWS : part->kind == BMC_PART_WINDOWS ? WINDOWS : -1;
}

static int64_t part_bytes(const bmc_session *s, const bmc_part *part) {
    const int arena = arena_of(part);
    return arena >= 0 ? (part->end - part->start) / TILE_ROWS * tile_bytes(s, arena)
                      : float_bytes(s, part->end - part->start);
}

/* The first row that both halves of the windows have. */
static int first_window(const bmc_session *s) {
    return larger((int)half_of(s, WINDOWS, 0)->first, (int)half_of(s, WINDOWS, 1)->first);
}

/* States of one place, where there are some; the others are at the same positions. */
static const struct states *some_states(const bmc_session *s) {
    return &s->states[s->states[HERE].n ? HERE : ON_GPU];
}

static bool has_states(const bmc_session *s) {
    for (int i = 0; i < PLACES; i++)
        if (s->states[i].n && !s->states[i].memory)
            return false;
    return some_states(s)->n > 0;
}

static bool has_snapshot(const bmc_session *s, int position) {
    for (int i = 0; i < PLACES; i++)
        if (s->states[i].n && !states_has_snapshot(&s->states[i], position))
            return false;
    return true;
}

static int list_parts(const bmc_session *s, int from, bmc_part *parts) {
    const struct states *states = some_states(s);
    const int tile = from / TILE_ROWS * TILE_ROWS;
    const int end = (s->position + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
    int n = 0;
    if (from < s->position && tile_bytes(s, ALL_ROWS))
        parts[n++] = (bmc_part){ BMC_PART_ROWS, tile, end };
    if (from < s->position && tile_bytes(s, WINDOWS))
        parts[n++] = (bmc_part){ BMC_PART_WINDOWS, larger(tile, first_window(s)), end };
    for (const struct snapshot *p = states->snapshots; p < states->snapshots + SNAPSHOTS; p++)
        if (p->copy && p->position <= s->position && has_snapshot(s, p->position))
            parts[n++] = (bmc_part){ BMC_PART_SNAPSHOT, p->position, p->position };
    if (states->n && s->position)
        parts[n++] = (bmc_part){ BMC_PART_STATES, states->base, s->position };
    return n;
}

int bmc_session_parts(bmc_session *s, int from, bmc_part *parts) {
    int status = claim(s);
    if (status)
        return status;
    status = from >= 0 && from <= s->position
               ? list_parts(s, from, parts)
               : fail(BMC_EINVAL, "parts: expected 0 to %d, found %d", s->position, from);
    release(s);
    return status;
}

static bool has_rows(const bmc_session *s, int arena, const bmc_part *part) {
    for (int i = 0; i < HALVES; i++) {
        const struct arena *a = half_of(s, arena, i);
        if (part->start < a->n_dropped * a->config.r || part->end > a->rows_reserved)
            return false;
    }
    return part->start % TILE_ROWS == 0 && part->end % TILE_ROWS == 0;
}

/* 0, or what is wrong with a part of a session. */
static int check_part(const bmc_session *s, const bmc_part *part, int64_t n) {
    const int arena = arena_of(part);
    if (part->kind < BMC_PART_ROWS || part->kind > BMC_PART_STATES || part->start < 0
        || part->end < part->start)
        return fail(BMC_EINVAL, "there is no part %d from %d to %d", (int)part->kind, (int)part->start,
                    (int)part->end);
    if (arena >= 0) {
        if (!has_rows(s, arena, part))
            return fail(BMC_EINVAL, "rows %d to %d are not whole tiles of the session", (int)part->start,
                        (int)part->end);
    } else if (!has_states(s) || part->end > s->position || part->end - part->start > LOG_MAX
               || (part->kind == BMC_PART_SNAPSHOT ? part->start != part->end : part->end != s->position))
        return fail(BMC_EINVAL, "states of %d to %d tokens are not those of the session", (int)part->start,
                    (int)part->end);
    if (n != part_bytes(s, part))
        return fail(BMC_EINVAL, "a part: expected %lld bytes, found %lld", (long long)part_bytes(s, part),
                    (long long)n);
    return 0;
}

static int export_rows(bmc_session *s, int arena, const bmc_part *part, char *bytes) {
    const int from = part->start / TILE_ROWS, to = part->end / TILE_ROWS;
    const int status = arena_export(half_of(s, arena, 0), from, to, bytes, tile_bytes(s, arena));
    bytes += arena_tile_bytes(half_of(s, arena, 0));
    return status ? status : arena_export(half_of(s, arena, 1), from, to, bytes, tile_bytes(s, arena));
}

static int import_rows(bmc_session *s, int arena, const bmc_part *part, const char *bytes) {
    struct arena *here = &s->arenas[arena], *gpu = &s->arenas[arena + GPU_ROWS];
    const int from = part->start / TILE_ROWS, to = part->end / TILE_ROWS;
    const int status = arena_import(here, from, to, bytes, tile_bytes(s, arena));
    return status ? status
                  : arena_import(gpu, from, to, bytes + arena_tile_bytes(here), tile_bytes(s, arena));
}

static int export_part(bmc_session *s, const bmc_part *part, void *bytes) {
    const int arena = arena_of(part), n_log = part->end - part->start;
    float *values = bytes;
    int status = 0;
    if (arena >= 0)
        return export_rows(s, arena, part, bytes);
    for (int i = 0; i < PLACES && !status; i++) {
        if (s->states[i].n)
            status = states_export(&s->states[i], part->start, n_log, values);
        values += states_floats(&s->states[i], n_log);
    }
    return status;
}

static int import_part(bmc_session *s, const bmc_part *part, const void *bytes) {
    const int arena = arena_of(part), n_log = part->end - part->start;
    const float *values = bytes;
    int status = 0;
    if (arena >= 0)
        return import_rows(s, arena, part, bytes);
    for (int i = 0; i < PLACES && !status; i++) {
        if (s->states[i].n)
            status = states_import(&s->states[i], part->start, n_log, part->kind == BMC_PART_SNAPSHOT,
                                   values);
        values += states_floats(&s->states[i], n_log);
    }
    return status;
}

/* Bytes go to a GPU and back by one caller of a model at a time, since its buffer for that is one. */
static int claim_all(bmc_session *s) {
    const int status = claim(s);
    if (!status && s->model->cuda)
        pthread_mutex_lock(&s->model->lock);
    return status;
}

static void release_all(bmc_session *s) {
    if (s->model->cuda)
        pthread_mutex_unlock(&s->model->lock);
    release(s);
}

int bmc_session_export(bmc_session *s, const bmc_part *part, void *bytes, int64_t n) {
    int status = claim_all(s);
    if (status)
        return status;
    status = check_part(s, part, n);
    if (!status)
        status = export_part(s, part, bytes);
    release_all(s);
    return status;
}

int bmc_session_import(bmc_session *s, const bmc_part *part, const void *bytes, int64_t n) {
    int status = claim_all(s);
    if (status)
        return status;
    status = check_part(s, part, n);
    if (!status)
        status = import_part(s, part, bytes);
    release_all(s);
    return status;
}

static int check_tokens(const bmc_session *s, int from, const int32_t *tokens, int n, int window) {
    if (from < 0 || from > s->position || n < 0 || n > MAX_ROWS - from || (n && !tokens))
        return fail(BMC_EINVAL, "extend: expected tokens after 0 to %d others, found %d after %d",
                    s->position, n, from);
    if (window < 0 || window > from + n || window % TILE_ROWS)
        return fail(BMC_EINVAL, "extend: expected rows of windows from 0 to %d, found %d", from + n, window);
    for (int i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= s->model->c.vocab_size)
            return fail(BMC_EINVAL, "token ids are 0 to %d, found %d", (int)s->model->c.vocab_size - 1,
                        (int)tokens[i]);
    return 0;
}

/* Rows of windows before `first` are not there. */
static void lose_windows(bmc_session *s, int from, int first) {
    for (int i = WINDOWS; i < ARENAS; i += GPU_ROWS) {
        struct arena *windows = &s->arenas[i];
        if (first > from)
            windows->first = first;
        arena_drop(windows, windows->first);
    }
}

static int extend(bmc_session *s, int from, const int32_t *tokens, int n, int window) {
    for (int i = 0; i < PLACES; i++)
        states_forget(&s->states[i], from);
    for (int i = WINDOWS; i < ARENAS; i += GPU_ROWS)
        if (from < s->arenas[i].first)
            arena_clear(&s->arenas[i]);
    s->position = s->unchanged = from;
    int status = reserve(s, n);
    if (status)
        return status;
    if (n)
        memcpy(s->tokens + from, tokens, (size_t)n * sizeof *tokens);
    lose_windows(s, from, window);
    s->position = s->unchanged = s->hidden.from = from + n;
    return 0;
}

int bmc_session_extend(bmc_session *s, int from, const int32_t *tokens, int n, int window) {
    int status = claim(s);
    if (status)
        return status;
    status = s->model->c.causal && !s->model->target
               ? check_tokens(s, from, tokens, n, window)
               : fail(BMC_EINVAL, "extend: expected a session of a model that writes text");
    if (!status)
        status = extend(s, from, tokens, n, window);
    release(s);
    return status;
}
