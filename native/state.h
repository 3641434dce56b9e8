/* States: what recurrent blocks keep of a sequence, of a fixed size whatever its length.
 *
 * A state cannot be cut back by position as rows can. So a session has each state twice: `current`, after
 * all its tokens, and `anchor`, after the first `base` of them, and a log of what the tokens from `base` on
 * did to it (up to LOG_MAX). To go back to a position within the log is to take the anchor and do the first
 * tokens of the log again: the same arithmetic on the same numbers. A pass over several tokens sets the
 * anchor to where it begins, as its guesses may be taken back. A single token only adds to the log; where
 * that is full, the anchor moves on to LOG_KEPT tokens before the end. Farther back there are snapshots of
 * anchors.
 *
 * A block's stream holds, one after the other: the current state, the anchor, and a ring of log rows, one for
 * each token from n_before before `base` on: the inputs of its convolution and what it did to the state. */
#ifndef STATE_H
#define STATE_H

#include "memory.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* LOG_KEPT: a draft model evaluates up to 32 guesses one by one, and all of them may be taken back. */
enum { LOG_MAX = 48, LOG_KEPT = 32, SNAPSHOTS = 8 };

struct state_size {
    size_t floats;                  /* of a state */
    size_t row;                     /* floats of a token's row in the log */
    int n_before;                   /* rows kept before the anchor: what a convolution looks back to */
    size_t at;                      /* floats of the streams before it: states_measure counts them */
};

/* What a pass does with a session: n tokens from `start` on. */
struct state_run {
    int start, n;
    int base, next_base;            /* position of the anchor, before the pass and after it */
    bool replay;                    /* the current state is beyond `start`: begin with anchor and log */
};

struct copy;                        /* shared by forks */
struct snapshot { int position; struct copy *copy; };

struct states {
    const struct state_size *sizes; /* (n,) */
    int n;
    size_t floats;                  /* of all streams */
    const struct memory *on;        /* where they are; NULL: the host */
    float *memory;                  /* NULL until it is needed */
    bool lost;                      /* a GPU failed while they were changed */
    int base;                       /* position of the anchors */
    int current;                    /* position of the current states */
    struct snapshot snapshots[SNAPSHOTS];
};

/* Fills in `at`; returns the floats of all streams. */
size_t states_measure(struct state_size *sizes, int n);

void states_init(struct states *s, const struct state_size *sizes, int n);
void states_free(struct states *s);
/* Memory for them; 0, BMC_ENOMEM, or BMC_EDEVICE once they are lost. */
int states_reserve(struct states *s);

/* What a pass over n tokens from `start` on has to do; start is within base .. current. */
struct state_run states_plan(const struct states *s, int start, int n);
void states_done(struct states *s, const struct state_run *run);

/* How far back towards `position` the states get without evaluating tokens again. */
int states_nearest(const struct states *s, int position);

/* Takes the states back to `position`, or to an earlier one, from where tokens have to be
 * evaluated again; which one. */
int states_rewind(struct states *s, int position);

/* What they are is not known: the next rewind goes to a snapshot, or to the beginning. */
void states_doubt(struct states *s);

/* Keeps a copy of the anchors: to come back to where the states are will need few tokens. 0,
 * BMC_ENOMEM or BMC_EDEVICE. */
int states_snapshot(struct states *s);

/* to: empty, of the same sizes and in the same place. 0, BMC_ENOMEM or BMC_EDEVICE. */
int states_copy(struct states *to, const struct states *from);

int64_t states_bytes(const struct states *s);

/* Anchors as numbers, with the log of n_log tokens: those at base, or of the snapshot of a
 * position, whose log is empty. */
size_t states_floats(const struct states *s, int n_log);
bool states_has_snapshot(const struct states *s, int position);
/* 0, BMC_EINVAL: there are none, or BMC_EDEVICE */
int states_export(const struct states *s, int position, int n_log, float *values);

/* The other way: as the states after position + n_log tokens, or as a snapshot. 0,
 * BMC_ENOMEM or BMC_EDEVICE. */
int states_import(struct states *s, int position, int n_log, bool as_snapshot, const float *values);
void states_forget(struct states *s, int position);            /* snapshots of more tokens */

static inline float *state_current(const struct states *s, int stream) {
    return s->memory + s->sizes[stream].at;
}

static inline float *state_anchor(const struct states *s, int stream) {
    return state_current(s, stream) + s->sizes[stream].floats;
}

static inline int state_ring(const struct state_size *size) { return LOG_MAX + size->n_before; }

static inline int state_place(const struct state_size *size, int position) {
    return (position + size->n_before) % state_ring(size);
}

/* The row of the token at `position`, which is base - n_before or later. */
static inline float *state_row(const struct states *s, int stream, int position) {
    const struct state_size *size = &s->sizes[stream];
    return state_anchor(s, stream) + size->floats + (size_t)state_place(size, position) * size->row;
}

/* How many of the n rows from `position` on lie side by side. */
static inline int state_rows(const struct states *s, int stream, int position, int n) {
    const struct state_size *size = &s->sizes[stream];
    const int left = state_ring(size) - state_place(size, position);
    return n < left ? n : left;
}

/* Of the tokens of a run, the first one whose row is kept. */
static inline int state_first_kept(const struct states *s, int stream, const struct state_run *run) {
    const int first = run->next_base - s->sizes[stream].n_before;
    return first > run->start ? first : run->start;
}

#endif
