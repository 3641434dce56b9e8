/* Rows that stand for a text's, and attention's work on rows that are not used. */
#include "bmc_lab.h"
#include "clock.h"
#include "error.h"
#include "pass.h"

#include <math.h>
#include <string.h>

void bmc_fail_allocation(int n) { arena_fail_in = n; }

/* Tiles of noise: f16 numbers from -1 to 1, from somewhere in a table. */
static void fill_tiles(const struct arena *a, int64_t from, int64_t to) {
    enum { NOISE = 4096 };
    uint16_t noise[2 * NOISE];
    uint32_t bits = 1;
    for (int i = 0; i < 2 * NOISE; i++) {
        bits = bits * 1664525 + 1013904223;
        noise[i] = (uint16_t)((bits >> 16 & 0x8000) | (bits >> 18) % 0x3c00);
    }
    for (int stream = 0; stream < a->config.n_streams; stream++)
        for (int head = 0; head < a->config.streams[stream].n_heads; head++)
            for (int64_t tile = from, n = a->config.streams[stream].tile_bytes / (int64_t)sizeof(uint16_t);
                 tile < to; tile++) {
                uint16_t *values = arena_tile(a, stream, head, tile);
                for (int64_t i = 0, part; i < n; i += part) {
                    part = n - i < NOISE ? n - i : NOISE;
                    memcpy(values + i, noise + (tile * 31 + head * 7 + stream) % NOISE,
                           (size_t)part * sizeof *values);
                }
            }
}

int bmc_session_fill(bmc_session *s, int rows) {
    int status = bmc_session_reserve(s, rows);
    if (status || !rows)
        return status;
    fill_tiles(&s->arenas[ALL_ROWS], s->position / TILE, ((int64_t)s->position + rows + TILE - 1) / TILE);
    memset(s->tokens + s->position, 0, (size_t)rows * sizeof *s->tokens);
    s->position += rows;
    return 0;
}

/* ---- attention on unused rows ---- */

struct unused {
    const bmc_session *session;
    int n_tok;
    atomic_int_fast64_t pairs;          /* of a query and a row */
};

/* Of up to ATTN_ROWS queries on the unused rows of one chunk, [from, to). */
static void attend_part(struct unused *u, const struct block *b, int head, int from, int to, int row,
                        int n_rows, float *sums) {
    const bmc_model *m = u->session->model;
    const uint16_t *tiles[CHUNK / TILE];
    const float *q[ATTN_ROWS];
    int first[ATTN_ROWS] = { 0 }, limit[ATTN_ROWS];
    int D = b->c.k_dim, group = b->c.n_heads / b->c.n_kv_heads, pad = (int)padded(b->c.v_dim);
    float *max = sums + (size_t)n_rows * (size_t)pad, *sum = max + n_rows;
    memset(sums, 0, (size_t)n_rows * ((size_t)pad + 2) * sizeof *sums);
    for (int i = 0; from + i * TILE < to; i++)
        tiles[i] = tile_of(u->session, b, head, from / TILE + i);
    for (int i = 0; i < n_rows; i++) {
        q[i] = m->buffers->work + (size_t)((row + i) / group) * padded(b->extent[QUERY])
             + (head * group + (row + i) % group) * D;
        limit[i] = to - from;
        max[i] = -INFINITY;
    }
    m->k.attend(&(struct attn_job){ .tiles = tiles, .head_dim = D, .v_dim = pad, .n_rows = n_rows, .q = q,
                                    .first = first, .limit = limit, .m = max, .l = sum, .o = sums });
    atomic_fetch_add(&u->pairs, (int64_t)n_rows * (to - from));
}

/* A block's head on all unused tiles. The last tile in use was visited by the pass itself. */
static void attend_head(struct unused *u, const struct block *b, int head, float *sums) {
    int reserved = (int)u->session->arenas[ALL_ROWS].rows_reserved;
    int n_rows = u->n_tok * (b->c.n_heads / b->c.n_kv_heads);
    for (int at = (u->session->position + TILE - 1) / TILE * TILE, end; at < reserved; at = end) {
        end = smaller((at / CHUNK + 1) * CHUNK, reserved);
        for (int row = 0, n; row < n_rows; row += n) {
            n = smaller(n_rows - row, ATTN_ROWS);
            attend_part(u, b, head, at, end, row, n, sums);
        }
    }
}

static void attend_share(void *arg, int thread) {
    struct unused *u = arg;
    const bmc_model *m = u->session->model;
    float *sums = m->buffers->scratch + (size_t)thread * m->buffers->scratch_stride;
    int n = 0;
    for (const struct block *b = m->blocks; b < m->blocks + m->c.n_blocks; b++) {
        const bool has_rows = b->c.kind == BMC_ATTENTION && b->stream >= 0 && b->rows == ALL_ROWS;
        for (int head = 0; has_rows && head < b->c.n_kv_heads; head++)
            if (n++ % pool_size(m->pool) == thread)
                attend_head(u, b, head, sums);
    }
}

int64_t bmc_session_attend_unused(bmc_session *s, int n_tok, double *spent) {
    if (n_tok < 1 || n_tok > PASS_MAX || !spent)
        return fail(BMC_EINVAL, "bmc_session_attend_unused: expected 1 to %d tokens, found %d", PASS_MAX,
                    n_tok);
    bmc_model *m = s->model;
    struct unused u = { .session = s, .n_tok = n_tok };
    pthread_mutex_lock(&m->lock);
    double began = seconds();
    pool_run(m->pool, attend_share, &u);
    *spent = seconds() - began;
    pthread_mutex_unlock(&m->lock);
    return u.pairs;
}
