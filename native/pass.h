/* One pass over the weights: its tokens, its buffers, and the steps that blocks are made of.
 *
 * All threads walk through the same steps, each does its share, and a barrier stands wherever a step
 * reads what another thread wrote. No sum is ever split between threads, so their number changes nothing.
 * Shapes are (tokens, values). */
#ifndef PASS_H
#define PASS_H

#include "model.h"

/* A token of the pass. */
struct place {
    bmc_session *session;
    int32_t token, pos;
    int32_t last;                   /* as in bmc_span */
    int32_t end;                    /* rows that it sees: up to itself, or the whole text */
    const float *before;            /* as in bmc_span */
};

/* Whether an id is chosen after a span's wanted tokens, or something is told of their logits; where not even
 * these are asked for, the head does not run. */
static inline bool span_chooses(const bmc_span *s) { return s->next || s->logprob || s->n_top || s->given; }
static inline bool span_has_logits(const bmc_span *s) { return s->logits || span_chooses(s); }

/* A token whose results are wanted, or whose hidden state is kept. */
struct wanted {
    const bmc_span *span;
    int tok, row;                   /* which token of the pass, which row of the span's results */
    bool chooses;                   /* the head runs for it */
    float *hidden, *kept;           /* where its hidden state goes, or NULL: the span's row, the session's */
    float *logits;                  /* where to, or NULL */
    const uint32_t *mask;           /* allowed ids, or NULL */
};

/* What is left of HEAD_ROWS logits: the largest and its id; seen, what the head that ran takes it
 * for (a coarse one errs, and then the true logit is looked up); and the sum of e^(logit - seen)
 * over what that head saw. */
struct best { float logit, seen, sum; int32_t id; };

/* Neighbouring tokens of a session, in models whose blocks keep states. */
struct run { bmc_session *session; int first; struct state_run states[PLACES]; };

struct pass {
    bmc_model *model;
    int n_tok, n_out;
    int n_choosing;                 /* of those that are wanted, for which the head runs */
    int n_sampled;                  /* .. with a row of the buffers */
    bool chunk;                     /* it is a chunk of a prompt, and products on a GPU are by cuBLAS */
    bool coarse;                    /* only the best ids are wanted:
                                       chosen among the few that the coarse head likes best */
    struct place *at;               /* (n_tok,) */
    struct wanted *out;             /* (n_out,) */
    struct run *runs;               /* (n_runs,) */
    int n_runs;
    struct best *best;              /* (n_out, parts of HEAD_ROWS) */
    float *given;                   /* (n_out,) logits of the ids in bmc_span.given */
    const struct machine *machine;  /* where its blocks run now */
    const struct buffers *buffers;  /* there */
};

/* Tokens that every thread norms for itself: sooner done than waited for. */
enum { FEW = 8 };

/* What one pass works on; (n, d) are n rows of d floats, row strides rounded up to 16. */
struct buffers {
    float *x;                       /* (pass_max, dim) the residual stream */
    float *y[2];                    /* (pass_max, dim) results of blocks that are not
                                       added to x as they are */
    float *input;                   /* (pass_max, dim) the input of the layer,
                                       for routers that read it; or NULL */
    float *kept;                    /* (pass_max, kept_stride) what blocks keep of each token
                                       for later ones; or NULL */
    size_t kept_stride;
    float *xb;                      /* (pass_max, dim) normed */
    float *own_xb;                  /* (threads, FEW, dim) normed by each thread for itself */
    struct act_block *act;          /* xb in 8 bits: tiles of columns */
    struct act_block *own_act;      /* (threads, FEW * dim / 32) own_xb in 8 bits */
    float *per_layer;               /* (pass_max, layers * per_layer_dim) */
    float *work;                    /* (pass_max, work_floats) what a block needs between its steps */
    struct act_block *work_act;     /* (pass_max, work_blocks) */
    int32_t *work_ids;              /* (pass_max * work_ids,) */
    float *cos, *sin;               /* (n_ropes, pass_max, turns) */
    int turns;                      /* the largest dim / 2 of the rope tables */
    float *rows;                    /* (SAMPLED_MAX, vocab_size) logits that are sampled
                                       from and not asked for */
    float *altered;                 /* (threads, vocab_size) logits with bias, penalties and mask */
    float *scratch;                 /* (threads, scratch_stride) */
    size_t scratch_stride;
    float *parts;                   /* sums of chunks that wait to be merged */
    atomic_int *pieces_done;        /* (threads * TASKS_EACH,) of each task */
    void *memory;
    size_t bytes;
};

/* n tokens: rows of floats, and the same in 8 bits, as tiles of columns. wide > 0: the rows have that many
 * values, and a product reads those from `from` on, both whole blocks of 32 where it reads 8 bits. */
struct tokens { float *x; struct act_block *act; int n; int wide, from; };

/* Where a block's result goes: rows of dim floats; add: to what is there. */
struct sink { float *y; bool add; };

/* What a kind of block needs in buffers. */
struct need {
    size_t floats, blocks, ids;     /* of work, work_act and work_ids, for each token of a pass */
    size_t kept;                    /* floats for each token, which stay until the end of the pass */
    size_t scratch;                 /* floats, for each thread */
};

/* A kind of block: native/layers/ has a file for each, which ends with this. */
struct role;
struct kind {
    const char *name;
    const struct role *roles;       /* its tensors; the last has no name */
    int (*check)(const bmc_model *m, const bmc_block *c);           /* settings; 0, or a failure */
    /* The sizes that its tensors' shapes are made of. */
    void (*measure)(const bmc_model *m, const bmc_block *c, int64_t *extent);
    struct need (*need)(const bmc_model *m, const struct block *b);
    bool mixes;                     /* tokens see others */
    /* The next two are NULL where a kind needs neither. */
    const char *(*missing)(const struct block *b);      /* a needed tensor that is not in the file, or NULL */
    void (*stream)(bmc_model *m, struct block *b);      /* asks for rows or a state in every session */
    void (*run)(struct pass *p, const struct block *b, struct tokens in, struct sink out, int thread);
};
extern const struct kind attention_kind, mla_kind, delta_net_kind, mamba2_kind, short_conv_kind;
extern const struct kind dense_kind, experts_kind, per_layer_kind, laurel_kind;
extern const struct kind altup_begin_kind, altup_predict_kind, altup_correct_kind, altup_end_kind;
const struct kind *kind_find(int kind);         /* NULL */

/* Tensors of a kind. A matrix may come with biases (rows,) and factors, one float, also of each expert. */
enum form { VECTOR, MATRIX, MATRICES, TRANSPOSED };
struct role {
    const char *name;
    size_t offset;                  /* IN_BLOCK */
    enum form form;
    enum extent rows, cols;
    bool required;
    enum extent count;              /* of MATRICES; 0: EXPERTS */
};
#define IN_BLOCK(field) offsetof(struct block, field)

int forward(struct pass *pass);     /* 0, or the failure of a GPU */

/* Steps. */

static inline void note(const struct pass *p, int thread, enum bmc_step step) {
    if (p->model->profile.laps)
        lap(&p->model->profile.laps[thread], step);
}

/* Ends a step: nobody goes on before all have done their share of it. */
static inline void barrier(const struct pass *p, int thread, enum bmc_step step) {
    note(p, thread, step);
    pool_barrier(p->model->pool);
    note(p, thread, BMC_STEP_WAIT);
}

static inline void share(const struct pass *p, int thread, int64_t n, int64_t *from, int64_t *to) {
    pool_share(p->model->pool, thread, n, 1, from, to);
}

static inline float *scratch_of(const struct pass *p, int thread) {
    return p->model->buffers->scratch + (size_t)thread * p->model->buffers->scratch_stride;
}

/* y = norm(x); a vector that the model does not have is neutral. y may be x. */
static inline void norm_row(const bmc_model *m, float *y, const float *x, struct vector weight,
                            struct vector bias, int n) {
    (m->c.norm == BMC_NORM_RMS ? m->k.rmsnorm : m->k.layernorm)(y, x, weight.v, bias.v, n, m->c.norm_eps);
}

/* Products: linear.c. */

struct product {                    /* y = W x, or y += W x; y (n, n_rows) */
    const struct matrix *w;
    struct tokens in;
    float *y;
    size_t y_stride;
    bool add;
};
static inline struct product product(const struct matrix *w, struct tokens in, float *y) {
    return (struct product){ w, in, y, padded(w->n_rows), false };
}
static inline struct product product_into(const struct matrix *w, struct tokens in, struct sink out) {
    return (struct product){ w, in, out.y, padded(w->n_rows), out.add };
}

/* Products side by side, those without weights left out; one product, all of it by this thread. */
void multiply(struct pass *p, const struct product *list, int n, int thread);
void multiply_alone(const struct pass *p, const struct product *r, int thread);

/* Blocks [from, to) of 32 values of a row; all rows, shared out. */
void quantize(const struct pass *p, struct tokens in, int k, int tok, int from, int to);
void quantize_rows(struct pass *p, struct tokens in, int k, int thread);

/* A gated feed-forward's first half: hidden = act(W_gate x) * W_up x, floats in `up` and 8 bits.
 * gate.data NULL: act(W_up x). */
struct gate_up {
    const struct matrix *gate, *up;
    struct tokens in;
    float *gate_out;
    struct tokens hidden;           /* x: W_up's result, and then the product's */
    int act;
    const float *param;
};
int gate_up_groups(const struct gate_up *job);              /* in how many parts it can be done */
void gate_up(const struct pass *p, const struct gate_up *job, int from, int to, int thread);
void gate_up_all(struct pass *p, const struct gate_up *job, int thread);

/* The rest of a feed-forward's first half after its products: out = act(gate) * up, floats and 8 bits, rows
 * of n values. sparsity > 0: only gates above their row's mean + sparsity * its standard deviation count.
 * In layers/dense.c. */
struct gating {
    float *gate;                    /* (tokens, n); sparse ones change */
    const float *up;                /* (tokens, up_stride) */
    size_t up_stride;
    struct tokens out;              /* x may be gate, or up */
    int n, act;
    const float *param;
    float sparsity;
};
void gate_rows(struct pass *p, const struct gating *g, int thread);

/* Groups [from, to) of rows of W times tokens, into `part` (n, (to - from) GROUP_ROWS): for those who
 * add them up themselves. */
enum { GROUP = 4, GROUP_ROWS = GROUP * 16 };
int n_groups(const struct matrix *w);
int stretch(const struct matrix *w, int n_tok, int groups);       /* how many are best done at a time */
void multiply_groups(const struct pass *p, const struct matrix *w, struct tokens in, int from, int to,
                     float *part, int thread);

/* Panels [from, to) of a matrix, and one tile of tokens times them: for the head, which looks at logits
 * while they are cached. */
struct matrix slice(const struct pass *p, const struct matrix *w, int from, int to, int thread, int room);
void project(const struct pass *p, const struct product *r, const struct matrix *part, int row, int tile);
int tile_width(int n_tok);

/* Rows of keys and values, or a state, in every session for a block: called by its kind's stream(). */
void add_rows(bmc_model *m, struct block *b, int n_heads, int k_dim, int v_dim);
void add_state(bmc_model *m, struct block *b, struct state_size size);

static inline uint16_t *tile_of(const bmc_session *s, const struct block *b, int head, int tile) {
    return arena_tile(&s->arenas[b->rows], b->stream, head, tile);
}

/* Rows of an attention block in the work buffer: layers/attention.c. */
struct heads { float *q, *k, *v, *gate, *out; };
void place_heads(struct pass *p, const struct block *b, const struct heads *w, int thread);
/* A head's first values, by the token's position. */
void turn(const struct pass *p, const struct block *b, float *head, int t);

/* Rows of a block of compressed attention: layers/mla.c. */
struct latents { float *q_a, *q, *kv, *nope, *query, *sum, *out; };
void place_latents(struct pass *p, const struct block *b, const struct latents *w, int thread);

/* What a query is multiplied by. */
float query_scale(const struct block *b, int pos);

/* Attention over rows of the cache: attend.c. */

struct queries {
    const struct block *block;      /* whose window, scale and sinks */
    const struct block *rows;       /* whose rows are read */
    const float *q;                 /* (tokens, q_stride) */
    size_t q_stride, q_pitch;       /* floats from head to head */
    int k_dim, v_dim;
    int shared;                     /* 1: values are the first v_dim of the keys, and rows have keys only */
    struct tokens out;              /* (tokens, n_heads * v_dim) */
    const float *gate;              /* (tokens, gate_stride) or NULL */
    size_t gate_stride, gate_pitch; /* gate_pitch 1: one for each head */
    int gate_act;
};
void attend_all(struct pass *p, const struct queries *a, int thread);
size_t attend_scratch(const struct block *b, int v_dim);    /* floats, for each thread */
float attend_slope(const bmc_block *c, int head);           /* ALiBi's */

/* A row of floats for each token. stride 0: there are none. */
struct rows { float *x; size_t stride; };

/* After the last block that mixes tokens, the pass goes on with those that are wanted. Blocks that still have
 * to do with their tokens call it as soon as their keys and values are stored; own: rows of theirs. */
void keep_wanted(struct pass *p, const struct block *b, const struct rows own[2], int thread);
void pass_kept(struct pass *p);     /* rows have moved: token i is the one of out[i] */

/* x += what waits for it: steps_cpu.c. */
void settle_rows(struct pass *p, const struct block *waits, int thread);

/* Vectors of every layer for each token. Their rows of the table come from the file, to the CPU's buffers;
 * inputs are made of them and of x where the first block runs: layers/per_layer.c. */
void per_layer_rows(const struct pass *p, int thread);
void per_layer_inputs(struct pass *p, int thread);
struct per_layer_factors { float projected, row, sum; };       /* what each of them is multiplied by */
struct per_layer_factors per_layer_factors(const bmc_model *m);

/* Steps of these on the CPU: per_layer.c; rows times a vector; laurel.c: out (+)= in + norm(y), y changes. */
void join_per_layer(struct pass *p, float *projected, int thread);
void scale_rows(struct pass *p, struct tokens in, struct vector by, struct tokens out, int thread);
void add_normed_rows(struct pass *p, struct tokens in, float *y, struct vector norm, struct sink out,
                     int thread);

/* AltUp: what a block does with the versions of x once its products are there; y is added to the other
 * versions of a token's x: layers/altup.c. */
void altup_step(struct pass *p, const struct block *b, struct sink out, int thread);
void altup_add(const bmc_model *m, int n_altup, const float *y, int64_t t);

/* A block of experts on the CPU: layers/experts.c. */
void run_experts(struct pass *p, const struct block *b, struct tokens in, struct sink out, int thread);

/* The head: head.c. */
/* Hidden states to whom they are for. */
void give_hidden(struct pass *p, struct tokens in, int thread);
/* Logits where they are asked for, and p->best. */
void head(struct pass *p, struct tokens in, int thread);
/* Ids and log-probabilities, from these. */
void choose_ids(const struct pass *p, int thread);

#endif
