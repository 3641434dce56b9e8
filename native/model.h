/* A model as the forward pass sees it: settings, weights in panels, and the buffers of a pass. */
#ifndef MODEL_H
#define MODEL_H

#include "arena.h"
#include "bmc.h"
#include "fork.h"
#include "kernels.h"
#include "profile.h"
#include "threads.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

/* A weight matrix (n_rows, n_cols). data is the file's; codes and scales are its panels, NULL where they are made anew in
 * every pass. */
struct matrix {
    int type;
    bool mapped;                    /* data's pages can be given back */
    int64_t n_rows, n_cols;
    const uint8_t *data;
    uint8_t *codes, *scales;
    size_t code_stride, scale_stride;
    const float *bias;              /* (n_rows,) or NULL */
};

/* A tensor that is NULL (a matrix whose data is NULL) is a step that this model does not take. */
struct layer {
    const float *attn_norm, *attn_norm_bias;
    struct matrix attn_q, attn_k, attn_v, attn_output;
    const float *attn_q_norm, *attn_k_norm;             /* (head_dim,) each head's own norm */
    const float *attn_post_norm;                        /* before the residual sum */
    const float *ffn_norm, *ffn_norm_bias;
    struct matrix ffn_gate, ffn_up, ffn_down;
    const float *ffn_post_norm;
    int window;                     /* rows a token sees, itself included; 0 = all */
    int rope;                       /* which table of frequencies */
};

/* Tokens in one pass over the weights, and of them those whose next is sampled; logits at a time; tasks that keep a
 * thread busy to the end; floats for the sums of chunks whose task is cut; panels made at a time where none are kept. */
enum { PASS_MAX = 512, SAMPLED_MAX = 64, HEAD_ROWS = 256, TASKS_EACH = 8, PART_FLOATS = 4 << 20, ROOM_PANELS = 16 };

/* Weights of a head that a coarse one is worth its memory for: from here on it is read from memory for each token. */
enum { COARSE_LEAST = 1 << 24 };

struct bmc_model {
    bmc_config c;
    struct kernels k;
    struct pool *pool;
    pthread_mutex_t lock;           /* one pass at a time */
    struct forkable forkable;
    atomic_int n_users;             /* its owner and its sessions: the last one to go frees it */

    struct matrix token_embd;       /* rows are read from the file, one a token */
    struct matrix position_embd;
    const float *output_norm, *output_norm_bias;
    struct matrix output;
    struct matrix coarse;           /* the same in two bits a weight, for drafts; codes NULL: there is none */
    struct layer *layers;           /* (n_layers,) */
    int q_dim, kv_dim, v_dim;       /* heads * head_dim; KV heads * head_dim; head_dim rounded up to 16 */

    void *panels;                   /* all panels, in huge pages */
    size_t panel_bytes;             /* of the file's rows, where there are none */
    void *coarse_panels;
    size_t coarse_bytes;
    char *rooms;                    /* instead of panels: ROOM_PANELS of a matrix, twice for each thread */
    size_t room_bytes, rooms_bytes; /* of one, of all */
    _Atomic int64_t packed;         /* bytes of them that are made */
    struct { void **items; int n; } owned;      /* small arrays: norms, biases, tables */
    struct buffers *buffers;
    struct profile profile;
};

struct bmc_session {
    bmc_model *model;
    struct arena arena;
    int position;                   /* rows in use */
    int32_t *tokens;                /* (n_tokens,) the first `position` of them are those of the rows */
    int n_tokens;
    int offset;                     /* tokens of the text before the first row: a draft model may read the end of a text only */
    int rope;                       /* 1: table 1 for every layer */
    atomic_flag busy;
};

/* What one pass works on; (n, d) are n rows of d floats, row strides rounded up to 16. */
enum { FEW = 8 };                   /* tokens that every thread norms for itself: sooner done than waited for */

struct buffers {
    float *x;                       /* (PASS_MAX, dim) the residual stream */
    float *xb;                      /* (PASS_MAX, max(dim, q_dim)) normed, or attention's result */
    float *own_xb;                  /* (threads, FEW, dim) normed by each thread for itself */
    float *y;                       /* (PASS_MAX, dim) what a post norm reads */
    float *q, *k, *v;               /* (PASS_MAX, q_dim), (.., kv_dim), (.., kv_dim) */
    float *gate, *up;               /* (PASS_MAX, hidden_dim) */
    struct act_block *act;          /* xb in 8 bits: tiles of columns */
    struct act_block *own_act;      /* (threads, FEW * dim / 32) own_xb in 8 bits */
    struct act_block *hidden_act;   /* up in 8 bits */
    float *cos, *sin;               /* (2, PASS_MAX, rope_dim / 2) */
    float *rows;                    /* (SAMPLED_MAX, vocab_size) logits that are sampled from and not asked for */
    float *altered;                 /* (threads, vocab_size) logits with bias, penalties and mask */
    float *scratch;                 /* (threads, scratch_stride) */
    size_t scratch_stride;
    float *parts;                   /* sums of chunks that wait to be merged */
    atomic_int *pieces_done;        /* (threads * TASKS_EACH,) of each task */
    void *memory;
    size_t bytes;
};

/* What is left of HEAD_ROWS logits: the largest and its id; seen, what the head that ran takes it for (a coarse one errs, and then
 * the true logit is looked up); and the sum of e^(logit - seen) over what that head saw. */
struct best { float logit, seen, sum; int32_t id; };

/* One pass: up to PASS_MAX tokens of any sessions. */
struct pass {
    bmc_model *model;
    int n_tok;
    int n_out;                      /* tokens whose logits are wanted */
    bool coarse;                    /* only the best id is: chosen among the few that the coarse head likes best */
    bmc_session *session[PASS_MAX];
    int32_t token[PASS_MAX], pos[PASS_MAX];
    int32_t last[PASS_MAX];         /* as in bmc_span */
    int32_t out[PASS_MAX];          /* (n_out,) which tokens */
    float *logits[PASS_MAX];        /* (n_out,) where to, or NULL */
    int n_sampled;                  /* of them, those with a row of the buffers */
    const bmc_span *out_span[PASS_MAX];     /* (n_out,) whose results */
    int out_row[PASS_MAX];                  /* (n_out,) and which row of them */
    const uint32_t *mask[PASS_MAX];         /* (n_out,) allowed ids, or NULL */
    struct best *best;              /* (n_out, parts of HEAD_ROWS) */
    float *given;                   /* (n_out,) logits of the ids in bmc_span.given */
};

void forward(struct pass *pass);

/* bmc_eval; coarse: the best ids of wanted rows are looked for with the coarse head, where the model has one. */
int evaluate(const bmc_span *spans, int n_spans, bool coarse);
void model_release(bmc_model *model);       /* one user less */

static inline int head_parts(const bmc_model *m) { return (m->c.vocab_size + HEAD_ROWS - 1) / HEAD_ROWS; }

static inline size_t file_row_bytes(const struct matrix *w) {
    const struct type *type = type_find(w->type);
    return (size_t)(w->n_cols / type->block_size) * (size_t)type->type_size;
}

/* A buffer's row stride in floats. */
static inline size_t padded(int n) { return ((size_t)n + 15) / 16 * 16; }

#endif
