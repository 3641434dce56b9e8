/* What a session consists of, as bytes: for files. A tile of 16 rows has the same bytes on every CPU. */
#include "error.h"
#include "session.h"

#include <string.h>

static int64_t float_bytes(const bmc_session *s, int n_log) {
    return s->states[HERE].n ? (int64_t)(states_floats(&s->states[HERE], n_log) * sizeof(float)) : 0;
}

/* Rows and states on a GPU are not carried over. */
static int check_here(const bmc_session *s) {
    return s->model->cuda ? fail(BMC_EINVAL, "sessions of a model with layers on a GPU cannot be saved or loaded yet") : 0;
}

int bmc_session_layout(const bmc_session *s, bmc_layout *layout) {
    if (check_here(s))
        return BMC_EINVAL;
    *layout = (bmc_layout){
        .tile_bytes = arena_tile_bytes(&s->arenas[ALL_ROWS]), .window_bytes = arena_tile_bytes(&s->arenas[WINDOWS]),
        .state_bytes = float_bytes(s, 0), .log_bytes = float_bytes(s, 1) - float_bytes(s, 0),
    };
    return 0;
}

int bmc_session_unchanged(const bmc_session *s) { return s->unchanged; }

/* Hold a session that can be exported. */
static int claim_here(bmc_session *s) {
    const int status = check_here(s);
    return status ? status : claim(s);
}

int bmc_session_mark(bmc_session *s) {
    int status = claim_here(s);
    if (status)
        return status;
    s->unchanged = s->position;
    if (s->model->window)
        arena_drop(&s->arenas[WINDOWS], s->position - s->model->window - WINDOW_SPARE);
    release(s);
    return 0;
}

/* Which arena's rows a part is made of, or -1. */
static int arena_of(const bmc_part *part) {
    return part->kind == BMC_PART_ROWS ? ALL_ROWS : part->kind == BMC_PART_WINDOWS ? WINDOWS : -1;
}

static int64_t part_bytes(const bmc_session *s, const bmc_part *part) {
    const int arena = arena_of(part);
    return arena >= 0 ? (part->end - part->start) / TILE_ROWS * arena_tile_bytes(&s->arenas[arena]) : float_bytes(s, part->end - part->start);
}

static int list_parts(const bmc_session *s, int from, bmc_part *parts) {
    const int tile = from / TILE_ROWS * TILE_ROWS, end = (s->position + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
    int n = 0;
    if (from < s->position && s->model->n_streams[ALL_ROWS])
        parts[n++] = (bmc_part){ BMC_PART_ROWS, tile, end };
    if (from < s->position && s->model->n_streams[WINDOWS])
        parts[n++] = (bmc_part){ BMC_PART_WINDOWS, larger(tile, (int)s->arenas[WINDOWS].first), end };
    for (const struct snapshot *p = s->states[HERE].snapshots; p < s->states[HERE].snapshots + SNAPSHOTS; p++)
        if (p->copy && p->position <= s->position)
            parts[n++] = (bmc_part){ BMC_PART_SNAPSHOT, p->position, p->position };
    if (s->states[HERE].n && s->position)
        parts[n++] = (bmc_part){ BMC_PART_STATES, s->states[HERE].base, s->position };
    return n;
}

int bmc_session_parts(bmc_session *s, int from, bmc_part *parts) {
    int status = claim_here(s);
    if (status)
        return status;
    status = from >= 0 && from <= s->position ? list_parts(s, from, parts)
                                              : fail(BMC_EINVAL, "parts: expected 0 to %d, found %d", s->position, from);
    release(s);
    return status;
}

/* 0, or what is wrong with a part of a session. */
static int check_part(const bmc_session *s, const bmc_part *part, int64_t n) {
    const int arena = arena_of(part);
    if (part->kind < BMC_PART_ROWS || part->kind > BMC_PART_STATES || part->start < 0 || part->end < part->start)
        return fail(BMC_EINVAL, "there is no part %d from %d to %d", (int)part->kind, (int)part->start, (int)part->end);
    if (arena >= 0) {
        const struct arena *a = &s->arenas[arena];
        if (part->start % TILE_ROWS || part->end % TILE_ROWS || part->start < a->n_dropped * a->config.r || part->end > a->rows_reserved)
            return fail(BMC_EINVAL, "rows %d to %d are not whole tiles of the session", (int)part->start, (int)part->end);
    } else if (!s->states[HERE].memory || part->end > s->position || part->end - part->start > LOG_MAX
               || (part->kind == BMC_PART_SNAPSHOT ? part->start != part->end : part->end != s->position))
        return fail(BMC_EINVAL, "states of %d to %d tokens are not those of the session", (int)part->start, (int)part->end);
    if (n != part_bytes(s, part))
        return fail(BMC_EINVAL, "a part: expected %lld bytes, found %lld", (long long)part_bytes(s, part), (long long)n);
    return 0;
}

static int export_part(bmc_session *s, const bmc_part *part, void *bytes) {
    const int arena = arena_of(part);
    if (arena >= 0)
        arena_export(&s->arenas[arena], part->start / TILE_ROWS, part->end / TILE_ROWS, bytes);
    else if (!states_export(&s->states[HERE], part->start, part->end - part->start, bytes))
        return fail(BMC_EINVAL, "the session has no states of %d tokens", (int)part->start);
    return 0;
}

static int import_part(bmc_session *s, const bmc_part *part, const void *bytes) {
    const int arena = arena_of(part);
    if (arena < 0)
        return states_import(&s->states[HERE], part->start, part->end - part->start, part->kind == BMC_PART_SNAPSHOT, bytes);
    arena_import(&s->arenas[arena], part->start / TILE_ROWS, part->end / TILE_ROWS, bytes);
    return 0;
}

int bmc_session_export(bmc_session *s, const bmc_part *part, void *bytes, int64_t n) {
    int status = claim_here(s);
    if (status)
        return status;
    status = check_part(s, part, n);
    if (!status)
        status = export_part(s, part, bytes);
    release(s);
    return status;
}

int bmc_session_import(bmc_session *s, const bmc_part *part, const void *bytes, int64_t n) {
    int status = claim_here(s);
    if (status)
        return status;
    status = check_part(s, part, n);
    if (!status)
        status = import_part(s, part, bytes);
    release(s);
    return status;
}

static int check_tokens(const bmc_session *s, int from, const int32_t *tokens, int n, int window) {
    if (from < 0 || from > s->position || n < 0 || n > MAX_ROWS - from || (n && !tokens))
        return fail(BMC_EINVAL, "extend: expected tokens after 0 to %d others, found %d after %d", s->position, n, from);
    if (window < 0 || window > from + n || window % TILE_ROWS)
        return fail(BMC_EINVAL, "extend: expected rows of windows from 0 to %d, found %d", from + n, window);
    for (int i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= s->model->c.vocab_size)
            return fail(BMC_EINVAL, "token ids are 0 to %d, found %d", (int)s->model->c.vocab_size - 1, (int)tokens[i]);
    return 0;
}

/* Rows of windows before `first` are not there. */
static void lose_windows(bmc_session *s, int from, int first) {
    struct arena *windows = &s->arenas[WINDOWS];
    if (first > from)
        windows->first = first;
    arena_drop(windows, windows->first);
}

static int extend(bmc_session *s, int from, const int32_t *tokens, int n, int window) {
    states_forget(&s->states[HERE], from);
    if (from < s->arenas[WINDOWS].first)
        arena_clear(&s->arenas[WINDOWS]);
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
    int status = claim_here(s);
    if (status)
        return status;
    status = s->model->c.causal && !s->model->target ? check_tokens(s, from, tokens, n, window)
                                                     : fail(BMC_EINVAL, "extend: expected a session of a model that writes text");
    if (!status)
        status = extend(s, from, tokens, n, window);
    release(s);
    return status;
}
