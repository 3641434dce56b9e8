/* What blocks with a state share: rows of work, the convolution over a few tokens before, the walk of the
 * states, the log. */
#ifndef RECURRENT_H
#define RECURRENT_H

#include "../machine.h"

/* Rows of a block in the work buffer, (tokens, values). A row of the log is all of `row` but Mamba 2's gate:
 *
 *   | gate, of Mamba 2 | channels: inputs of the convolution | decay, one a head | k | d |
 *
 * Values of a head are rounded up to 16 in v, d and o: a slice of a state belongs to 16 of them. */
struct work {
    float *row;                     /* from the channels on */
    size_t stride;                  /* floats from token to token */
    size_t decay, k, d;             /* floats from the channels to them */
    float *q;                       /* (keys,) all groups */
    float *v, *o;                   /* (values,) all heads */
    size_t keys, values;
    float *beta;                    /* (n_heads,) of the delta net */
    float *gate;                    /* (inner,) */
    size_t beta_stride, gate_stride;
    float *out;                     /* (inner,) what ssm_out reads */
};

static inline float *row_of(float *rows, size_t stride, int t) { return rows + (size_t)t * stride; }

/* What a kind does in its own way. Channels are queries and keys of n_groups, and values of n_heads; after
 * the convolution keys stand in the token's row, queries in q and values in v. */
struct recurrence {
    enum extent pieces;             /* HEADS or GROUPS: what the result's norm is over */
    /* After the convolution: of keys and queries, or NULL; of values, with decay and d or beta. */
    void (*key)(const bmc_model *m, const struct block *b, float *x, bool query);
    void (*value)(const bmc_model *m, const struct block *b, const struct work *w, int t, int h);
    /* Of o and the gate, to out. */
    void (*finish)(const bmc_model *m, const struct block *b, const struct work *w, int t, int piece);
};

void recurrent_measure(const bmc_model *m, const bmc_block *c, int64_t *extent);
int recurrent_check(const bmc_model *m, const bmc_block *c);
struct need recurrent_need(const bmc_model *m, const struct block *b);
void recurrent_stream(bmc_model *m, struct block *b);
/* Floats of a token. */
size_t recurrent_work(const bmc_model *m, const struct block *b, float *work, struct work *w);

/* e^(a dt) in the place of x, dt = softplus(x + its bias); returns dt. */
float decay(const bmc_model *m, const struct block *b, const struct work *w, int t, int h);

/* From the rows of the products to the result: convolution, states, norm and gate, ssm_out. */
void recurrent_run(struct pass *p, const struct block *b, const struct recurrence *r, const struct work *w,
                   struct sink out, int thread);

/* The steps of that on the CPU: all but the product; and of the short convolution. */
void recur(struct pass *p, const struct block *b, const struct recurrence *r, const struct work *w,
           struct tokens out, int thread);
void short_conv(struct pass *p, const struct block *b, const struct work *w, struct tokens out, int thread);

/* The run of token t; `run` is the one of an earlier token. */
static inline const struct run *run_of(const struct run *run, int t) {
    while (t >= run->first + run->states[HERE].n)
        run++;
    return run;
}

/* The convolution of token t, channels [from, from + n). */
void convolve(const struct pass *p, const struct block *b, const struct work *w, const struct run *run, int t,
              int from, int n, float *y);

/* The log gets the rows of the pass's last tokens. */
void keep_log(const struct pass *p, const struct block *b, const struct work *w, int thread);

/* A slice of a state, and where its numbers are. */
struct walk {
    const struct kernels *kernels;
    const struct states *states;
    const struct state_run *run;
    int stream;
    size_t slice;                   /* its number in the state */
    size_t decay, k, d;             /* floats from the beginning of a row of the log */
    struct recur_job job;           /* of the run's tokens; s is set here */
};

/* Over the run's tokens, from where the states are; leaves the slice and its anchor as the run says. */
void walk_slice(const struct walk *w);

#endif
