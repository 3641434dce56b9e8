/* What each kernel of kernels.cu is launched with: one struct, passed by value, and the grid that it needs.
 *
 * Plain C, for the host, and C++, for the kernels. Pointers are addresses of the device. A launch is
 *
 *     struct cuda_grid g = norm_grid(&args);
 *     void *list[] = { &args };
 *     cuLaunchKernel(find("norm_tokens"), g.x, g.y, g.z, g.threads, 1, 1, 0, stream, list, NULL);
 *
 * Shared memory is static. Blocks of a launch never wait for each other; launches of a stream run in their
 * order. Each result is, bit for bit, that of the CPU's kernels.
 *
 * Rows of floats are (tokens, stride), strides in floats and multiples of 16, as in struct buffers. Rows in 8
 * bits are one tile: block b of token t is act[b * act_stride + t], act_stride at least the number of
 * tokens. */
#ifndef CUDA_ARGS_H
#define CUDA_ARGS_H

#include "../kernels.h"
#include "../panels.h"
#include "../sums.h"

struct cuda_grid { unsigned x, y, z, threads; };

static inline unsigned cuda_over(int64_t n, int64_t by) { return (unsigned)((n + by - 1) / by); }

/* A copy of rows, which is no launch: CUDA_MEMCPY2D of the driver. type: 1 host, 2 device; x, y, array:
 * unused. */
struct cuda_side { size_t x, y; int32_t type; uint64_t host, device; void *array; size_t pitch; };
struct cuda_copy2d { struct cuda_side from, to; size_t width, height; };

/* A token of the pass: struct place. */
struct cuda_token {
    int32_t pos, end, last;
    int32_t session;                /* which of the pass's sessions: an index of `rows` below */
    int32_t rope;                   /* the session's: 1: table 1 for every layer */
};

/* One arena of a session: struct arena. */
struct cuda_rows {
    char *const *segments;          /* (n_segments,) */
    int64_t segment_tiles;
};

/* ---- norms: one block of threads a row ---- */

/* A normalization: struct vector's values or NULL. */
struct cuda_weights { const float *weight, *bias; };

/* One block of threads a row is all there is: it has many where the row is long. */
enum { NORM_THREADS = 1024 };
static inline unsigned norm_threads(int dim) { return dim > 1536 ? NORM_THREADS : 256; }

/* "norm_tokens": what blocks left in y joins x (settle in steps_cpu.c), then out = norm(x), in floats and 8
 * bits. */
struct cuda_norm {
    int n_tok, dim;
    size_t stride;                  /* of x, y, input and out */
    float *x, *y[2];
    int n_waits;                    /* blocks whose results wait in y: 0, 1, or 2 side by side */
    struct cuda_weights post[2];    /* their post norms; weight NULL: none */
    float scale[2];                 /* 1: none */
    struct cuda_weights sum, result;        /* norms of their sum, of x after it; weight NULL: none */
    float result_scale;             /* 1: none */
    float *input;                   /* a copy of x goes there; NULL: none */
    struct cuda_weights norm;       /* weight NULL: out = x */
    float *out;
    struct act_block *act;          /* NULL: floats only */
    int act_stride;
    int kind;                       /* enum bmc_norm */
    float eps;
    float sum_scale;                /* of x, before the norm of the result; 1: none */
    float *others;                  /* n_others vectors of a token that what waits joins, not x; or NULL */
    size_t others_stride;
    int n_others;
};
static inline struct cuda_grid norm_grid(const struct cuda_norm *a) {
    return (struct cuda_grid){ (unsigned)a->n_tok, 1, 1, norm_threads(a->dim) };
}

/* "norm_rows": y = norm(x) * scale, also in place; rows (n_tok, n_parts) of n values each, part p at x + p *
 * pitch. Norms of all heads together, of latent values, of a router's input. */
struct cuda_norm_rows {
    int n_tok, n_parts, n;
    const float *x;
    float *y;
    size_t x_stride, y_stride, pitch;
    struct cuda_weights norm;       /* weight NULL: 1 */
    size_t weight_pitch;            /* floats from one part's weights to the next; 0: all have the same */
    float scale;                    /* 1: none */
    const float *factors;           /* (n,) multiplied at the end; NULL: none */
    int kind;
    float eps;
    struct act_block *act;          /* with n_parts 1; NULL: floats only */
    int act_stride;
};
static inline struct cuda_grid norm_rows_grid(const struct cuda_norm_rows *a) {
    return (struct cuda_grid){ (unsigned)a->n_tok, (unsigned)a->n_parts, 1, norm_threads(a->n) };
}

/* "quantize": n_blocks blocks of 32 values of each row. */
struct cuda_quantize {
    int n_tok, n_blocks;
    const float *x;
    size_t stride;
    struct act_block *act;
    int act_stride;
};
static inline struct cuda_grid quantize_grid(const struct cuda_quantize *a) {
    return (struct cuda_grid){ (unsigned)a->n_tok, cuda_over(a->n_blocks, 16), 1, 256 };
}

/* ---- products: struct panel_job, with any number of tokens ---- */

/* Entries of experts: a pass's (token, expert) pairs, sorted by expert, tokens ascending (sort in
 * experts.c). */
struct cuda_lists {
    const int32_t *used;            /* (n_slots,) experts that have tokens, ascending; -1 after the last */
    const int32_t *first;           /* (n_experts + 1,) where an expert's entries begin */
    const int32_t *tok;             /* (entries,) the token of each */
    int n_slots;                    /* blockIdx.z: at most min(n_experts, entries) experts have tokens */
    int most;                       /* entries of one expert at most: the tokens of the pass */
};

/* A second matrix of the same type and shape with the same columns, in the same launch: blockIdx.z 1. */
struct cuda_beside {
    const uint8_t *codes, *scales;  /* NULL: there is none */
    const float *bias;
    float factor;
    float *out;
};

struct cuda_product {
    const uint8_t *codes, *scales;  /* panels as the CPU has them */
    size_t code_stride, scale_stride;
    int n_rows, k, n_tok;
    const struct act_block *act;    /* quantized types */
    int act_stride;
    const float *x;                 /* float types */
    size_t x_stride;
    const float *bias;              /* (n_rows,) or NULL */
    float factor;                   /* of the product, before the bias; 0: none */
    float *out;                     /* out[tok * out_stride + row] */
    size_t out_stride;
    int add;
    struct cuda_beside beside;      /* not with experts */
    /* Experts: lists.used NULL: one matrix. Else matrix e begins e * expert_* further on, its columns are its
     * entries, and out is (entries, out_stride). gathers: act and x are the pass's tokens, found by
     * lists.tok; else they are entries too. */
    struct cuda_lists lists;
    int gathers;
    size_t expert_codes, expert_scales;     /* bytes */
    size_t expert_bias;                     /* floats */
    const float *factors;           /* (n_experts,) or NULL: factor */
};

/* Kernels of a product, by the number of tokens: a name is "<way>_<type>", as "narrow1_q4_k" or "floats_f16".
 * With lists the number that counts is `most`. mma: the device multiplies 8-bit matrices (compute
 * capability 8.0 and later); without it narrow kernels take all tokens, four at a time. */
enum cuda_way { NARROW1, NARROW2, NARROW4, WIDE8, WIDE16, WIDE32, TILES, FLOATS, FLOAT_TILES, CUDA_WAYS };

static inline const char *cuda_way_name(enum cuda_way way) {
    static const char *const names[CUDA_WAYS] = {
        "narrow1", "narrow2", "narrow4", "wide8", "wide16", "wide32", "tiles", "floats", "float_tiles",
    };
    return names[way];
}

static inline const char *cuda_type_name(int type) {
#define CUDA_TYPE_NAME(TYPE, name, ...) case TYPE: return #name;
    switch (type) { PANEL_TYPES(CUDA_TYPE_NAME) FLOAT_PANEL_TYPES(CUDA_TYPE_NAME) }
#undef CUDA_TYPE_NAME
    return NULL;
}

static inline int cuda_is_float(int type) {
    return type == TYPE_F32 || type == TYPE_F16 || type == TYPE_BF16;
}

static inline int product_columns(const struct cuda_product *a) {
    return a->lists.used ? a->lists.most : a->n_tok;
}

static inline enum cuda_way product_way(int type, const struct cuda_product *a, int mma) {
    const int n = product_columns(a);
    if (cuda_is_float(type))
        return n <= 16 ? FLOATS : FLOAT_TILES;
    if (n <= 2 || !mma)
        return n == 1 ? NARROW1 : n == 2 ? NARROW2 : NARROW4;
    return n <= 4 ? NARROW4 : n <= 8 ? WIDE8 : n <= 16 ? WIDE16 : n <= 64 ? WIDE32 : TILES;
}

/* Panels and tokens of a block of threads. */
struct cuda_tile { int panels, tokens; };
static inline struct cuda_tile product_tile(enum cuda_way way) {
    static const struct cuda_tile tiles[CUDA_WAYS] = {
        { 1, 1 }, { 1, 2 }, { 1, 4 }, { 1, 8 }, { 1, 16 }, { 1, 32 }, { 8, 64 }, { 1, 8 }, { 4, 64 },
    };
    return tiles[way];
}

static inline struct cuda_grid product_grid(enum cuda_way way, const struct cuda_product *a) {
    const struct cuda_tile tile = product_tile(way);
    return (struct cuda_grid){ cuda_over(a->n_rows, PANEL_ROWS * tile.panels),
                               cuda_over(product_columns(a), tile.tokens),
                               a->lists.used      ? (unsigned)a->lists.n_slots
                               : a->beside.codes ? 2
                                                 : 1,
                               way == FLOATS ? 128u : 256u };
}

/* ---- prompts by cuBLAS: products of rows in f16, halves.h ---- */

/* "halves_<type>": rows of panels as f16, of.n_rows of them, each multiplied by a power of two. Columns
 * beyond of.k are 0. */
struct cuda_halves {
    struct cuda_product of;         /* its codes, scales, n_rows and k, from the first panel on */
    uint16_t *out;                  /* (of.n_rows, stride), stride a multiple of 16 */
    size_t stride;
    float *powers;                  /* (of.n_rows,) what undoes the multiplication */
};
static inline struct cuda_grid halves_grid(const struct cuda_halves *a) {
    return (struct cuda_grid){ cuda_over(a->of.n_rows, PANEL_ROWS), 1, 1, 256 };
}

/* "halve_tokens": the same of tokens' activations. */
struct cuda_halve_tokens {
    int n_tok, k;
    const float *x;
    size_t x_stride;
    uint16_t *out;                  /* (n_tok, stride) */
    size_t stride;
    float *powers;                  /* (n_tok,) */
};
static inline struct cuda_grid halve_tokens_grid(const struct cuda_halve_tokens *a) {
    return (struct cuda_grid){ (unsigned)a->n_tok, 1, 1, 256 };
}

/* "finish": sums of the products of both, made a product's result. */
struct cuda_finish {
    int n_tok, n_rows;
    const float *sums;              /* (n_tok, sum_stride) */
    size_t sum_stride;
    const float *row_powers, *token_powers;
    const float *bias;              /* these five as in struct cuda_product */
    float factor;
    float *out;
    size_t out_stride;
    int add;
};
static inline struct cuda_grid finish_grid(const struct cuda_finish *a) {
    return (struct cuda_grid){ cuda_over((int64_t)a->n_tok * a->n_rows, 256), 1, 1, 256 };
}

/* ---- attention ---- */

/* "place": head norms, rope and scale of queries and keys; keys and values go to their tiles (attention.c:
 * place_heads). */
struct cuda_place {
    int n_tok, n_heads, n_kv_heads, k_dim, v_dim;
    float *q, *k, *v; /* k NULL: only queries (the block reads another's rows); v NULL: values are the keys */
    size_t q_stride, k_stride, v_stride, q_pitch;
    const struct cuda_token *at;    /* (n_tok,) */
    const struct cuda_rows *rows;   /* (sessions,) of the block's arena */
    int64_t before, tile_bytes;     /* struct arena_stream */
    const float *cos, *sin;         /* (n_ropes, rope_rows, turns) */
    int turns, rope_rows;
    const int32_t *rope_dims;       /* (n_ropes,) values that turn */
    int rope, rope_style, rope_late;
    struct cuda_weights q_norm, k_norm;     /* weight NULL: none */
    size_t q_norm_pitch, k_norm_pitch;      /* floats from head to head; 0: all have the same */
    int v_norm;                     /* 1: values are normed, without a weight */
    float scale;                    /* of queries */
    const float *scales;            /* (n_tok,) instead; NULL: scale */
    int kind;
    float eps;
};
static inline struct cuda_grid place_grid(const struct cuda_place *a) {
    return (struct cuda_grid){ (unsigned)a->n_tok, (unsigned)(a->n_heads + (a->k ? a->n_kv_heads : 0)), 1,
                               32 };
}

/* Queries side by side, of one session: at most ATTEND_ROWS / group of them, at least one. */
struct cuda_task { int32_t first, n; };     /* tokens */
enum { ATTEND_ROWS = 16 };
static inline int attend_tokens(int group) { return group < ATTEND_ROWS ? ATTEND_ROWS / group : 1; }

/* "attend": a task's queries over chunks of rows. direct: block (task, KV head, part of its group) goes
 * through all chunks in their order and ends with the result. Else blockIdx.z is where in the list of chunks
 * it begins, each chunk's sums go to `parts`, and "attend_merge", with the same arguments, adds them up in
 * order. Either way gives the same bits.
 *
 * n_chunks: chunks that the largest `end` of the pass needs, or more (a graph is captured for the rows
 * reserved). */
struct cuda_attend {
    int n_tasks, n_tok, n_heads, n_kv_heads, k_dim, v_dim;
    int shared;                     /* 1: values are the first v_dim of the keys, and tiles have keys only */
    const struct cuda_task *tasks;
    const struct cuda_token *at;
    const struct cuda_rows *rows;
    int64_t before, tile_bytes;
    const float *q;
    size_t q_stride, q_pitch;
    int window, causal;
    float softcap;                  /* 0: off */
    const float *slopes;            /* (n_heads,) ALiBi; NULL: off */
    const float *sinks;             /* (n_heads,) or NULL */
    int direct, n_chunks;
    float *parts;                   /* attend_parts() floats */
    float *out;                     /* (n_tok, out_stride): head h at h * v_dim */
    size_t out_stride;
    const float *gate;              /* (n_tok, gate_stride) or NULL: out *= f(gate) */
    size_t gate_stride, gate_pitch; /* gate_pitch 1: one for each head */
    int gate_act;                   /* enum bmc_act */
    struct act_block *act; /* where v_dim is whole blocks of 32; NULL: floats only, "quantize" follows */
    int act_stride;
};
static inline int attend_v_pad(const struct cuda_attend *a) { return (a->v_dim + 15) / 16 * 16; }
/* For each query (token, head) and chunk v_pad sums, the largest score and the sum of weights; direct: for
 * each query. */
static inline size_t attend_parts(const struct cuda_attend *a) {
    return (size_t)a->n_tok * (size_t)a->n_heads * (size_t)(a->direct ? 1 : a->n_chunks)
           * (size_t)(attend_v_pad(a) + 2);
}
static inline struct cuda_grid attend_grid(const struct cuda_attend *a) {
    const int group = a->n_heads / a->n_kv_heads;
    return (struct cuda_grid){ (unsigned)a->n_tasks, (unsigned)a->n_kv_heads * cuda_over(group, ATTEND_ROWS),
                               a->direct ? 1 : (unsigned)a->n_chunks, 256 };
}
static inline struct cuda_grid attend_merge_grid(const struct cuda_attend *a) {
    return (struct cuda_grid){ (unsigned)a->n_tok, (unsigned)a->n_heads, 1, 128 };
}

/* ---- the rest of a block ---- */

/* "activate": up = act(gate) * up, or act(up) where gate is NULL; floats in up, and 8 bits. With lists n_tok
 * is the number of entries. */
struct cuda_activate {
    int n_tok, dim, kind;           /* kind: enum bmc_act */
    float param[4];
    float *up;
    const float *gate;
    size_t stride, gate_stride;
    struct act_block *act;          /* NULL: floats only */
    int act_stride;
    const float *x;                 /* (n_tok, x_stride) multiplied instead of up; or NULL */
    size_t x_stride;
};
static inline struct cuda_grid activate_grid(const struct cuda_activate *a) {
    return (struct cuda_grid){ (unsigned)a->n_tok, cuda_over(a->dim, 512), 1, 256 };
}

/* "keep_rows": row i of x becomes what row tok[i] was, tok ascending (keep in steps_cpu.c). */
struct cuda_keep_rows {
    float *x;
    size_t stride;
    const int32_t *tok;
    int n;
};
static inline struct cuda_grid keep_rows_grid(const struct cuda_keep_rows *a) {
    return (struct cuda_grid){ cuda_over((int64_t)a->stride, 256), 1, 1, 256 };
}

/* "best": logits times `scale`, softcapped, in place; of each 256 of them what struct best says. */
struct cuda_best { float logit, seen, sum; int32_t id; };
struct cuda_best_of {
    int n_tok, vocab_size;
    float *logits;                  /* (n_tok, stride) */
    size_t stride;
    float scale, softcap;           /* 1: none, 0: none */
    struct cuda_best *best;         /* (n_tok, n_parts) parts of 256 */
};
static inline int best_parts(int vocab_size) { return (vocab_size + 255) / 256; }
static inline struct cuda_grid best_grid(const struct cuda_best_of *a) {
    return (struct cuda_grid){ (unsigned)best_parts(a->vocab_size), (unsigned)a->n_tok, 1, 256 };
}

/* ---- experts ---- */

/* "route": a token's experts, ascending, and their weights, from the router's scores (experts.c: choose). A
 * block a token. */
struct cuda_route {
    int n_tok, n_experts, n_active;
    const float *scores;            /* (n_tok, stride) */
    size_t stride;
    const float *choice_bias;       /* (n_experts,) or NULL */
    int gating, renorm, groups, groups_used;        /* groups: 0 or 1: none */
    float scale;
    int32_t *chosen;                /* (n_tok, n_active) */
    float *weight;                  /* (n_tok, n_active) */
};
static inline struct cuda_grid route_grid(const struct cuda_route *a) {
    return (struct cuda_grid){ (unsigned)a->n_tok, 1, 1, 256 };
}

/* "sort_experts": the lists that products read. One block. */
struct cuda_sort {
    int n_tok, n_experts, n_active, n_slots;
    const int32_t *chosen;
    int32_t *used, *first, *tok;    /* as in struct cuda_lists */
    int32_t *entry;                 /* (n_tok, n_active) which entry a choice became */
};
static inline struct cuda_grid sort_grid(const struct cuda_sort *a) {
    (void)a;
    return (struct cuda_grid){ 1, 1, 1, 256 };
}

/* "combine": y (+)= weight * row of each of a token's entries, experts ascending. */
struct cuda_combine {
    int n_tok, n_active, dim, add;
    const int32_t *entry;
    const float *weight, *rows;     /* rows: (entries, rows_stride) */
    size_t rows_stride;
    float *y;
    size_t y_stride;
};
static inline struct cuda_grid combine_grid(const struct cuda_combine *a) {
    return (struct cuda_grid){ (unsigned)a->n_tok, cuda_over(a->dim, 256), 1, 256 };
}

/* "switch_on": y += sigmoid(gate) * x, one gate a token: the shared expert's. */
struct cuda_switch {
    int n_tok, dim;
    const float *gate, *x;
    float *y;
    size_t gate_stride, x_stride, y_stride;
};
static inline struct cuda_grid switch_grid(const struct cuda_switch *a) {
    return (struct cuda_grid){ (unsigned)a->n_tok, cuda_over(a->dim, 256), 1, 256 };
}

/* ---- blocks with a state ---- */

/* Neighbouring tokens of a session: struct run with its struct state_run. */
struct cuda_run {
    float *memory;                  /* struct states: of all streams */
    int32_t first, start, n, base, next_base, replay;
};

/* Delta net and Mamba 2, between the products of the input and of the result (layers/recurrent.c):
 * "recur_prepare", "recur_walk", "recur_finish", "recur_keep", in this order and with the same arguments. The
 * short convolution: "short_conv", "recur_keep". All leave floats in out: "quantize" follows. The rows of
 * work are those of layers/recurrent.h: struct work. */
struct cuda_recur {
    int n_tok, n_runs;
    const struct cuda_run *runs;    /* (n_runs,) */
    const int32_t *run;             /* (n_tok,) which run a token is of */
    const struct cuda_token *at;
    size_t state_at, state_floats, state_row;       /* struct state_size */
    int n_before;
    float *row;                     /* (n_tok, stride) from the channels on */
    size_t stride, decay, k, d;
    float *q, *v, *o;               /* (n_tok, keys), (n_tok, values), (n_tok, values) */
    size_t keys, values;
    float *beta, *gate, *out;
    size_t beta_stride, gate_stride, out_stride;
    int delta;                      /* 1: delta net, 0: Mamba 2 */
    int conv, n_heads, n_groups, state_dim, v_dim, interleaved;
    int dim;                        /* short convolution: channels */
    const float *weight;            /* (conv, weight_stride) of the convolution */
    size_t weight_stride;
    const float *conv_bias, *dt_bias, *decay_rate;      /* decay_rate: ssm_a; NULL: none */
    const float *skip, *norm;       /* skip: ssm_d */
    float eps;
};
static inline struct cuda_grid recur_prepare_grid(const struct cuda_recur *a) {
    return (struct cuda_grid){ (unsigned)a->n_tok, (unsigned)(2 * a->n_groups + a->n_heads), 1, 128 };
}
static inline struct cuda_grid recur_walk_grid(const struct cuda_recur *a) {
    return (struct cuda_grid){ cuda_over((int64_t)a->values, 32), (unsigned)a->n_runs, 1, 32 };
}
static inline struct cuda_grid recur_finish_grid(const struct cuda_recur *a) {
    return (struct cuda_grid){ (unsigned)a->n_tok, (unsigned)(a->delta ? a->n_heads : a->n_groups), 1, 128 };
}
static inline struct cuda_grid recur_keep_grid(const struct cuda_recur *a) {
    return (struct cuda_grid){ cuda_over((int64_t)a->state_row, 256), (unsigned)a->n_runs, 1, 256 };
}
static inline struct cuda_grid short_conv_grid(const struct cuda_recur *a) {
    return (struct cuda_grid){ cuda_over(a->dim, 256), 1, 1, 256 };
}

/* ---- compressed attention ---- */

/* "place_compressed": each head's query [nope | rope] is turned and scaled, nope goes to its own rows, rope
 * behind the head's row of `query`; the row [c | r] has its norm and its turn, and goes to the tile
 * (layers/mla.c: place_latents). "attend" follows. */
struct cuda_place_compressed {
    int n_tok, n_heads, nope, rank, turned;         /* turned: values of rope */
    const float *q;                 /* (n_tok, q_stride): n_heads x (nope + turned) */
    float *kv;                      /* (n_tok, kv_stride): rank + turned */
    float *nopes, *query;           /* (n_tok, ..): n_heads x nope; n_heads x (rank + turned) */
    size_t q_stride, kv_stride, nopes_stride, query_stride;
    struct cuda_place at;           /* its tokens, rows, rope, scale, norm (k_norm) and kind; not q, k, v */
};
static inline struct cuda_grid place_compressed_grid(const struct cuda_place_compressed *a) {
    return (struct cuda_grid){ (unsigned)a->n_tok, (unsigned)a->n_heads + 1, 1, 32 };
}

/* ---- inputs of each layer, LAuReL, sparse gates, AltUp ---- */

/* "join_per_layer": a token's inputs of all layers, from projections and rows of their table (per_layer.c):
 * inputs = (norm(projected * by_projected) + inputs * by_row) * by_sum. A block a token and layer; projected
 * changes. */
struct cuda_join {
    int n_tok, n_layers, dim;
    float *projected, *inputs;      /* (n_tok, stride): n_layers x dim */
    size_t stride;
    const float *norm;              /* (dim,) */
    float by_projected, by_row, by_sum, eps;
};
static inline struct cuda_grid join_grid(const struct cuda_join *a) {
    return (struct cuda_grid){ (unsigned)a->n_tok, (unsigned)a->n_layers, 1, 256 };
}

/* "scale_rows": y = x * by, floats and 8 bits. */
struct cuda_scale_rows {
    int n_tok, dim;
    const float *x, *by;
    float *y;
    size_t stride;                  /* of x and y */
    struct act_block *act;
    int act_stride;
};
static inline struct cuda_grid scale_rows_grid(const struct cuda_scale_rows *a) {
    return (struct cuda_grid){ (unsigned)a->n_tok, cuda_over(a->dim, 512), 1, 256 };
}

/* "add_normed": out (+)= x + norm(y), y changes (laurel.c). */
struct cuda_add_normed {
    int n_tok, dim, add;
    const float *x;
    float *y, *out;
    size_t stride;                  /* of all */
    const float *norm;
    int kind;                       /* enum bmc_norm */
    float eps;
};
static inline struct cuda_grid add_normed_grid(const struct cuda_add_normed *a) {
    return (struct cuda_grid){ (unsigned)a->n_tok, 1, 1, 256 };
}

/* "thin_out": gates become what they are above their mean + sparsity * their standard deviation, or 0
 * (dense.c). */
struct cuda_thin {
    int n_tok, n;
    float *gate;
    size_t stride;
    float sparsity;
};
static inline struct cuda_grid thin_grid(const struct cuda_thin *a) {
    return (struct cuda_grid){ (unsigned)a->n_tok, 1, 1, SUM_LANES };
}

/* AltUp (altup.c), by BMC_ALTUP_*, what a block does when its products are there. "altup_lengths", of the
 * first and the last block: each of the n - 1 vectors of `rows` gets the length of x; sums: out (+)= their
 * sum, else out = 0 unless add. "altup_predict", "altup_correct": scores are the router's. */
struct cuda_altup {
    int n_tok, dim, n, add, sums;   /* n: versions of x */
    const float *x;
    float *rows;                    /* (n_tok, rows_stride): lengths: n - 1 vectors; else all versions */
    float *out;
    size_t stride, rows_stride;     /* stride: of x and out */
    const float *scores, *coef;     /* (n_tok, scores_stride); (n or n^2, n) */
    size_t scores_stride;
    float by;                       /* of scores */
};
static inline struct cuda_grid altup_lengths_grid(const struct cuda_altup *a) {
    return (struct cuda_grid){ (unsigned)a->n_tok, 1, 1, SUM_LANES };
}
static inline struct cuda_grid altup_grid(const struct cuda_altup *a) {
    return (struct cuda_grid){ (unsigned)a->n_tok, cuda_over(a->dim, 256), 1, 256 };
}

#endif
