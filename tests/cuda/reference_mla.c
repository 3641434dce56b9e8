/* place_compressed. */
#include "reference_model.h"

enum { SESSIONS = 4 };
struct place_call { struct pass *p; struct block *b; struct latents w; };
static void place_call(void *arg, int thread) {
    const struct place_call *c = arg;
    place_latents(c->p, c->b, &c->w, thread);
}

void reference_place_compressed(const struct cuda_place_compressed *a) {
    static struct place at[PASS_MAX];
    static bmc_session sessions[SESSIONS];
    bmc_rope_table ropes[2] = { { .dim = a->turned }, { .dim = a->turned } };
    struct buffers buffers = { .cos = (float *)a->at.cos, .sin = (float *)a->at.sin, .turns = a->at.turns };
    struct arena_stream stream = { .tile_bytes = a->at.tile_bytes, .before = a->at.before };
    struct block b = { .c = { .n_heads = a->n_heads,
                              .k_dim = a->nope + a->turned,
                              .kv_rank = a->rank,
                              .attn_scale = a->at.scale,
                              .rope_style = a->at.rope_style,
                              .rope = a->at.rope } };
    bmc_model m = new_model(0, a->at.kind, a->at.eps, &buffers);
    m.c.n_ropes = 2;
    m.c.ropes = ropes;
    m.pass_max = a->at.rope_rows;
    b.extent[Q] = (int64_t)a->n_heads * b.c.k_dim, b.extent[NOPE] = a->nope,
    b.extent[KV_A] = a->rank + a->turned;
    b.attention.kv_a_norm = (struct vector){ a->at.k_norm.weight, 1, a->rank };
    for (int t = 0; t < a->n_tok; t++) {
        const struct cuda_token *token = &a->at.at[t];
        bmc_session *session = &sessions[token->session];
        session->arenas[ALL_ROWS] =
            (struct arena){ .config.streams = &stream,
                            .segments = (char **)a->at.rows[token->session].segments,
                            .n_segments = 1 << 20,
                            .segment_tiles = a->at.rows[token->session].segment_tiles };
        at[t] = (struct place){ .session = session, .pos = token->pos };
    }
    struct pass p = {
        .model = &m, .machine = &cpu_machine, .buffers = &buffers, .n_tok = a->n_tok, .at = at
    };
    struct place_call call = { &p,
                               &b,
                               { .q = (float *)a->q, .kv = a->kv, .nope = a->nopes, .query = a->query } };
    pool_run(m.pool, place_call, &call);
    pool_free(m.pool);
}
