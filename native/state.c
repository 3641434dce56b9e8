#include "state.h"

#include "bmc.h"
#include "error.h"
#include "memory.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* Of each stream the anchor and the rows before it, never changed. */
struct copy { atomic_int users; float values[]; };

static void drop(struct snapshot *p) {
    if (p->copy && atomic_fetch_sub(&p->copy->users, 1) == 1)
        free(p->copy);
    *p = (struct snapshot){ 0 };
}

static size_t stream_floats(const struct state_size *size) {
    return 2 * size->floats + ((size_t)(LOG_MAX + size->n_before) * size->row + 15) / 16 * 16;
}

size_t states_floats(const struct states *s, int n_log) {
    size_t sum = 0;
    for (int i = 0; i < s->n; i++)
        sum += s->sizes[i].floats + (size_t)(s->sizes[i].n_before + n_log) * s->sizes[i].row;
    return sum;
}

static size_t snapshot_floats(const struct states *s) { return states_floats(s, 0); }

size_t states_measure(struct state_size *sizes, int n) {
    size_t sum = 0;
    for (int i = 0; i < n; i++) {
        sizes[i].at = sum;
        sum += stream_floats(&sizes[i]);
    }
    return sum;
}

void states_init(struct states *s, const struct state_size *sizes, int n) {
    *s = (struct states){ .sizes = sizes, .n = n };
    s->floats = n ? sizes[n - 1].at + stream_floats(&sizes[n - 1]) : 0;
}

void states_free(struct states *s) {
    memory_unmap(s->memory, s->floats * sizeof(float));
    for (int i = 0; i < SNAPSHOTS; i++)
        drop(&s->snapshots[i]);
    memset(s, 0, sizeof *s);
}

static double megabytes(size_t floats) { return (double)floats * sizeof(float) / 1e6; }

int states_reserve(struct states *s) {
    if (!s->n || s->memory)
        return 0;
    s->memory = memory_map(s->floats * sizeof(float));
    return s->memory ? 0 : fail(BMC_ENOMEM, "no memory for %.0f MB of states", megabytes(s->floats));
}

int64_t states_bytes(const struct states *s) {
    size_t floats = s->memory ? s->floats : 0;
    for (const struct snapshot *p = s->snapshots; p < s->snapshots + SNAPSHOTS; p++)
        floats += p->copy ? snapshot_floats(s) / (size_t)atomic_load(&p->copy->users) : 0;
    return (int64_t)(floats * sizeof(float));
}

struct state_run states_plan(const struct states *s, int start, int n) {
    const int end = start + n;
    struct state_run run = { .start = start, .n = n, .base = s->base, .next_base = s->base };
    run.replay = start < s->current;
    if (n > 1)
        run.next_base = n > LOG_MAX ? end - LOG_MAX : start;
    else if (end - s->base > LOG_MAX)
        run.next_base = end - LOG_KEPT;
    return run;
}

void states_done(struct states *s, const struct state_run *run) {
    s->base = run->next_base;
    s->current = run->start + run->n;
}

static void copy_floats(float *to, const float *from, size_t n) { memcpy(to, from, n * sizeof *to); }

static void save(const struct states *s, int n_log, float *values) {
    for (int i = 0; i < s->n; i++) {
        const struct state_size *size = &s->sizes[i];
        copy_floats(values, state_anchor(s, i), size->floats);
        values += size->floats;
        for (int j = -size->n_before; j < n_log; j++, values += size->row)
            copy_floats(values, state_row(s, i, s->base + j), size->row);
    }
}

/* And back, as the states at s->base. */
static void load(const struct states *s, int n_log, const float *values) {
    for (int i = 0; i < s->n; i++) {
        const struct state_size *size = &s->sizes[i];
        copy_floats(state_anchor(s, i), values, size->floats);
        copy_floats(state_current(s, i), values, size->floats);
        values += size->floats;
        for (int j = -size->n_before; j < n_log; j++, values += size->row)
            copy_floats(state_row(s, i, s->base + j), values, size->row);
    }
}

/* The states as they are before the first token. */
static void clear(const struct states *s) {
    for (int i = 0; s->memory && i < s->n; i++) {
        const struct state_size *size = &s->sizes[i];
        memset(state_current(s, i), 0, 2 * size->floats * sizeof(float));
        memset(state_row(s, i, -size->n_before), 0, (size_t)size->n_before * size->row * sizeof(float));
    }
}

/* The last snapshot of the first `position` tokens, or NULL. */
static const struct snapshot *last_snapshot(const struct states *s, int position) {
    const struct snapshot *last = NULL;
    for (const struct snapshot *p = s->snapshots; p < s->snapshots + SNAPSHOTS; p++)
        if (p->copy && p->position <= position && (!last || p->position > last->position))
            last = p;
    return last;
}

int states_nearest(const struct states *s, int position) {
    const struct snapshot *last = last_snapshot(s, position);
    return !s->n || position >= s->base ? position : last ? last->position : 0;
}

void states_forget(struct states *s, int position) {
    for (struct snapshot *p = s->snapshots; p < s->snapshots + SNAPSHOTS; p++)
        if (p->position > position)
            drop(p);
}

int states_rewind(struct states *s, int position) {
    if (!s->n || position >= s->base)           /* no snapshot is beyond base */
        return position;
    const struct snapshot *last = last_snapshot(s, position);
    s->base = s->current = last ? last->position : 0;
    if (last)
        load(s, 0, last->copy->values);
    else
        clear(s);
    states_forget(s, position);
    return s->base;
}

/* Where the next snapshot goes: a free place, or that of the one whose loss costs the fewest tokens. */
static struct snapshot *next_snapshot(struct states *s) {
    struct snapshot *place = NULL;
    int fewest = 0;
    for (struct snapshot *p = s->snapshots; p < s->snapshots + SNAPSHOTS; p++) {
        const struct snapshot *before = last_snapshot(s, p->position - 1);
        const int tokens = p->position - (before ? before->position : 0);
        if (!p->copy)
            return p;
        if (!place || tokens < fewest) {
            place = p;
            fewest = tokens;
        }
    }
    return place;
}

bool states_has_snapshot(const struct states *s, int position) {
    const struct snapshot *last = last_snapshot(s, position);
    return last && last->position == position;
}

/* A new snapshot, whose values are still to come. */
static struct copy *add_snapshot(struct states *s, int position) {
    struct copy *copy = malloc(sizeof *copy + snapshot_floats(s) * sizeof *copy->values);
    if (!copy)
        fail(BMC_ENOMEM, "no memory for a snapshot of %.0f MB", megabytes(snapshot_floats(s)));
    else {
        struct snapshot *place = next_snapshot(s);
        drop(place);
        atomic_init(&copy->users, 1);
        *place = (struct snapshot){ position, copy };
    }
    return copy;
}

int states_snapshot(struct states *s) {
    if (!s->base || states_has_snapshot(s, s->base))
        return 0;
    struct copy *copy = add_snapshot(s, s->base);
    if (!copy)
        return BMC_ENOMEM;
    save(s, 0, copy->values);
    return 0;
}

bool states_export(const struct states *s, int position, int n_log, float *values) {
    const struct snapshot *last = last_snapshot(s, position);
    if (!n_log && last && last->position == position)
        copy_floats(values, last->copy->values, snapshot_floats(s));
    else if (s->memory && position == s->base && n_log >= 0 && n_log <= s->current - s->base)
        save(s, n_log, values);
    else
        return false;
    return true;
}

int states_import(struct states *s, int position, int n_log, bool as_snapshot, const float *values) {
    if (as_snapshot) {
        struct copy *copy = add_snapshot(s, position);
        if (copy)
            copy_floats(copy->values, values, snapshot_floats(s));
        return copy ? 0 : BMC_ENOMEM;
    }
    s->base = position;
    s->current = n_log ? position + n_log + 1 : position;       /* beyond its end: the next pass does the log again */
    load(s, n_log, values);
    return 0;
}

int states_copy(struct states *to, const struct states *from) {
    const int status = from->memory ? states_reserve(to) : 0;
    if (status || !from->memory)
        return status;
    copy_floats(to->memory, from->memory, from->floats);
    to->base = from->base;
    to->current = from->current;
    memcpy(to->snapshots, from->snapshots, sizeof to->snapshots);
    for (int i = 0; i < SNAPSHOTS; i++)
        if (to->snapshots[i].copy)
            atomic_fetch_add(&to->snapshots[i].copy->users, 1);
    return 0;
}
