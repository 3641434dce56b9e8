#include "state.h"

#include "bmc.h"
#include "error.h"
#include "memory.h"

#include <stdlib.h>
#include <string.h>

static size_t rows_floats(const struct state_size *size, int n) { return (size_t)(size->n_before + n) * size->row; }

size_t states_measure(struct state_size *sizes, int n) {
    size_t sum = 0;
    for (int i = 0; i < n; i++) {
        sizes[i].at = sum;
        sum += 2 * sizes[i].floats + (rows_floats(&sizes[i], LOG_MAX) + 15) / 16 * 16;
    }
    return sum;
}

void states_init(struct states *s, const struct state_size *sizes, int n) {
    *s = (struct states){ .sizes = sizes, .n = n };
    const struct state_size *last = sizes + n - 1;
    s->floats = n ? last->at + 2 * last->floats + (rows_floats(last, LOG_MAX) + 15) / 16 * 16 : 0;
}

void states_free(struct states *s) {
    memory_unmap(s->memory, s->floats * sizeof(float));
    for (int i = 0; i < SNAPSHOTS; i++)
        free(s->snapshots[i].values);
    memset(s, 0, sizeof *s);
}

int states_reserve(struct states *s) {
    if (!s->n || s->memory)
        return 0;
    s->memory = memory_map(s->floats * sizeof(float));
    return s->memory ? 0 : fail(BMC_ENOMEM, "no memory for %.0f MB of states", (double)s->floats * sizeof(float) / 1e6);
}

static size_t snapshot_floats(const struct states *s) {
    size_t floats = 0;
    for (int i = 0; i < s->n; i++)
        floats += s->sizes[i].floats + rows_floats(&s->sizes[i], 0);
    return floats;
}

int64_t states_bytes(const struct states *s) {
    size_t floats = s->memory ? s->floats : 0;
    for (int i = 0; i < SNAPSHOTS; i++)
        floats += s->snapshots[i].values ? snapshot_floats(s) : 0;
    return (int64_t)(floats * sizeof(float));
}

struct state_run states_plan(const struct states *s, int start, int n) {
    struct state_run run = { .start = start, .n = n, .base = s->base, .replay = start < s->current ? start - s->base : -1, .anchor = -1 };
    if (n > 1 || start + n - s->base > LOG_MAX)
        run.anchor = n > LOG_MAX ? n - LOG_MAX : 0;
    return run;
}

void states_done(struct states *s, const struct state_run *run) {
    s->base = state_new_base(run);
    s->current = run->start + run->n;
}

void states_shift(const struct states *s, int stream, const struct state_run *run) {
    const struct state_size *size = &s->sizes[stream];
    const int base = state_new_base(run), kept = run->start - (base - size->n_before);      /* rows from before the pass that stay */
    if (base > run->base && kept > 0)
        memmove(state_row(s, stream, base, base - size->n_before), state_row(s, stream, run->base, base - size->n_before),
                (size_t)kept * size->row * sizeof(float));
}

/* The states at the anchor, from and to a snapshot: of each stream the state and the rows before it. */
static void copy_snapshot(const struct states *s, float *values, bool restore, int base, int position) {
    for (int i = 0; i < s->n; i++) {
        const struct state_size *size = &s->sizes[i];
        const size_t rows = rows_floats(size, 0);
        if (restore) {
            memcpy(state_anchor(s, i), values, size->floats * sizeof *values);
            memcpy(state_current(s, i), values, size->floats * sizeof *values);
            memcpy(state_row(s, i, position, position - size->n_before), values + size->floats, rows * sizeof *values);
        } else {
            memcpy(values, state_current(s, i), size->floats * sizeof *values);
            memcpy(values + size->floats, state_row(s, i, base, position - size->n_before), rows * sizeof *values);
        }
        values += size->floats + rows;
    }
}

int states_copy(struct states *to, const struct states *from) {
    int status = from->memory ? states_reserve(to) : 0;
    if (status || !from->memory)
        return status;
    memcpy(to->memory, from->memory, from->floats * sizeof(float));
    to->base = from->base;
    to->current = from->current;
    to->clock = from->clock;
    for (int i = 0; i < SNAPSHOTS; i++) {
        const struct snapshot *p = &from->snapshots[i];
        float *values = p->values ? malloc(snapshot_floats(from) * sizeof *values) : NULL;
        if (values) {                       /* without memory there are fewer of them */
            memcpy(values, p->values, snapshot_floats(from) * sizeof *values);
            to->snapshots[i] = (struct snapshot){ p->position, values, p->used };
        }
    }
    return 0;
}

/* The states as they are before the first token. */
static void clear(struct states *s) {
    for (int i = 0; s->memory && i < s->n; i++) {
        memset(state_current(s, i), 0, 2 * s->sizes[i].floats * sizeof(float));
        memset(state_row(s, i, 0, -s->sizes[i].n_before), 0, rows_floats(&s->sizes[i], 0) * sizeof(float));
    }
}

int states_rewind(struct states *s, int position) {
    struct snapshot *best = NULL;
    if (!s->n || (position >= s->base && position <= s->current))
        return position;
    for (int i = 0; i < SNAPSHOTS; i++) {
        struct snapshot *p = &s->snapshots[i];
        if (p->values && p->position <= position && (!best || p->position > best->position))
            best = p;
    }
    if (best) {
        best->used = ++s->clock;
        copy_snapshot(s, best->values, true, 0, best->position);
    } else
        clear(s);
    s->base = s->current = best ? best->position : 0;
    for (int i = 0; i < SNAPSHOTS; i++)         /* those of tokens that are gone */
        if (s->snapshots[i].values && s->snapshots[i].position > position) {
            free(s->snapshots[i].values);
            s->snapshots[i] = (struct snapshot){ 0 };
        }
    return s->base;
}

int states_snapshot(struct states *s, int position) {
    struct snapshot *oldest = &s->snapshots[0];
    const size_t floats = snapshot_floats(s);
    if (!s->memory || position != s->current || !position)
        return 0;
    for (int i = 0; i < SNAPSHOTS; i++) {
        if (s->snapshots[i].values && s->snapshots[i].position == position) {
            s->snapshots[i].used = ++s->clock;
            return 0;
        }
        if (s->snapshots[i].used < oldest->used)
            oldest = &s->snapshots[i];
    }
    float *values = oldest->values ? oldest->values : malloc(floats * sizeof *values);
    if (!values)
        return fail(BMC_ENOMEM, "no memory for a snapshot of %.0f MB", (double)floats * sizeof *values / 1e6);
    copy_snapshot(s, values, false, s->base, position);
    *oldest = (struct snapshot){ position, values, ++s->clock };
    return 0;
}
