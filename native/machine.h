/* A machine: the steps that a pass is made of, as one processor does them. forward.c and layers/ say which
 * steps follow each other, once for all machines; steps_cpu.c and cuda/steps.c do them.
 *
 * Pointers in the arguments are addresses on the machine itself: a pass reaches its buffers through
 * pass.buffers, which has the same shape everywhere. On the CPU all threads call every step, and each does
 * its share; elsewhere only thread 0 does, and a step is only queued. Steps return nothing: a machine that
 * can fail notes the first failure, does nothing from then on, and reports it at the end of the pass. */
#ifndef MACHINE_H
#define MACHINE_H

#include "pass.h"

struct recurrence;
struct work;

struct machine {
    const char *name;
    /* x += the results that wait for it; norm(x), floats and 8 bits. */
    struct tokens (*norm)(struct pass *p, const struct block *waits, struct vector weight, struct vector bias,
                          bool keep_input, int thread);
    /* Rows of n values: their norm, in place and in 8 bits; only their 8 bits. */
    void (*norm_rows)(struct pass *p, struct tokens in, int n, struct vector weight, int thread);
    void (*quantize)(struct pass *p, struct tokens in, int n, int thread);
    /* Products side by side; the first half of a feed-forward. */
    void (*multiply)(struct pass *p, const struct product *list, int n, int thread);
    void (*gate_up)(struct pass *p, const struct gate_up *job, int thread);
    void (*gate)(struct pass *p, const struct gating *g, int thread);
    /* Attention: norms and turns, K and V to the arena; the same of compressed attention; what the queries
     * see. */
    void (*place)(struct pass *p, const struct block *b, const struct heads *w, int thread);
    void (*compress)(struct pass *p, const struct block *b, const struct latents *w, int thread);
    void (*attend)(struct pass *p, const struct queries *a, int thread);
    /* Blocks with a state, between their products. */
    void (*recur)(struct pass *p, const struct block *b, const struct recurrence *r, const struct work *w,
                  struct tokens out, int thread);
    void (*short_conv)(struct pass *p, const struct block *b, const struct work *w, struct tokens out,
                       int thread);
    /* A whole block of experts. */
    void (*experts)(struct pass *p, const struct block *b, struct tokens in, struct sink out, int thread);
    /* Inputs of each layer, from the projections; rows times a vector, floats and 8 bits;
     * out (+)= in + norm(y). */
    void (*join_per_layer)(struct pass *p, float *projected, int thread);
    void (*scale_rows)(struct pass *p, struct tokens in, struct vector by, struct tokens out, int thread);
    void (*add_normed)(struct pass *p, struct tokens in, float *y, struct vector norm, struct sink out,
                       int thread);
    /* AltUp's blocks, after their products. */
    void (*altup)(struct pass *p, const struct block *b, struct sink out, int thread);
    /* Row p->out[i].tok of each list becomes row i; hidden states to whom they are
     * for; logits, and p->best. */
    void (*keep)(struct pass *p, const struct rows *rows, int n, int thread);
    void (*give)(struct pass *p, struct tokens in, int thread);
    void (*head)(struct pass *p, struct tokens in, int thread);
    /* What follows sees all that was written. */
    void (*end)(const struct pass *p, int thread, enum bmc_step step);
};

extern const struct machine cpu_machine;

#endif
