/* A model as the forward pass sees it: blocks with their weights, and the buffers of a pass. */
#ifndef MODEL_H
#define MODEL_H

#include "arena.h"
#include "bmc.h"
#include "fork.h"
#include "kernels.h"
#include "panels.h"
#include "profile.h"
#include "state.h"
#include "threads.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

/* A weight matrix (n_rows, n_cols). data is the file's; codes and scales are its panels, NULL where they are
 * made anew in every pass. A matrix whose data is NULL is one that the model does not have. */
struct matrix {
    int type;
    bool mapped;                    /* data's pages can be given back */
    bool on_gpu;                    /* codes, scales and bias are addresses of a GPU */
    int64_t n_rows, n_cols;
    const uint8_t *data;
    bool late;                      /* its panels are made in a pass that reads them: resident.h */
    uint8_t *codes, *scales;
    size_t code_stride, scale_stride;
    const float *bias;              /* (n_rows,) or NULL */
    float factor;                   /* of the product, before the bias; 0 = none */
};

/* One for each expert, or NULL. */
struct matrices { struct matrix *of; };

/* A small array as floats; v NULL: the model does not have it. */
struct vector { const float *v; int n_rows, n_cols; };

struct attention {
    struct matrix q, k, v, output, gate;
    struct matrix q_a, q_b, kv_a;                       /* MLA */
    struct matrices k_b, v_b;                           /* of each head */
    struct vector q_norm, k_norm;                       /* (k_dim,), (n_heads, k_dim) or,
                                                           of all heads together, (n_heads k_dim,) */
    struct vector q_norm_bias, k_norm_bias;
    struct vector q_a_norm, kv_a_norm;
    struct vector sinks;                                /* (n_heads,) one more score of
                                                           each head, without a value */
};

struct recurrent {
    struct matrix qkv, gate, alpha, beta, in, out;      /* delta net:
                                                           the first four and out; others: in and out */
    struct vector conv, conv_bias;                      /* (conv, channels): transposed when it is bound */
    struct vector dt_bias, a, d, norm;
};

struct dense { struct matrix gate, up, down; };

struct experts {
    struct matrix router;
    struct vector router_scale, choice_bias;            /* (dim,) with BMC_ROUTE_SCALED;
                                                           (n_experts,) added for the choice only */
    struct matrices gate, up, down;
    int number;                                         /* of the first, counted over all blocks */
    struct dense shared;
    struct matrix shared_gate;                          /* (1, dim) */
    struct matrix latent_down, latent_up;
};

struct per_layer {
    struct matrix gate, proj;
    struct vector scale;                                /* (dim,) x is multiplied by it,
                                                           where the model has it */
};

struct laurel { struct matrix l, r; struct vector norm; };

struct altup {
    struct matrices proj;                               /* (dim, dim) of each version but
                                                           the first: begin and end */
    struct matrix router;                               /* (n_altup, dim): prediction and correction */
    struct vector coef;                                 /* (n_altup^2, n_altup) or (n_altup, n_altup) */
};

/* Sizes that shapes are made of; each block has its own. */
enum extent {
    ONE, DIM, TWO_DIM, K_DIM, V_DIM, HEADS, Q, QUERY, K, V, O, GATE, VOCAB, CTX, PER_LAYER_DIM, PER_LAYERS,
    Q_RANK, KV_RANK, KV_A, NOPE, K_B, V_B,
    CONV, CHANNELS, STATE, INNER, GROUPS, IN, GROUP_DIM,
    HIDDEN, EXPERTS, EXPERT_IN, SHARED, LATENT,
    VERSIONS, OTHERS, PAIRS, EXTENTS
};

struct block {
    bmc_block c;
    const struct kind *kind;
    int number;
    int64_t extent[EXTENTS];
    struct vector norm, norm_bias, post_norm, post_norm_bias;
    struct vector sum_norm;                             /* of the sum of blocks side by side */
    struct vector out_norm, out_norm_bias;              /* x becomes its norm after the sum */
    struct vector out_scale;                            /* (1,) x is multiplied by it at the end */
    int rows;                                           /* which arena its rows are in:
                                                           ALL_ROWS .. GPU_WINDOWS */
    int stream;                                         /* there, or of the states of its place; -1: none */
    union {
        struct attention attention;
        struct recurrent recurrent;
        struct dense dense;
        struct experts experts;
        struct per_layer per_layer;
        struct laurel laurel;
        struct altup altup;
    };
};

enum {
    PASS_MAX = 512,             /* tokens in one pass over the weights */
    WHOLE_MAX = 8192,           /* of a model that is not causal */
    SAMPLED_MAX = 64,           /* those of a pass whose next token is sampled */
    HEAD_ROWS = 256,            /* logits at a time */
    TASKS_EACH = 8,             /* tasks that keep a thread busy to the end */
    PART_FLOATS = 4 << 20,      /* for the sums of chunks whose task is cut */
    ROOM_PANELS = 16,           /* panels made at a time where none are kept */
};

_Static_assert((int)BMC_PROMPT_CHUNK <= (int)PASS_MAX, "a chunk is a pass");

/* Keys and values of blocks that see all rows, and of those that see a window: of the latter, rows that are
 * WINDOW_SPARE behind the window are given back. GPU_: the same of blocks that are on a GPU. */
enum { ALL_ROWS, WINDOWS, GPU_ROWS, GPU_WINDOWS, ARENAS };
enum { WINDOW_SPARE = 1024 };

/* Where states are: those of blocks on the CPU, and of blocks on a GPU. */
enum { HERE, ON_GPU, PLACES };

/* Weights of a head that a coarse one is worth its memory for: from here on it is read from
 * memory for each token. */
enum { COARSE_LEAST = 1 << 24 };

struct bmc_model {
    bmc_config c;
    struct kernels k;
    struct pool *pool;
    pthread_mutex_t lock;           /* one pass at a time */
    struct forkable forkable;
    atomic_int n_users;             /* its owner and its sessions: the last one to go frees it */

    int64_t extent[EXTENTS];
    struct matrix token_embd;       /* rows are read from the file, one a token */
    struct matrix position_embd, token_types;
    struct matrix per_layer_embd, per_layer_proj;
    struct vector per_layer_norm;
    struct vector embd_norm, embd_norm_bias;
    struct vector output_norm, output_norm_bias;
    struct matrix output;
    bmc_model *target;              /* NULL, or this is its draft head, and one of its users */
    struct matrix eh_proj;
    struct vector enorm, hnorm;
    struct matrix coarse;           /* the same in two bits a weight, for drafts; codes NULL: there is none */
    struct block *blocks;           /* (c.n_blocks,) */
    int last_mixer;                 /* after its rows are stored only tokens that are asked for go on */
    int pass_max;                   /* tokens in one pass */
    int n_streams[ARENAS], n_states[PLACES];
    struct arena_stream *streams[ARENAS];
    int window;                     /* the largest of blocks that do not see everything */
    struct state_size *state_sizes[PLACES];
    int64_t row_bytes[ARENAS];      /* keys and values of one token */

    void *panels;                   /* all panels but those that are made late, in huge pages */
    size_t panel_bytes;             /* of the file's rows, where there are none */
    void *coarse_panels;
    size_t coarse_bytes;
    size_t early_bytes;             /* mapped for them */
    struct residents *residents;    /* where late ones are; NULL: there are none */
    char *rooms;                    /* for matrices without panels:
                                       ROOM_PANELS of one, twice for each thread */
    size_t room_bytes, rooms_bytes; /* of one, of all */
    _Atomic int64_t packed;         /* bytes of them that are made */
    struct { void **items; int n; } owned;      /* small arrays: norms, biases, tables */
    struct buffers *buffers;
    struct cuda *cuda;              /* NULL, or its last blocks and the head are on a GPU */
    struct cuda_stage *stage;       /* NULL, or long passes of the blocks on the CPU multiply on a GPU */
    const char *cublas;             /* NULL, or whole chunks of prompts are by cuBLAS
                                       there: its file, or "" */
    struct profile profile;
};

/* Tokens whose hidden states a session keeps for a draft head. */
enum { HIDDEN_KEPT = 512 };

struct bmc_session {
    bmc_model *model;
    struct arena arenas[ARENAS];
    int64_t cap;                    /* rows at most */
    struct states states[PLACES];
    int position;                   /* rows in use */
    int32_t *tokens;                /* (n_tokens,) the first `position` of them are those of the rows */
    int n_tokens;
    int offset;                     /* tokens of the text before the first row:
                                       a draft model may read the end of a text only */
    int rope;                       /* 1: table 1 for every layer */
    int unchanged;                  /* rows before it are those of the last bmc_session_mark */
    struct {
        float *rows;                /* (HIDDEN_KEPT, dim) the state of position p is row p %
                                       HIDDEN_KEPT; NULL: none are kept */
        int from;                   /* those of positions from .. position - 1 are there */
    } hidden;
    atomic_flag busy;
};

int model_bind(bmc_model *m, const bmc_tensor *t);
int model_check_bound(const bmc_model *m);
/* Those with panels. */
void model_each_matrix(bmc_model *m, void (*fn)(struct matrix *, void *), void *arg);
void model_extents(bmc_model *m);
/* Pages of the file are given back. */
void model_make_panels(const struct matrix *w, int64_t from, int64_t to);
void model_streams(bmc_model *m);               /* rows and states of all blocks, where they are now */
void model_measure(bmc_model *m);               /* bytes of panels, of those that are here */
/* By all threads. */
void model_pack_panels(bmc_model *m, const struct matrix *file, struct matrix *panels);
void *model_own(bmc_model *m, size_t bytes);    /* zeroed memory that lives as long as the model; NULL */
void model_release(bmc_model *model);           /* one user less */

/* bmc_eval; coarse: the best ids of wanted rows are looked for with the coarse head,
 * where the model has one. */
int evaluate(const bmc_span *spans, int n_spans, bool coarse);

static inline int head_parts(const bmc_model *m) { return (m->c.vocab_size + HEAD_ROWS - 1) / HEAD_ROWS; }

static inline size_t file_row_bytes(const struct matrix *w) {
    const struct type *type = type_find(w->type);
    return (size_t)(w->n_cols / type->block_size) * (size_t)type->type_size;
}

/* A buffer's row stride in floats. */
static inline size_t padded(int64_t n) { return ((size_t)n + 15) / 16 * 16; }

static inline float *hidden_row(const bmc_session *s, int position) {
    return s->hidden.rows + (size_t)(position % HIDDEN_KEPT) * padded(s->model->c.dim);
}

static inline int64_t matrix_panels(const struct matrix *w) {
    return (w->n_rows + PANEL_ROWS - 1) / PANEL_ROWS;
}

static inline int smaller(int a, int b) { return a < b ? a : b; }
static inline int larger(int a, int b) { return a > b ? a : b; }

#endif
