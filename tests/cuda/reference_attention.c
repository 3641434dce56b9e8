/* place and attend. */
#include "reference_model.h"

#include <stdlib.h>

/* The pass's tokens, and sessions whose arenas are the segments that the arguments name. */
enum { SESSIONS = 4 };
struct scene {
    bmc_model m;
    struct buffers buffers;
    struct arena_stream stream;
    bmc_session sessions[SESSIONS];
    struct place at[PASS_MAX];
    struct block block;
    struct pass p;
    bmc_rope_table ropes[8];
    float *scratch;
};

static void set_scene(struct scene *s, const struct cuda_token *at, int n_tok, const struct cuda_rows *rows,
                      int64_t before, int64_t tile_bytes, int kind, float eps) {
    memset(s, 0, sizeof *s);
    s->m = new_model(0, kind, eps, &s->buffers);
    s->stream = (struct arena_stream){ .tile_bytes = tile_bytes, .before = before };
    s->p = (struct pass){ .model = &s->m, .machine = &cpu_machine, .buffers = &s->buffers, .n_tok = n_tok,
                            .at = s->at };
    for (int t = 0; t < n_tok; t++) {
        bmc_session *session = &s->sessions[at[t].session];
        const struct cuda_rows *own = &rows[at[t].session];
        session->rope = at[t].rope;
        session->arenas[ALL_ROWS] = (struct arena){ .config.streams = &s->stream,
                                                    .segments = (char **)own->segments,
                                                    .n_segments = 1 << 20,
                                                    .segment_tiles = own->segment_tiles };
        s->at[t] =
            (struct place){ .session = session, .pos = at[t].pos, .end = at[t].end, .last = at[t].last };
    }
}

static struct vector head_weights(const float *v, size_t pitch, int heads, int dim) {
    return vector(v, pitch ? heads : 1, dim);
}

struct place_call { struct scene *s; struct heads w; };
static void place_call(void *arg, int thread) {
    const struct place_call *c = arg;
    place_heads(&c->s->p, &c->s->block, &c->w, thread);
}

void reference_place(const struct cuda_place *a) {
    static struct scene s;
    float *values = NULL;
    set_scene(&s, a->at, a->n_tok, a->rows, a->before, a->tile_bytes, a->kind, a->eps);
    for (int i = 0; i < 8; i++)
        s.ropes[i].dim = a->rope_style ? a->rope_dims[i & 1] : 0;
    s.m.c.n_ropes = 2;
    s.m.c.ropes = s.ropes;
    s.m.pass_max = a->rope_rows;
    s.buffers = (struct buffers){ .cos = (float *)a->cos, .sin = (float *)a->sin, .turns = a->turns };
    s.block.c = (bmc_block){
        .n_heads = a->n_heads,
        .n_kv_heads = a->n_kv_heads,
        .k_dim = a->k_dim,
        .v_dim = a->v_dim,
        .kv_from = a->k ? 0 : 1,
        .rope_style = a->rope_style,
        .rope = a->rope,
        .rope_late = a->rope_late,
        .v_norm = a->v_norm,
        .attn_scale = a->scales ? a->scales[0] : a->scale,
    };
    s.block.extent[QUERY] = (int64_t)a->n_heads * (int64_t)a->q_pitch;
    s.block.extent[K] = (int64_t)a->n_kv_heads * a->k_dim;
    s.block.extent[V] = (int64_t)a->n_kv_heads * a->v_dim;
    s.block.attention.q_norm = head_weights(a->q_norm.weight, a->q_norm_pitch, a->n_heads, a->k_dim);
    s.block.attention.q_norm_bias = vector(a->q_norm.bias, 1, a->k_dim);
    s.block.attention.k_norm = head_weights(a->k_norm.weight, a->k_norm_pitch, a->n_kv_heads, a->k_dim);
    s.block.attention.k_norm_bias = vector(a->k_norm.bias, 1, a->k_dim);
    if (a->v)
        s.block.attention.v.data = (const uint8_t *)a;
    else
        values = malloc((size_t)a->n_tok * padded(s.block.extent[V]) * sizeof *values);
    struct place_call call = { &s, { .q = a->q, .k = a->k, .v = a->v ? a->v : values } };
    pool_run(s.m.pool, place_call, &call);
    pool_free(s.m.pool);
    free(values);
}

struct attend_call { struct scene *s; struct queries q; };
static void attend_call(void *arg, int thread) {
    struct attend_call *c = arg;
    attend_all(&c->s->p, &c->q, thread);
}

void reference_attend(const struct cuda_attend *a, float alibi) {
    static struct scene s;
    const int blocks = a->n_heads * a->v_dim / 32, width = tile_width(a->n_tok);
    set_scene(&s, a->at, a->n_tok, a->rows, a->before, a->tile_bytes, 0, 0);
    s.m.c.causal = a->causal;
    s.block.c = (bmc_block){
        .n_heads = a->n_heads,
        .n_kv_heads = a->n_kv_heads,
        .k_dim = a->k_dim,
        .v_dim = a->v_dim,
        .window = a->window,
        .attn_softcap = a->softcap,
        .alibi = alibi,
    };
    s.block.attention.sinks = vector(a->sinks, 1, a->n_heads);
    s.buffers.scratch = malloc(attend_scratch(&s.block, a->v_dim) * sizeof(float));
    struct act_block *act = malloc((size_t)(a->n_tok * (blocks + 1)) * sizeof *act);
    struct attend_call call = { &s,
                                { .block = &s.block,
                                  .rows = &s.block,
                                  .q = a->q,
                                  .q_stride = a->q_stride,
                                  .q_pitch = a->q_pitch,
                                  .k_dim = a->k_dim,
                                  .v_dim = a->v_dim,
                                  .shared = a->shared,
                                  .out = { a->out, act, a->n_tok, 0, 0 },
                                  .gate = a->gate,
                                  .gate_stride = a->gate_stride,
                                  .gate_pitch = a->gate_pitch,
                                  .gate_act = a->gate_act } };
    pool_run(s.m.pool, attend_call, &call);
    for (int t = 0; a->act && t < a->n_tok; t++) {
        const int tile = t / width, cols = smaller(a->n_tok - tile * width, width);
        for (int b = 0; b < blocks; b++)
            a->act[b * a->act_stride + t] = act[tile * width * blocks + b * cols + t % width];
    }
    pool_free(s.m.pool);
    free(act), free(s.buffers.scratch);
}
