/* Attention over one chunk of the KV cache, for up to ATTN_ROWS queries that share its KV head.
 * Sixteen tokens are the sixteen lanes of a score, so only the softmax's own sum crosses lanes.
 *
 * A chunk is summed up on its own and then merged: a chunk's part does not depend on those before it. */
#include "values.h"

INLINE int lane(int t) { return t < 0 ? 0 : t > 16 ? 16 : t; }

/* The next chunk is fetched meanwhile, line by line at an even pace, in the order of memory as far as
 * it goes: a burst would delay the current reads, and K and V of a tile are too short for the hardware
 * prefetcher. One half of the chunk goes with the keys of this one, the other with its values; i counts a
 * tile's columns. To the second level, since the first is smaller than a chunk. */
INLINE void fetch(const struct attn_job *j, int half, int tile, int i) {
    const uint16_t *next = j->next[half * CHUNK / TILE / 2 + tile / 2];
    __builtin_prefetch(next + (tile % 2 * j->head_dim + i) * TILE, 0, 2);
}

/* s[r][t] = q[row + r] . K[t] for R rows and the tokens of T tiles: one fma chain over head_dim a score.
 * wide: the tile's keys as floats, or NULL. */
INLINE void score(const struct attn_job *j, int row, const int R, int tile, const int T, const float *wide,
                  float s[][CHUNK]) {
    f32x16 acc[ROWS_MAX][4];
    const float *q[ROWS_MAX];
    const uint16_t *k[4];
    UNROLL(4)
    for (int t = 0; t < T; t++)
        k[t] = j->tiles[tile + t];
    UNROLL(8)
    for (int r = 0; r < R; r++) {
        q[r] = j->q[row + r];
        UNROLL(4)
        for (int t = 0; t < T; t++)
            acc[r][t] = f_zero();
    }
    UNROLL_BY(4)
    for (int d = 0, D = j->head_dim; d < D; d++)
        UNROLL(4)
        for (int t = 0; t < T; t++) {
            f32x16 x = wide ? f_load(wide + d * TILE) : f_load_f16(k[t] + d * TILE);
            if (!wide)
                fetch(j, 0, tile + t, d);
            UNROLL(8)
            for (int r = 0; r < R; r++)
                acc[r][t] = f_fma(f_set(q[r][d]), x, acc[r][t]);
        }
    UNROLL(8)
    for (int r = 0; r < R; r++)
        UNROLL(4)
        for (int t = 0; t < T; t++)
            f_store(s[r] + (tile + t) * TILE, acc[r][t]);
}

INLINE void score_tiles(const struct attn_job *j, int row, const int R, int tile, int end, const int T,
                        const float *wide, float s[][CHUNK]) {
    if (wide) {
        score(j, row, R, tile, 1, wide, s);
        return;
    }
    for (; tile + T <= end; tile += T)
        score(j, row, R, tile, T, NULL, s);
    for (; tile < end; tile++)
        score(j, row, R, tile, 1, NULL, s);
}

/* A chunk's maximum and sum of weights join those before it. keep and gain: what the rows gathered so far and
 * the chunk's have to be multiplied with when they are added. */
INLINE void join(float *m, float *l, float m_chunk, float l_chunk, float *keep, float *gain) {
    float m_old = *m, factors[16] = { 0 };
    *m = m_chunk > m_old ? m_chunk : m_old;
    factors[0] = m_old - *m;
    factors[1] = m_chunk - *m;
    f_store(factors, f_weight(f_load(factors)));
    *keep = factors[0];
    *gain = factors[1];
    *l = *l * *keep + l_chunk * *gain;
}

/* A row's scores: softcap * tanh(score / softcap), then ALiBi's slope times the distance is taken off. */
static void bend(const struct attn_job *j, int row, int begin, int end, float *s) {
    static const float lanes[16] = { 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 };
    const f32x16 cap = f_set(j->softcap);
    for (int t = begin * TILE; t < end * TILE; t += TILE) {
        f32x16 v = f_load(s + t);
        if (j->softcap > 0)
            v = f_mul(cap, f_tanh(f_div(v, cap)));
        if (j->slope) {
            f32x16 distance = f_abs(f_sub(f_set((float)(j->at[row] - t)), f_load(lanes)));
            v = f_fma(f_set(-j->slope[row]), distance, v);
        }
        f_store(s + t, v);
    }
}

/* Scores of a row become weights e^(s - their maximum), exactly 0 where it does not look. */
INLINE void weigh(const struct attn_job *j, int row, int begin, int end, float *s, float *keep, float *gain) {
    int first = j->first[row], limit = j->limit[row];
    f32x16 top = f_set(-INFINITY), sum = f_zero();
    if (j->softcap > 0 || j->slope)
        bend(j, row, begin, end, s);
    for (int t = begin * TILE; t < end * TILE; t += TILE) {
        f32x16 v = f_load(s + t);
        if (t < first || t + TILE > limit) {
            v = f_keep(v, -INFINITY, lane(first - t), lane(limit - t));
            f_store(s + t, v);
        }
        top = f_max(v, top);
    }
    float m_chunk = f_max_lane(top);
    for (int t = begin * TILE; t < end * TILE; t += TILE) {
        f32x16 p = f_weight(f_sub(f_load(s + t), f_set(m_chunk)));
        f_store(s + t, p);
        sum = f_add(sum, p);
    }
    join(&j->m[row], &j->l[row], m_chunk, f_sum(sum), keep, gain);
}

/* o = keep * o + gain * x. A chunk's -0 becomes 0, as it does where the chunk is summed up alone first. */
INLINE void mix(float *o, f32x16 x, float keep, float gain) {
    f_store(o, f_fma(f_add(x, f_zero()), f_set(gain), f_mul(f_load(o), f_set(keep))));
}

/* acc[r][i] += s[r][t] V[t], in lanes d + 16 i of R rows, for the tokens t of a tile that lie in `from` ..
 * `to`, ascending. wide: those lanes of the chunk as floats, or NULL. */
INLINE void add_values(const struct attn_job *j, const int R, int d, const int D, int tile, int from, int to,
                       const float *wide, float s[][CHUNK], f32x16 acc[][4]) {
    const uint16_t *v = j->tiles[tile] + j->head_dim * TILE + d;
    const float *weights = s[0] + tile * TILE;
    UNROLL_BY(4)
    for (int t = lane(from - tile * TILE), end = lane(to - tile * TILE); t < end; t++) {
        f32x16 x[4];
        UNROLL(4)
        for (int i = 0; i < D; i++) {
            x[i] = wide ? f_load(wide + (tile * TILE + t) * 16) : f_load_f16(v + t * j->v_dim + 16 * i);
            if (!wide)
                fetch(j, 1, tile, d + 16 * i + t);
        }
        UNROLL(8)
        for (int r = 0; r < R; r++)
            UNROLL(4)
            for (int i = 0; i < D; i++)
                acc[r][i] = f_fma(f_set(weights[r * CHUNK + t]), x[i], acc[r][i]);
    }
}

/* o[row + r] = keep * o[row + r] + gain * sum over t of s[r][t] V[t], in lanes d .. d + 16 D of R rows. */
INLINE void gather(const struct attn_job *j, int row, const int R, int d, const int D, int from, int to,
                   const float *wide, float s[][CHUNK], const float *keep, const float *gain) {
    f32x16 acc[ROWS_MAX][4];
    UNROLL(8)
    for (int r = 0; r < R; r++)
        UNROLL(4)
        for (int i = 0; i < D; i++)
            acc[r][i] = f_zero();
    for (int tile = from / TILE; tile * TILE < to; tile++)
        add_values(j, R, d, D, tile, from, to, wide, s, acc);
    UNROLL(8)
    for (int r = 0; r < R; r++)
        UNROLL(4)
        for (int i = 0; i < D; i++)
            mix(j->o + (size_t)(row + r) * (size_t)j->v_dim + d + 16 * i, acc[r][i], keep[r], gain[r]);
}

/* The same in all lanes, for as many rows as leave registers for 16: tile by tile, each read once in memory
 * order, where lanes by lanes would read half lines of a chunk that the first cache cannot hold. sums: (R,
 * v_dim), between tiles. */
INLINE void gather_tiles(const struct attn_job *j, int row, const int R, int from, int to, float *sums,
                         float s[][CHUNK], const float *keep, const float *gain) {
    const int v_dim = j->v_dim;
    for (int i = 0; i < R * v_dim; i += 16)
        f_store(sums + i, f_zero());
    for (int tile = from / TILE; tile * TILE < to; tile++)
        for (int d = 0; d < v_dim; d += 16) {
            f32x16 acc[ROWS_MAX][4];
            UNROLL(8)
            for (int r = 0; r < R; r++)
                acc[r][0] = f_load(sums + r * v_dim + d);
            add_values(j, R, d, 1, tile, from, to, NULL, s, acc);
            UNROLL(8)
            for (int r = 0; r < R; r++)
                f_store(sums + r * v_dim + d, acc[r][0]);
        }
    UNROLL(8)
    for (int r = 0; r < R; r++)
        for (int d = 0; d < v_dim; d += 16)
            mix(j->o + (size_t)(row + r) * (size_t)v_dim + d, f_load(sums + r * v_dim + d), keep[r], gain[r]);
}

INLINE void gather_lanes(const struct attn_job *j, int row, const int R, int d, const int D, int from, int to,
                         const float *wide, float *memory, float s[][CHUNK], const float *keep,
                         const float *gain) {
    if (wide) {
        gather(j, row, R, d, 1, from, to, wide, s, keep, gain);
        return;
    }
    if (D == 1 && R * j->v_dim <= 16 * CHUNK) {
        gather_tiles(j, row, R, from, to, memory, s, keep, gain);
        return;
    }
    for (; d + 16 * D <= j->v_dim; d += 16 * D)
        gather(j, row, R, d, D, from, to, NULL, s, keep, gain);
    for (; d < j->v_dim; d += 16)
        gather(j, row, R, d, 1, from, to, NULL, s, keep, gain);
}

static void widen_keys(const struct attn_job *j, int tile, float *wide) {
    const uint16_t *k = j->tiles[tile];
    for (int d = 0; d < j->head_dim; d++) {
        fetch(j, 0, tile, d);
        f_store(wide + d * TILE, f_load_f16(k + d * TILE));
    }
}

typedef uint16_t u16x8 __attribute__((vector_size(16)));
#define LOW_HALVES(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH_HALVES(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)

/* Three perfect shuffles of the rows of an 8 x 8 matrix turn it over. */
INLINE void transpose_8x8(u16x8 m[8]) {
    UNROLL(3)
    for (int round = 0; round < 3; round++) {
        u16x8 from[8];
        UNROLL(8)
        for (int i = 0; i < 8; i++)
            from[i] = m[i];
        UNROLL(4)
        for (int i = 0; i < 4; i++) {
            m[2 * i] = LOW_HALVES(from[i], from[i + 4]);
            m[2 * i + 1] = HIGH_HALVES(from[i], from[i + 4]);
        }
    }
}

/* Values [d, d + 16) of a tile's tokens, out of its keys: rows [16 tokens][16 values]. Values beyond the last
 * are the last again. */
static void turn_keys(const struct attn_job *j, int tile, int d, uint16_t *rows) {
    for (int half = 0; half < 2; half++)
        for (int part = 0; part < 2; part++) {
            u16x8 m[8];
            UNROLL(8)
            for (int i = 0; i < 8; i++) {
                int value = d + 8 * half + i;
                value = value < j->head_dim ? value : j->head_dim - 1;
                memcpy(&m[i], j->tiles[tile] + value * TILE + 8 * part, sizeof m[i]);
            }
            transpose_8x8(m);
            UNROLL(8)
            for (int i = 0; i < 8; i++)
                memcpy(rows + (8 * part + i) * 16 + 8 * half, &m[i], sizeof m[i]);
        }
}

static void widen_shared(const struct attn_job *j, int d, int begin, int end, float *wide) {
    uint16_t rows[TILE * 16];
    for (int tile = begin; tile < end; tile++) {
        turn_keys(j, tile, d, rows);
        for (int t = 0; t < TILE; t++) {
            fetch(j, 1, tile, d + t);
            f_store(wide + (tile * TILE + t) * 16, f_load_f16(rows + t * 16));
        }
    }
}

static void widen_values(const struct attn_job *j, int d, int begin, int end, float *wide) {
    if (j->shared) {
        widen_shared(j, d, begin, end, wide);
        return;
    }
    for (int tile = begin; tile < end; tile++) {
        const uint16_t *v = j->tiles[tile] + j->head_dim * TILE + d;
        for (int t = 0; t < TILE; t++) {
            fetch(j, 1, tile, d + t);
            f_store(wide + (tile * TILE + t) * 16, f_load_f16(v + t * j->v_dim));
        }
    }
}

/* Rows go in groups whose sums fill the registers. Where there are several and conversion is expensive
 * (WIDEN), the tile's keys, or 16 lanes of the chunk's values, become floats once for all of them:
 * `wide`, in the first cache.
 *
 * Shared values always do. A tile of keys has tokens side by side, and a sum of values takes those of
 * one token, so each 16 x 16 of them are turned over: 96 shuffles of 8 values, beside 16 multiplications
 * of 16 values for each query, of which a head of shared values has many. And a row is read from
 * memory once, not twice. */
static void attend(const struct attn_job *job) {
    float s[ATTN_ROWS][CHUNK], keep[ATTN_ROWS], gain[ATTN_ROWS], memory[CHUNK * 16];
    struct attn_job j = *job;
    int n_groups = (j.n_rows + ROWS_MAX - 1) / ROWS_MAX, from = CHUNK, to = 0;
    float *wide = WIDEN && n_groups > 1 && j.head_dim <= CHUNK ? memory : NULL;
    float *values = j.shared ? memory : wide;
    j.next = j.next ? j.next : j.tiles;
    for (int r = 0; r < j.n_rows; r++) {
        from = j.first[r] < from ? j.first[r] : from;
        to = j.limit[r] > to ? j.limit[r] : to;
    }
    const int begin = from / TILE, end = (to + TILE - 1) / TILE;
    for (int tile = begin; tile < end; tile = wide ? tile + 1 : end) {
        if (wide)
            widen_keys(&j, tile, wide);
        for (int row = 0, left = n_groups, n; row < j.n_rows; row += n, left--) {
            n = (j.n_rows - row) / left;
#define CASE(R, T, D) case R: score_tiles(&j, row, R, tile, end, T, wide, s + row); break;
            switch (n) { EACH_SIZE(CASE) }
#undef CASE
        }
    }
    for (int r = 0; r < j.n_rows; r++)
        weigh(&j, r, begin, end, s[r], &keep[r], &gain[r]);
    for (int d = 0; d < j.v_dim; d = values ? d + 16 : j.v_dim) {
        if (values)
            widen_values(&j, d, begin, end, values);
        for (int row = 0, left = n_groups, n; row < j.n_rows; row += n, left--) {
            n = (j.n_rows - row) / left;
#define CASE(R, T, D) \
            case R: \
                gather_lanes(&j, row, R, d, D, from, to, values, memory, s + row, keep + row, gain + row); \
                break;
            switch (n) { EACH_SIZE(CASE) }
#undef CASE
        }
    }
}

static void attend_merge(float *m, float *l, float *o, float m_chunk, float l_chunk, const float *o_chunk,
                         int v_dim) {
    float keep, gain;
    if (m_chunk == -INFINITY)       /* sees nothing there */
        return;
    join(m, l, m_chunk, l_chunk, &keep, &gain);
    for (int d = 0; d < v_dim; d += 16)
        mix(o + d, f_load(o_chunk + d), keep, gain);
}

static void attend_end(float *out, const float *o, float l, int n) {
    f32x16 whole = f_set(l);
    EACH_16(n)
        f_store_n(out + i, f_div(f_load_n(o + i, m), whole), m);
}

static void store_kv(uint16_t *tile, int slot, const float *k, const float *v, int k_dim, int v_dim) {
    uint16_t column[16], *row = tile + k_dim * TILE + slot * ((v_dim + 15) / 16 * 16);
    EACH_16(k_dim) {
        f_store_f16(column, within_f16(f_load_n(k + i, m)));
        for (int d = 0; d < m; d++)
            tile[(i + d) * TILE + slot] = column[d];
    }
    EACH_16(v_dim)
        f_store_f16(row + i, within_f16(f_load_n(v + i, m)));
}

void ISA(attn)(struct kernels *k) {
    k->attend = attend;
    k->attend_merge = attend_merge;
    k->attend_end = attend_end;
    k->store_kv = store_kv;
}
