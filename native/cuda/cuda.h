/* A model's last blocks and its head on a GPU. offload.c puts them there. A pass over them is steps: steps.c
 * queues the launches of each, and queue.c runs the queue. */
#ifndef CUDA_CUDA_H
#define CUDA_CUDA_H

#include "../machine.h"
#include "cublas.h"
#include "driver.h"

enum cuda_kernel {
    CUDA_NORM, CUDA_NORM_ROWS, CUDA_QUANTIZE, CUDA_PLACE, CUDA_ATTEND, CUDA_ATTEND_MERGE, CUDA_ACTIVATE,
    CUDA_KEEP_ROWS, CUDA_BEST, CUDA_ROUTE, CUDA_SORT, CUDA_COMBINE, CUDA_SWITCH, CUDA_COMPRESS,
    CUDA_RECUR_PREPARE, CUDA_RECUR_WALK, CUDA_RECUR_FINISH, CUDA_RECUR_KEEP, CUDA_SHORT_CONV,
    CUDA_JOIN_PER_LAYER, CUDA_SCALE_ROWS, CUDA_ADD_NORMED, CUDA_THIN_OUT, CUDA_ALTUP_LENGTHS,
    CUDA_ALTUP_PREDICT, CUDA_ALTUP_CORRECT, CUDA_KERNELS
};

/* What a pass has queued, in its order: a kernel with its arguments; a product by cuBLAS, a struct cublas as
 * the function, where there are no threads; or a copy within the GPU where there is no function. */
struct queued {
    void *function;
    struct cuda_grid grid;
    uint32_t args, bytes;           /* where its arguments are, and how many bytes they take or are copied */
    uint64_t to, from;
};

/* Results on their way to the host, after the first `after` queued things. */
struct fetched { void *to; uint64_t from; size_t bytes; int after; };

/* A sequence of launches that the driver keeps: as long as none of its arguments changes, one call queues
 * all. */
enum { GRAPHS = 24, GRAPH_TOKENS = 16 };
struct graph {
    void *program;
    struct queued *queue;
    char *args;
    int n;
    size_t arg_bytes;
    int64_t used;                   /* number of the pass that used it last */
};

struct hidden { float *hidden, *kept; };           /* where a token's hidden state goes, or NULL */
struct expert_factors { const float *gate, *up, *down; };      /* (n_experts,) each, or NULL */

/* Products of whole chunks of prompts by cuBLAS: chunk.c. Addresses on the GPU. */
struct chunk {
    struct cublas *blas;            /* NULL: prompts are like everything else */
    void *halves[N_PANEL_TYPES], *halve_tokens, *finish;            /* functions */
    uint16_t *rows, *tokens;        /* f16: a slice of a matrix, (BMC_PROMPT_CHUNK, columns) */
    float *sums;                    /* (BMC_PROMPT_CHUNK, rows of a slice) */
    float *row_powers, *token_powers;
    void *workspace;                /* cuBLAS's */
};

struct cuda_tasks { int n; const struct cuda_task *list; };     /* n 0: not made yet */

struct cuda {
    struct gpu *gpu;
    void *stream;
    int first;                      /* the first block that runs there; n_blocks: only the head does */
    struct gpu_segments segments;
    struct memory memory;           /* of sessions' rows and states */
    void *functions[CUDA_KERNELS], *products[CUDA_WAYS][N_PANEL_TYPES];

    void *weights, *vectors, *room; /* on the GPU: panels, norms and tables, buffers */
    size_t weight_bytes, vector_bytes, vectors_used, room_bytes;
    struct buffers buffers;         /* addresses there */
    size_t part_floats;             /* of buffers.parts */
    size_t inputs;                  /* floats of a token in buffers.per_layer */
    struct cuda_best *best;         /* (pass_max, n_parts) */
    size_t n_parts;                 /* of the head's logits; 0: there is no head */
    const int32_t *rope_dims;       /* (n_ropes,) */
    const float **slopes;           /* (n_blocks,) of ALiBi, (n_heads,) on the GPU, or NULL */
    struct expert_factors *factors; /* (n_blocks,) */
    struct chunk chunk;

    char *host, *device;            /* what a pass brings with it: pinned memory, and its copy on the GPU */
    size_t host_bytes, device_bytes, host_used;
    char *results;                  /* pinned: struct best of all parts, then hidden states */

    /* The pass that is queued now. */
    int status;
    struct queued *queue;
    struct fetched *fetches;
    char *args;
    int n_queued, n_queue, n_fetches, n_fetch;
    size_t arg_bytes, args_room;
    const struct cuda_token *at;
    const struct cuda_rows *rows[2];            /* of arenas GPU_ROWS and GPU_WINDOWS */
    int n_chunks[2];
    const struct cuda_run *runs;
    const int32_t *run_of;          /* (n_tok,) */
    const float *cos, *sin;
    int rope_rows, n_began;         /* n_began: tokens that it began with */
    struct cuda_tasks tasks[ATTEND_ROWS + 1];   /* by the most tokens of one */
    bmc_session **sessions;         /* (n_sessions,) of the pass */
    struct hidden *hidden;          /* (n_hidden,) */
    int n_sessions, n_hidden;
    int64_t n_passes;
    uint64_t last_hash[GRAPH_TOKENS + 1];       /* of the last queue that was no graph, by tokens */
    struct graph graphs[GRAPHS];
};

extern const struct machine cuda_machine;

/* Makes the panels of what runs there and sends them. 0, or a failure. */
int cuda_pack(bmc_model *m);
void cuda_free(struct cuda *c);
void cuda_drop_queue(struct cuda *c, bool alive);      /* alive: the driver can be called */

/* A pass goes on there with the rows of m->buffers->x; cuda_end waits for the results. 0, or the first
 * failure. */
void cuda_begin(struct pass *p);
int cuda_end(struct pass *p);

/* The queue. Addresses are the GPU's, but for where results go. */
void cuda_stop(struct cuda *c, int status);     /* the first failure counts; what is queued then is dropped */
void cuda_launch(struct cuda *c, void *function, struct cuda_grid grid, const void *args, size_t bytes);
void cuda_multiply(struct cuda *c, struct cublas *blas, const struct cublas_product *p);
void cuda_copy(struct cuda *c, float *to, const float *from, size_t floats);
void cuda_fetch(struct cuda *c, void *to, const void *from, size_t bytes);
/* Goes over before the queue runs; where it will be. */
const void *cuda_put(struct cuda *c, const void *data, size_t bytes);
void cuda_put_tokens(struct cuda *c, const struct pass *p);             /* those of the pass as it is now */
struct cuda_tasks cuda_put_tasks(struct cuda *c, const struct pass *p, int size);

/* Whether a matrix is on the GPU where blocks from `first` on are; the kernels of products of a type:
 * offload.c. */
bool cuda_there(const bmc_model *m, int first, const struct matrix *w);
int cuda_find_products(const struct gpu *gpu, void *products[CUDA_WAYS][N_PANEL_TYPES], int type);

/* Products of long passes over the blocks on the CPU: stream.c. */
size_t cuda_stage_bytes(const bmc_model *m, int first);     /* on the GPU; 0: all blocks are there */
int cuda_stage_pack(bmc_model *m);                          /* once the panels are made; 0, or a failure */
const struct machine *cuda_stage_begin(struct pass *p);     /* of the blocks on the CPU, in this pass */
int cuda_stage_end(struct pass *p);                         /* 0, or the pass's first failure */
void cuda_stage_free(struct cuda_stage *s);
/* Parts of a step, of which the CPU does others. In a pass of that machine every thread asks, and gets the
 * same answer; thread 0 queues the products, and waits for them. */
bool cuda_stage_takes(const struct pass *p, const struct product *list, int n);
void cuda_stage_multiply(struct pass *p, const struct product *r);
void cuda_stage_gate_up(struct pass *p, const struct gate_up *job);
void cuda_stage_await(struct pass *p);
/* Steps: steps_altup.c. */
void cuda_gate(struct pass *p, const struct gating *g, int thread);
void cuda_join_per_layer(struct pass *p, float *projected, int thread);
void cuda_scale_rows(struct pass *p, struct tokens in, struct vector by, struct tokens out, int thread);
void cuda_add_normed(struct pass *p, struct tokens in, float *y, struct vector norm, struct sink out,
                     int thread);
void cuda_altup(struct pass *p, const struct block *b, struct sink out, int thread);

size_t cuda_mixture_ids(const bmc_model *m, const struct block *b); /* of experts in buffers.work_ids */

#endif
