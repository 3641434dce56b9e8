/* pybmc's C library: weights, the KV arena and the forward pass.
 *
 * A model holds weights: packed once, immutable, shared. A session is one sequence: its KV arena and its
 * position. bmc_eval moves any number of sessions forward in one pass over the weights.
 *
 * Functions return 0 (or a count) on success and a negative status on failure; bmc_error() then gives the
 * calling thread's sentence about it. Nothing here prints, exits, or keeps a thread busy between calls.
 * One session serves one thread at a time (BMC_EBUSY otherwise); passes over one model take turns. */
#ifndef BMC_H
#define BMC_H

#include <stddef.h>
#include <stdint.h>

#pragma GCC visibility push(default)     /* the rest of the library is hidden */

/* <cffi> What stands between these two marks is read by Python as it is: plain declarations only. */

#define BMC_VERSION 14      /* counts the changes of what follows; bmc_version() is that of the library */

enum bmc_status {
    BMC_OK = 0,
    BMC_EINVAL = -1,        /* an argument is out of range */
    BMC_EFORMAT = -2,       /* a tensor or setting does not fit the model */
    BMC_ENOMEM = -3,        /* the system has no memory left */
    BMC_EFULL = -4,         /* the session's cap on rows would be passed */
    BMC_EBUSY = -5,         /* another thread is using this session */
    BMC_EDEVICE = -6,       /* the GPU, or its driver, is missing or failed */
};

enum bmc_norm { BMC_NORM_RMS = 0, BMC_NORM_LAYER = 1 };
enum bmc_act {              /* GELU in its tanh form; RELU2: ReLU squared; SWIGLU_OAI: gpt-oss's, clamped */
    BMC_ACT_SILU = 0, BMC_ACT_GELU = 1, BMC_ACT_RELU, BMC_ACT_RELU2, BMC_ACT_XIELU, BMC_ACT_SWIGLU_OAI,
    BMC_ACT_SIGMOID, BMC_ACT_SOFTPLUS, BMC_ACTS
};
enum bmc_rope {             /* pairs of values that turn: (0, 1) (2, 3) .., or (0, d/2) (1, d/2 + 1) .. */
    BMC_ROPE_NONE = 0, BMC_ROPE_PAIRS = 1, BMC_ROPE_HALVES = 2
};
enum bmc_want { BMC_WANT_NONE = 0, BMC_WANT_LAST = 1, BMC_WANT_ALL = 2, BMC_WANT_FIRST = 3 };
enum bmc_chunk {            /* tokens for cuBLAS: positions [512 i, 512 (i + 1)) of a sequence */
    BMC_PROMPT_CHUNK = 512
};
enum bmc_step {             /* what a pass spends its time on */
    BMC_STEP_EMBED, BMC_STEP_NORM, BMC_STEP_QKV, BMC_STEP_STORE, BMC_STEP_ATTENTION, BMC_STEP_STATES,
    BMC_STEP_ATTN_OUTPUT, BMC_STEP_GATE_UP, BMC_STEP_ACTIVATION, BMC_STEP_DOWN, BMC_STEP_HEAD,
    BMC_STEP_GPU, BMC_STEP_WAIT, BMC_STEPS
};

typedef struct bmc_model bmc_model;
typedef struct bmc_session bmc_session;
typedef struct bmc_policy bmc_policy;
typedef struct bmc_drafter bmc_drafter;

/* A row of the type table; a type without kernels has runs == 0. */
typedef struct bmc_type_info {
    const char *name;       /* "q4_K", as ggml spells it; NULL where the number is unknown */
    int32_t block_size;     /* weights in a block */
    int32_t type_size;      /* bytes in a block */
    int32_t runs;           /* 1: this library computes with it */
} bmc_type_info;

/* What a block computes (native/layers/ has a file for each). */
enum bmc_kind {
    /* Mixers: a token sees those before it. */
    BMC_ATTENTION, BMC_MLA, BMC_DELTA_NET, BMC_MAMBA2, BMC_SHORT_CONV,
    /* Feed-forwards: every token alone. */
    BMC_DENSE, BMC_EXPERTS, BMC_PER_LAYER, BMC_LAUREL,
    /* Between x and its other versions. */
    BMC_ALTUP_BEGIN, BMC_ALTUP_PREDICT, BMC_ALTUP_CORRECT, BMC_ALTUP_END,
    BMC_KINDS
};
enum bmc_gating {           /* weights of experts; CHOSEN: softmax over the chosen only */
    BMC_GATING_SOFTMAX = 1, BMC_GATING_SIGMOID = 2, BMC_GATING_CHOSEN = 3
};
enum bmc_route {            /* what the router reads */
    BMC_ROUTE_NORMED,       /* what experts read */
    BMC_ROUTE_LAYER,        /* the layer's input */
    BMC_ROUTE_SCALED,       /* RMS(x) / sqrt(dim) * ffn_gate_inp.scale */
};
enum bmc_gate {             /* of attention's result */
    BMC_GATE_NONE,
    BMC_GATE_QUERY,         /* sigmoid; attn_q has 2 k_dim rows a head, [query | gate] */
    BMC_GATE_SIGMOID,       /* attn_gate, one for each value */
    BMC_GATE_SOFTPLUS,      /* attn_gate, one for each value or for each head */
};

/* A row of the model: x += block(norm(x)). A transformer's layer is two of them, attention and
 * feed-forward. Fields that a kind does not name are 0. A tensor that is present is used: there are no
 * flags for norms and biases. */
typedef struct bmc_block {
    int32_t layer;                  /* the file's number, for messages */
    int32_t kind;                   /* enum bmc_kind */
    int32_t beside;                 /* 1: reads what the block before it read; their results are summed */
    float scale;                    /* the result is multiplied by it before the sum */
    float sum_scale;                /* x is multiplied by it after the sum */
    int32_t n_altup;                /* AltUp's blocks, and those with `others`: versions of x */
    int32_t others;                 /* 1: the result goes to all versions of x but the first, which is x */

    /* attention, MLA */
    int32_t n_heads, n_kv_heads;
    int32_t k_dim, v_dim;           /* values of a head's key and value; MLA: of a query,
                                       rope included, and of its result */
    int32_t kv_from;                /* 0, or how many blocks back the one is whose rows are read;
                                       then there are no own ones */
    int32_t rope_style;             /* enum bmc_rope */
    int32_t rope;                   /* which table */
    int32_t rope_late;              /* 1: the norms of queries and keys come after the turn */
    int32_t window;                 /* rows a token sees, itself included; 0 = all.
                                       Not causal: half of it to each side */
    int32_t gate;                   /* enum bmc_gate */
    int32_t v_norm;                 /* 1: values are normed too, without a weight */
    int32_t scale_ctx;              /* > 0: queries times 1 + scale_log ln(floor(position / scale_ctx) + 1) */
    float scale_log;
    float attn_scale;               /* scores are multiplied by it, usually 1 / sqrt(k_dim) */
    float attn_softcap;             /* c > 0: score -> c tanh(score / c) */
    float alibi;                    /* B > 0: scores lose slope * distance, slopes from 2^-B / n_heads on */
    int32_t q_rank, kv_rank;        /* MLA: of compressed queries (0: not compressed),
                                       and of keys and values */

    /* recurrent: delta net, Mamba 2, short convolution */
    int32_t conv;                   /* inputs that the convolution sees */
    int32_t state_dim;              /* values of a key */
    int32_t n_groups;               /* delta net: heads of keys; Mamba 2: groups of B and C */
    int32_t interleaved;            /* delta net: value head h has key head
                                       h % n_groups (1), or h / (n_heads / n_groups) (0) */
    int32_t inner_dim;              /* n_heads * values of a head */

    /* feed-forwards */
    int32_t act;                    /* enum bmc_act */
    int32_t hidden_dim;
    float act_param[4];
    float sparsity;                 /* > 0: gates lose their mean + sparsity * their standard deviation,
                                       and stop at 0 */
    int32_t n_experts, n_active;
    int32_t expert_groups, groups_used;
    int32_t gating;                 /* enum bmc_gating */
    int32_t renorm;                 /* 1: weights of the chosen sum to 1 */
    float expert_scale;             /* and are multiplied by it */
    int32_t shared_dim;             /* of the expert that is always on; 0 = none */
    int32_t latent_dim;             /* values that experts read and give,
                                       between ffn_latent_down and ffn_latent_up; 0: dim */
    int32_t route;                  /* enum bmc_route */
    int32_t per_layer;              /* PER_LAYER: which of the token's vectors */
} bmc_block;

/* A table of rope frequencies. */
typedef struct bmc_rope_table {
    int32_t dim;                    /* leading values of a head that turn; even */
    float mscale;                   /* cos and sin are multiplied by it */
    const float *freq;              /* (dim / 2,) radians per position */
} bmc_rope_table;

typedef struct bmc_config {
    int32_t dim;
    int32_t vocab_size;
    int32_t n_ctx;                  /* the longest sequence the model was made for */
    int32_t n_layers;
    int32_t causal;                 /* 0: every token sees the whole text, which is evaluated at once */
    int32_t norm;                   /* enum bmc_norm */
    float norm_eps;
    float embedding_scale;          /* 1 = none */
    float logit_scale;              /* 1 = none */
    float logit_softcap;            /* 0 = none */
    int32_t per_layer_dim;          /* size of the vectors that each token has for every layer,
                                       besides its embedding; 0: there are none */
    int32_t long_rope;              /* 1: table 1 is table 0 for long contexts */
    int32_t n_ropes;
    const bmc_rope_table *ropes;    /* (n_ropes,) */
    int32_t n_blocks;
    const bmc_block *blocks;        /* (n_blocks,) */
    bmc_model *target;              /* NULL, or this is its draft head: a token's x is nextn.eh_proj
                                       [norm(its embedding); norm(the target's hidden state of the token
                                       before)]. Without an output matrix of its own it takes the target's */
} bmc_config;

/* A tensor of the file, by role: GGUF's word without "blk.N." and ".weight", as bmc_role lists them
 * for a kind of block; "norm", "post_norm", "sum_norm", "out_norm" and "layer_output_scale" in every
 * block. A matrix may come with "ROLE.bias" and "ROLE.scale". data must stay readable and unchanged
 * while the model lives. */
typedef struct bmc_tensor {
    const char *role;
    const char *name;               /* the file's, for messages; NULL: made of the role */
    int32_t block;                  /* -1 outside the blocks */
    int32_t expert;                 /* -1: all of them, or the role has none */
    int32_t type;
    int32_t mapped;                 /* 1: data lies in a file mapping,
                                       whose pages can be dropped and read again */
    int64_t n_cols;                 /* values in a row (the file's first dimension) */
    int64_t n_rows;                 /* 1 for a vector; of all experts together */
    const void *data;
} bmc_tensor;

enum bmc_packing {
    BMC_PACKED,             /* all panels are made */
    BMC_EXPERTS_LATE,       /* an expert's are made when a token takes it; those used longest ago make way */
    BMC_IN_FILE,            /* none is kept, as with bmc_model_map:
                               what is not an expert's is too large by itself */
};

typedef struct bmc_experts {
    int64_t n;              /* of all layers */
    int64_t room, kept;     /* how many can have panels, how many have */
    int64_t made;           /* how often an expert's panels were made */
} bmc_experts;

/* How a token is chosen: settings and their meaning are llama.cpp's. No sampler: the largest logit. */
typedef struct bmc_sampler {
    double temperature;             /* 0: the largest logit */
    double top_p, min_p;            /* 1 and 0: off */
    uint64_t seed;
    int32_t top_k;                  /* 0: off */
    int32_t last_n;                 /* tokens that the penalties look at; -1: all */
    float repeat_penalty;           /* 1: off */
    float presence_penalty, frequency_penalty;      /* 0: off */
    int32_t n_bias;
    const int32_t *bias_id;         /* (n_bias,) */
    const float *bias;              /* (n_bias,) added to these logits; -inf bans an id */
} bmc_sampler;

typedef struct bmc_span {
    bmc_session *session;
    const int32_t *tokens;
    int32_t n_tok;
    int32_t want;                   /* enum bmc_want: which tokens have results */
    int32_t last;                   /* 0, or how many rows attention sees,
                                       itself included, besides the first 256 */
    const bmc_sampler *sampler;     /* chooses the next ids */
    const uint32_t *mask;           /* (W, (vocab_size + 31) / 32) bits: which ids may be chosen; or NULL */
    const int32_t *names;           /* (vocab_size,) ids whose noise the sampler takes, for a draft of
                                       another vocabulary; or NULL */
    const float *const *before;     /* (n_tok,) for a draft head: the hidden state (dim,) of the token
                                       before each; else NULL */
    int32_t n_top;                  /* the likeliest ids to tell, before a sampler changes any */
    int32_t as_drawn;               /* 1: those that the sampler leaves, and the probabilities by which it
                                       draws; -1 where there are fewer */

    /* Results, a row for each of the W wanted tokens; NULL where they are not asked for. */
    float *logits;                  /* (W, vocab_size) */
    float *hidden;                  /* (W, dim) what the head reads, after the last norm */
    int32_t *next;                  /* (W,) the next id: the sampler's, or the best, the lowest of equals;
                                       -1: none is allowed */
    float *logprob;                 /* (W,) its log-probability, before the sampler unless as_drawn */
    float *lead;                    /* (W,) how far its score, logit / temperature + noise, is ahead */
    int32_t *top_ids;               /* (W, n_top) */
    float *top_logprobs;            /* (W, n_top) descending */
    const int32_t *given;           /* (W,) not a result: ids that follow in a text that is known already */
    float *given_logprob;           /* (W,) their log-probabilities */
} bmc_span;

/* Who guesses how one sequence's text goes on, for bmc_round: the text itself, where its last tokens were
 * there before, and one of a draft model, the model itself with less attention, and the caller. */
typedef struct bmc_drafter_options {
    bmc_session *draft;             /* a draft model's or a draft head's, for this sequence alone; or NULL */
    const int32_t *to_draft;        /* (the target's vocab_size,) the draft's id for each of the target's,
                                       where they differ; or NULL */
    const int32_t *to_target;       /* (the draft's vocab_size,) and back; -1: the target does not have it */
    int32_t self_window;            /* > 0: the target drafts for itself;
                                       attention then sees the first 256 rows and this many last ones */
    int32_t external;               /* 1: the caller has a draft model that it asks where
                                       bmc_item.wanted says so */
    int32_t ngrams;                 /* 1: repetitions in the text */
    const int32_t *hint;            /* (n_hint,) tokens that the text may repeat though they
                                       are not in it; or NULL */
    int32_t n_hint;
    int32_t most, least;            /* guesses in a pass: at most; fewer are not made */
    int32_t fixed;                  /* as many in every round, all of them checked,
                                       for proofs; 0: as many as pay */
} bmc_drafter_options;

typedef struct bmc_item_stats {     /* sums over rounds */
    int32_t rounds, checked, accepted;      /* guesses */
    int32_t lengths[33];            /* rounds by how many guesses were checked */
    double draft_s, verify_s;
    double plain_s;                 /* what plain decoding would have taken for its
                                       tokens, as far as is known */
} bmc_item_stats;

/* Called before a pass that verifies n guesses: sets bmc_item.masks, and returns how many of the guesses they
 * allow. It must not use the item's session. */
typedef int (*bmc_allow)(void *allow_for, const int32_t *guesses, int n);

/* A sequence in bmc_round. */
typedef struct bmc_item {
    bmc_session *session;
    bmc_drafter *drafter;           /* or NULL */
    const bmc_sampler *sampler;     /* or NULL */
    const int32_t *pending;         /* (n_pending,) tokens to evaluate first: a piece of the prompt,
                                       or the token chosen last */
    int32_t n_pending;
    int32_t choose;                 /* 0: more of the prompt follows, nothing is chosen */
    int32_t max_tokens;             /* the item ends after this many tokens */
    const int32_t *stops;           /* (n_stops,) ids that end it */
    int32_t n_stops;
    int32_t n_guesses;              /* of the caller's, for the first round */
    const int32_t *guesses;         /* (n_guesses,) or NULL; not NULL and none: the caller has none */
    const float *confidence;        /* (n_guesses,) 0 to 1, or NULL */
    double guess_s;                 /* seconds that they took */
    const uint32_t *masks;          /* as in bmc_span, for the last pending token and each guess;
                                       the call ends after one round; or NULL */
    bmc_allow allow;                /* makes masks when the guesses are known; NULL: masks stay as they are,
                                       and there is no drafter */
    void *allow_for;                /* its first argument */
    int32_t n_top, as_drawn;        /* as in bmc_span */
    int32_t wanted;                 /* result: guesses that the caller is asked for;
                                       then nothing else has happened */
    int32_t ended;                  /* result: max_tokens, a stop, or no token that can be chosen */
    int32_t n;                      /* result: tokens given */
    int32_t *ids;                   /* (max_tokens,) */
    float *logprobs;                /* (max_tokens,) */
    uint8_t *drafted;               /* (max_tokens,) 0, or who guessed it: 1 the caller, 2 repetitions,
                                       3 the draft model, 4 the model itself */
    int32_t *top_ids;               /* (max_tokens, n_top) */
    float *top_logprobs;            /* (max_tokens, n_top) */
    bmc_item_stats stats;
} bmc_item;

typedef struct bmc_limits {
    bmc_policy *policy;             /* decides on guesses, and learns; NULL: only the caller's are taken,
                                       and all of them checked */
    int32_t n_rounds;               /* 0: as many as fit */
    double seconds;                 /* time limit: no new round starts after it; the first one always runs */
} bmc_limits;

/* A part of a session besides its tokens, as bytes: the same on every CPU, and where layers are on a GPU. */
enum bmc_part_kind {
    BMC_PART_ROWS,          /* rows [start, end), whole tiles of 16, of the blocks that see all rows .. */
    BMC_PART_WINDOWS,       /* .. and of those with a window */
    BMC_PART_SNAPSHOT,      /* states after the first `start` tokens, to go back to; end is the same */
    BMC_PART_STATES,        /* states after the first `start` tokens, and what those up to `end`,
                               the position, did to them */
};
typedef struct bmc_part { int32_t kind, start, end; } bmc_part;

typedef struct bmc_layout {
    int64_t tile_bytes, window_bytes;       /* of 16 rows; 0: no block has such */
    int64_t state_bytes, log_bytes;         /* of all states; more for each token from start to end */
} bmc_layout;

typedef struct bmc_arena_stats {
    int64_t rows_reserved;
    int64_t rows_used;
    int64_t bytes_reserved;
    int64_t row_bytes;              /* K and V of one token, all layers */
    int32_t r;                      /* rows added at a time */
    int64_t state_bytes;            /* what recurrent blocks keep besides, whatever the length */
} bmc_arena_stats;

typedef struct bmc_times {
    double steps[BMC_STEPS];        /* seconds, the mean of the threads; together what the passes took */
    double calls;                   /* seconds in bmc_eval, the passes included */
    int64_t n_passes;
} bmc_times;

typedef struct bmc_gpu_info {
    char name[96];
    int64_t memory, available;      /* bytes */
    int32_t major, minor;           /* compute capability */
} bmc_gpu_info;

typedef struct bmc_plan {
    int32_t n_layers;               /* of those that were asked for */
    int64_t weight_bytes, buffer_bytes;
    int64_t stream_bytes;           /* bmc_model_stream's, for the other layers */
    int64_t row_bytes;              /* keys and values of one token */
    char why[128];                  /* it is not more layers; "" */
} bmc_plan;

/* ---- the library, this CPU, tensor types ---- */

int         bmc_version(void);
const char *bmc_error(void);                    /* this thread's last failure */
const char *bmc_cpu(void);                      /* level in use: "ref", "avx2", "avx512"; "neon", "i8mm" */
const char *bmc_cpu_level(int level);           /* what this CPU can run, "ref" first; NULL after the last */
int         bmc_cpu_count(void);                /* cores this process may use: affinity and quota */
int         bmc_type(int type, bmc_type_info *info);
int         bmc_dequantize(int type, const void *blocks, int64_t n, float *out);

/* ---- models ---- */

/* Tensors of a kind of block, -1: of the model; NULL after the last. */
const char *bmc_role(int kind, int i);

/* Binds the tensors and checks them. bmc_model_pack makes the panels, once, before the first session;
 * bmc_model_map leaves the weights where they are and makes panels again in every pass: slower, the same
 * bits, hardly any memory. bmc_model_pack_within has a limit on the bytes of all panels, where the model can
 * run with fewer, and returns enum bmc_packing. */
int         bmc_model_new(const bmc_config *config, const bmc_tensor *tensors, int n_tensors, int n_threads,
                          bmc_model **model);
int         bmc_model_pack(bmc_model *model);
int         bmc_model_map(bmc_model *model);
int         bmc_model_pack_within(bmc_model *model, int64_t bytes);
int         bmc_model_experts(bmc_model *model, bmc_experts *experts);      /* 1; 0 unless BMC_EXPERTS_LATE */
void        bmc_model_free(bmc_model *model);       /* once its last session is gone too */

/* Tokens of a pass at most; where not causal, of a text. */
int         bmc_model_pass(const bmc_model *model);
/* 1: guesses of this model are made with a coarse head from now on; 0: it would not pay. */
int         bmc_model_coarsen(bmc_model *model);
/* Bytes of panels so far, and of all; any thread may ask. */
int64_t     bmc_model_packed(const bmc_model *model, int64_t *total);

/* on 1: take times, from nothing on; 0: no more. Times since then; 0 where none are taken. */
int         bmc_model_profile(bmc_model *model, int on);
int         bmc_model_times(bmc_model *model, bmc_times *times);
const char *bmc_step_name(int step);                /* NULL from BMC_STEPS on */

/* ---- GPUs ---- */

/* bmc_gpu: number i; info NULL: how many there are. BMC_EDEVICE: no driver. bmc_model_plan: what the last
 * n_layers layers and the head would take; asks no driver. bmc_model_offload puts them on a GPU, before the
 * panels are made; returns how many layers: those up to one with experts of several types stay, and so do
 * those that read rows of one that stays; plan says why. kernels: the compiled kernels. A draft head goes
 * where its model is, whole or only its head. */
int         bmc_gpu(int i, bmc_gpu_info *info);
int         bmc_model_plan(const bmc_model *model, int n_layers, bmc_plan *plan);
int         bmc_model_offload(bmc_model *model, int gpu, const char *kernels, int n_layers);

/* Passes of `least` tokens and more send the weights of layers on the CPU through buffers on a GPU, which
 * does their products: the same bits. least 0: from 64 tokens on, where that takes less time than on the CPU.
 * Between bmc_model_offload and the panels. */
int         bmc_model_stream(bmc_model *model, int gpu, const char *kernels, int least);

/* Before plan and offload: whole chunks of a prompt are multiplied by cuBLAS on the GPU. cublas: its file;
 * "": the system's. BMC_EDEVICE: there is none. The bits are not the CPU's then, and depend on which tokens
 * came in one call of bmc_eval with all others of their chunk. */
int         bmc_model_prompts(bmc_model *model, const char *cublas);

/* ---- sessions ---- */

/* cap: rows of keys and values at most. r: how many are added at a time, rounded up to 16; 0: what suits the
 * model. rope 1: every layer takes table 1, as a model stretched to long contexts asks. */
int         bmc_session_new(bmc_model *model, int64_t cap, int r, int rope, bmc_session **session);
/* A new session with the first tokens of another, whose rows they share as far as whole segments go;
 * neither changes the other. */
int         bmc_session_fork(bmc_session *session, int position, bmc_session **fork);
void        bmc_session_free(bmc_session *session);

int         bmc_session_position(const bmc_session *session);
const int32_t *bmc_session_tokens(const bmc_session *session);      /* (position,) the tokens of its rows */
int         bmc_session_stats(const bmc_session *session, bmc_arena_stats *stats);
/* Keeps the rows that a text begins with; how many. */
int         bmc_session_sync(bmc_session *session, const int32_t *tokens, int n);
/* May evaluate tokens again, where a block keeps a state; if that fails it is farther back. */
int         bmc_session_rewind(bmc_session *session, int position);
/* Up to there, the last position to which rewind evaluates none. */
int         bmc_session_nearest(bmc_session *session, int position);
/* Going back to this position will need few tokens again. */
int         bmc_session_snapshot(bmc_session *session);
/* Makes room for this many more rows. */
int         bmc_session_reserve(bmc_session *session, int rows);
/* Hidden states of its last tokens are kept from now on, for a draft head. */
int         bmc_session_keep_hidden(bmc_session *session);

/* Sessions out and in again. bmc_session_parts: rows from a position on, and all states; how many,
 * BMC_PARTS at most. extend: as if n tokens had been evaluated after the first `from` ones; the parts from
 * there on have to be imported before anything else is asked of the session, and rows of windows are there
 * from `window` on. Parts of rows may be exported and imported in pieces. */
enum { BMC_PARTS = 11 };
int         bmc_session_layout(const bmc_session *session, bmc_layout *layout);
int         bmc_session_parts(bmc_session *session, int from, bmc_part *parts);
int         bmc_session_export(bmc_session *session, const bmc_part *part, void *bytes, int64_t n);
int         bmc_session_extend(bmc_session *session, int from, const int32_t *tokens, int n, int window);
int         bmc_session_import(bmc_session *session, const bmc_part *part, const void *bytes, int64_t n);
/* It was saved, or all is imported. unchanged: tokens, and their rows, that are as they were then. */
int         bmc_session_mark(bmc_session *session);
int         bmc_session_unchanged(const bmc_session *session);

/* ---- evaluation and sampling ---- */

int         bmc_eval(const bmc_span *spans, int n_spans);

/* The id that a sampler chooses from logits (n,) after `position` tokens, whose last are the history. */
int         bmc_choose(const float *logits, int n, const bmc_sampler *sampler, int position,
                       const int32_t *history, int n_history, int32_t *id);

/* ---- speculative decoding ---- */

/* What is known of costs and of guesses for one pair of models. Seconds: a guess at passes of one token.
 * One call at a time. */
int         bmc_policy_new(double target_seconds, double draft_seconds, bmc_policy **policy);
void        bmc_policy_free(bmc_policy *policy);
/* Of a pass; 0: not known. */
double      bmc_policy_seconds(const bmc_policy *policy, int of_draft, double width);
/* That a guess comes true; -1: of any. */
double      bmc_policy_chance(const bmc_policy *policy, int source, float confidence);
/* Up to n numbers; returns how many there are. */
int         bmc_policy_save(const bmc_policy *policy, double *values, int n);
int         bmc_policy_load(bmc_policy *policy, const double *values, int n);

/* Of a guess of a draft model, measured now, four times. */
int         bmc_draft_seconds(bmc_session *draft, double *seconds);
int         bmc_drafter_new(const bmc_drafter_options *options, int n_vocab, bmc_drafter **drafter);
void        bmc_drafter_free(bmc_drafter *drafter);
/* 1: its draft model had an error and is not asked any more. */
int         bmc_drafter_failed(const bmc_drafter *drafter);

/* Rounds of decoding, for one sequence or many: each one guesses, verifies all guesses in one pass over the
 * weights, and keeps those that the target chooses, and the token that it chooses after them. Pieces of
 * prompts share the pass. Goes on until an item ends, has read its piece or wants guesses, or a limit is
 * reached. Returns how many rounds there were; a failure in a later round than the first only ends them.
 * Afterwards a session holds its text without the last token given. Nothing else may use the sessions,
 * drafters and policy meanwhile. */
int         bmc_round(bmc_item *const *items, int n, const bmc_limits *limits);
/* </cffi> */

#pragma GCC visibility pop

#endif
