#include "state.h"

#include "bmc.h"
#include "error.h"
#include "memory.h"

#include <limits.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* Of each stream the anchor and the rows before it, never changed. on: where the values are; NULL: the heap,
 * as there may be more of them than a process may have mappings. */
struct copy { atomic_int users; const struct memory *on; float *values; size_t bytes; };

static const struct memory *place_of(const struct states *s) { return s->on ? s->on : &memory_host; }

static void drop(struct snapshot *p) {
    struct copy *copy = p->copy;
    if (copy && atomic_fetch_sub(&copy->users, 1) == 1) {
        if (copy->on)
            copy->on->unmap(copy->on->of, copy->values, copy->bytes);
        else
            free(copy->values);
        free(copy);
    }
    *p = (struct snapshot){ 0 };
}

/* Bytes that are taken for this number of floats; more than 0 even if there are none. */
static size_t whole(const struct states *s, size_t floats) {
    return place_of(s)->whole(place_of(s)->of, (floats ? floats : 1) * sizeof(float));
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
    if (s->memory)
        place_of(s)->unmap(place_of(s)->of, s->memory, whole(s, s->floats));
    for (int i = 0; i < SNAPSHOTS; i++)
        drop(&s->snapshots[i]);
    memset(s, 0, sizeof *s);
}

static double megabytes(size_t floats) { return (double)floats * sizeof(float) / 1e6; }

static int check_lost(const struct states *s) {
    if (s->lost)
        return fail(BMC_EDEVICE,
                    "the states of this session are lost: the GPU failed while they were changed");
    return 0;
}

static int no_memory(const struct states *s, const char *what, size_t floats) {
    const int failed = place_of(s)->failed(place_of(s)->of);
    return failed ? failed : fail(BMC_ENOMEM, "no memory for %s of %.0f MB", what, megabytes(floats));
}

int states_reserve(struct states *s) {
    if (check_lost(s))
        return BMC_EDEVICE;
    if (!s->n || s->memory)
        return 0;
    s->memory = place_of(s)->map(place_of(s)->of, whole(s, s->floats));
    return s->memory ? 0 : no_memory(s, "states", s->floats);
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

/* How floats move: within the place of the states (memory.copy), or between it and the host. */
typedef int move_fn(void *of, void *to, const void *from, size_t bytes);

static int move_floats(const struct states *s, move_fn *move, float *to, const float *from, size_t n) {
    return n ? move(place_of(s)->of, to, from, n * sizeof *to) : 0;
}

static int copy_floats(const struct states *s, float *to, const float *from, size_t n) {
    return move_floats(s, place_of(s)->copy, to, from, n);
}

static int zero_floats(const struct states *s, float *to, size_t n) {
    return n ? place_of(s)->zero(place_of(s)->of, to, n * sizeof *to) : 0;
}

/* 0, or something else, as those that follow. */
static int save(const struct states *s, int n_log, float *values, move_fn *move) {
    int failed = 0;
    for (int i = 0; i < s->n; i++) {
        const struct state_size *size = &s->sizes[i];
        failed |= move_floats(s, move, values, state_anchor(s, i), size->floats);
        values += size->floats;
        for (int j = -size->n_before; j < n_log; j++, values += size->row)
            failed |= move_floats(s, move, values, state_row(s, i, s->base + j), size->row);
    }
    return failed;
}

/* And back, as the states at s->base. */
static int load(const struct states *s, int n_log, const float *values, move_fn *move) {
    int failed = 0;
    for (int i = 0; i < s->n; i++) {
        const struct state_size *size = &s->sizes[i];
        failed |= move_floats(s, move, state_anchor(s, i), values, size->floats);
        failed |= move_floats(s, move, state_current(s, i), values, size->floats);
        values += size->floats;
        for (int j = -size->n_before; j < n_log; j++, values += size->row)
            failed |= move_floats(s, move, state_row(s, i, s->base + j), values, size->row);
    }
    return failed;
}

/* The states as they are before the first token. */
static int clear(const struct states *s) {
    int failed = 0;
    for (int i = 0; s->memory && i < s->n; i++) {
        const struct state_size *size = &s->sizes[i];
        failed |= zero_floats(s, state_current(s, i), 2 * size->floats);
        failed |= zero_floats(s, state_row(s, i, -size->n_before), (size_t)size->n_before * size->row);
    }
    return failed;
}

/* The last snapshot of the first `position` tokens, or NULL. */
static const struct snapshot *last_snapshot(const struct states *s, int position) {
    const struct snapshot *last = NULL;
    for (const struct snapshot *p = s->snapshots; p < s->snapshots + SNAPSHOTS; p++)
        if (p->copy && p->position <= position && (!last || p->position > last->position))
            last = p;
    return last;
}

void states_doubt(struct states *s) { s->base = INT_MAX; }

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
    s->lost |= last ? load(s, 0, last->copy->values, place_of(s)->copy) : clear(s);
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

/* Room for a snapshot's values, which are still to come. NULL: a failure, in *status. */
static struct copy *make_copy(const struct states *s, int *status) {
    const size_t bytes = s->on ? whole(s, snapshot_floats(s)) : snapshot_floats(s) * sizeof(float);
    struct copy *copy = malloc(sizeof *copy);
    float *values = !copy ? NULL : s->on ? s->on->map(s->on->of, bytes) : malloc(bytes);
    if (!values) {
        free(copy);
        *status = no_memory(s, "a snapshot", snapshot_floats(s));
        return NULL;
    }
    *copy = (struct copy){ .on = s->on, .values = values, .bytes = bytes };
    atomic_init(&copy->users, 1);
    return copy;
}

/* failed: what filled the copy. 0, or BMC_EDEVICE. */
static int add_snapshot(struct states *s, int position, struct copy *copy, int failed) {
    if (failed) {
        drop(&(struct snapshot){ position, copy });
        return fail(BMC_EDEVICE, "the GPU failed to copy a session's states");
    }
    struct snapshot *place = next_snapshot(s);
    drop(place);
    *place = (struct snapshot){ position, copy };
    return 0;
}

int states_snapshot(struct states *s) {
    if (check_lost(s))
        return BMC_EDEVICE;
    if (!s->n || !s->base || states_has_snapshot(s, s->base))
        return 0;
    int status = 0;
    struct copy *copy = make_copy(s, &status);
    return copy ? add_snapshot(s, s->base, copy, save(s, 0, copy->values, place_of(s)->copy)) : status;
}

int states_export(const struct states *s, int position, int n_log, float *values) {
    const struct memory *on = place_of(s);
    const bool snapshot = !n_log && states_has_snapshot(s, position);
    if (check_lost(s))
        return BMC_EDEVICE;
    if (!snapshot && (!s->memory || position != s->base || n_log < 0 || n_log > s->current - s->base))
        return fail(BMC_EINVAL, "the session has no states of %d tokens", position);
    if (snapshot)
        move_floats(s, on->fetch, values, last_snapshot(s, position)->copy->values, snapshot_floats(s));
    else
        save(s, n_log, values, on->fetch);
    return on->wait(on->of);
}

static int import_snapshot(struct states *s, int position, const float *values) {
    const struct memory *on = place_of(s);
    int status = 0;
    struct copy *copy = make_copy(s, &status);
    if (!copy)
        return status;
    move_floats(s, on->send, copy->values, values, snapshot_floats(s));
    status = on->wait(on->of);
    if (!status)
        return add_snapshot(s, position, copy, 0);
    drop(&(struct snapshot){ position, copy });
    return status;
}

int states_import(struct states *s, int position, int n_log, bool as_snapshot, const float *values) {
    const struct memory *on = place_of(s);
    if (as_snapshot)
        return import_snapshot(s, position, values);
    s->base = position;
    /* Beyond its end: the next pass does the log again. */
    s->current = n_log ? position + n_log + 1 : position;
    load(s, n_log, values, on->send);
    const int status = on->wait(on->of);
    s->lost |= status != 0;
    return status;
}

int states_copy(struct states *to, const struct states *from) {
    int status = check_lost(from);
    if (!status && from->memory)
        status = states_reserve(to);
    if (status || !from->memory)
        return status;
    if (copy_floats(to, to->memory, from->memory, from->floats))
        return fail(BMC_EDEVICE, "the GPU failed to copy a session's states");
    to->base = from->base;
    to->current = from->current;
    memcpy(to->snapshots, from->snapshots, sizeof to->snapshots);
    for (int i = 0; i < SNAPSHOTS; i++)
        if (to->snapshots[i].copy)
            atomic_fetch_add(&to->snapshots[i].copy->users, 1);
    return 0;
}
