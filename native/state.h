/* States: what recurrent blocks keep of a sequence, of a fixed size whatever its length.
 *
 * A state cannot be cut back by position as rows can. So a session has each state twice: `current`, after all its tokens, and
 * `anchor`, after the first `base` of them, and a log of what the tokens after `base` did to it (up to LOG_MAX). To go back to a position
 * within the log is to take the anchor and do the first tokens of the log again, the same arithmetic on the same numbers. A pass over
 * several tokens sets the anchor to where it begins, as what it guesses may be taken back; a single token only adds to the log. Farther
 * back there are snapshots.
 *
 * A block's stream holds, one after the other: the current state, the anchor, and rows: those of the (n_before + LOG_MAX) last tokens from
 * n_before before `base` on, each the inputs of its convolution and what it did to the state. */
#ifndef STATE_H
#define STATE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { LOG_MAX = 40, SNAPSHOTS = 8 };

struct state_size {
    size_t floats;                  /* of a state */
    size_t row;                     /* floats of a token's row in the log */
    int n_before;                   /* rows before the anchor that are kept: what a convolution looks back to */
    size_t at;                      /* floats of the streams before it: states_measure counts them */
};

/* What a pass does with a session: n tokens from `start` on. */
struct state_run {
    int start, n;
    int base;                       /* of the log as the pass finds it */
    int replay;                     /* tokens of the log to do again, from the anchor on; -1: none, the current state is right */
    int anchor;                     /* before which of its tokens the anchor is set, 0 .. n; -1: not at all */
};

struct snapshot { int position; float *values; int64_t used; };

struct states {
    const struct state_size *sizes; /* (n,) */
    int n;
    size_t floats;                  /* of all streams, for each session */
    float *memory;                  /* NULL until it is needed */
    int base;                       /* position of the anchors */
    int current;                    /* position of the current states */
    int64_t clock;                  /* counts uses of snapshots */
    struct snapshot snapshots[SNAPSHOTS];
};

/* Fills in `at`; returns the floats of all streams. */
size_t states_measure(struct state_size *sizes, int n);

void states_init(struct states *s, const struct state_size *sizes, int n);
void states_free(struct states *s);
int states_reserve(struct states *s);                           /* memory for them; 0 or BMC_ENOMEM */

/* What a pass over n tokens from `start` on has to do; start is within base .. current. */
struct state_run states_plan(const struct states *s, int start, int n);
void states_done(struct states *s, const struct state_run *run);

/* How far back the states can be taken: to `position`, or to an earlier one from where its tokens have to be evaluated again. */
int states_rewind(struct states *s, int position);
int states_snapshot(struct states *s, int position);            /* of the states as they are, at `position`; 0 or BMC_ENOMEM */
int states_copy(struct states *to, const struct states *from);  /* to: of the same sizes, empty; 0 or BMC_ENOMEM */
int64_t states_bytes(const struct states *s);

static inline float *state_current(const struct states *s, int stream) { return s->memory + s->sizes[stream].at; }
static inline float *state_anchor(const struct states *s, int stream) { return state_current(s, stream) + s->sizes[stream].floats; }

/* The row of the token at `position`, base - n_before or later. */
static inline float *state_row(const struct states *s, int stream, int base, int position) {
    const struct state_size *size = &s->sizes[stream];
    return state_anchor(s, stream) + size->floats + (size_t)(position - base + size->n_before) * size->row;
}

/* Moves the log of one stream to where the run leaves it; afterwards the rows of its last tokens are to be written: those from
 * state_first_row on. */
void states_shift(const struct states *s, int stream, const struct state_run *run);

static inline int state_new_base(const struct state_run *run) { return run->anchor < 0 ? run->base : run->start + run->anchor; }

#endif
