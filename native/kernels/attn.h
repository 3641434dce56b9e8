/* Attention over one chunk of the KV cache, for up to ATTN_ROWS queries that share its KV head.
 * Sixteen tokens are the sixteen lanes of a score, so only the softmax's own sum crosses lanes.
 *
 * A chunk is summed up on its own and then merged: a chunk's part does not depend on those before it. */

INLINE int lane(int t) { return t < 0 ? 0 : t > 16 ? 16 : t; }

/* K and V of a tile are pieces of 2 KB and more, too short for the processor to foresee the next. V is fetched while K is
 * read, the next chunk's K while V is, a line at a time: a burst of them would hold up what is read now. To the second
 * level, since the first is smaller than a chunk. */
INLINE void fetch(const uint16_t *p) { __builtin_prefetch(p, 0, 2); }

/* s[row][t] = q[row] . K[t] for the tokens of T tiles: one fma chain over head_dim a score. */
INLINE void score_tiles(const struct attn_job *j, int row, const int R, int tile, const int T, float s[][CHUNK]) {
    f32x16 acc[ROWS_MAX][4];
    const int cold = j->next != NULL;
    UNROLL(8)
    for (int r = 0; r < R; r++)
        UNROLL(4)
        for (int t = 0; t < T; t++)
            acc[r][t] = f_zero();
    for (int d = 0; d < j->head_dim; d++)
        UNROLL(4)
        for (int t = 0; t < T; t++) {
            const uint16_t *p = j->tiles[tile + t] + d * TILE;
            f32x16 k = f_load_f16(p);
            if (cold)
                fetch(p + j->head_dim * TILE);
            UNROLL(8)
            for (int r = 0; r < R; r++)
                acc[r][t] = f_fma(f_set(j->q[row + r][d]), k, acc[r][t]);
        }
    UNROLL(8)
    for (int r = 0; r < R; r++)
        UNROLL(4)
        for (int t = 0; t < T; t++)
            f_store(s[r] + (tile + t) * TILE, acc[r][t]);
}

/* A chunk's maximum and sum of weights join those before it. keep and gain: what the rows gathered so far and the chunk's
 * have to be multiplied with when they are added. */
INLINE void join(float *m, float *l, float m_chunk, float l_chunk, float *keep, float *gain) {
    float m_old = *m, factors[16] = { 0 };
    *m = m_chunk > m_old ? m_chunk : m_old;
    factors[0] = m_old - *m;
    factors[1] = m_chunk - *m;
    f_store(factors, f_exp(f_load(factors)));
    *keep = factors[0];
    *gain = factors[1];
    *l = *l * *keep + l_chunk * *gain;
}

/* Scores of a row become weights e^(s - their maximum), exactly 0 where it does not look. */
INLINE void weigh(const struct attn_job *j, int row, int begin, int end, float *s, float *keep, float *gain) {
    int first = j->first[row], limit = j->limit[row];
    f32x16 top = f_set(-INFINITY), sum = f_zero();
    for (int t = begin * TILE; t < end * TILE; t += TILE) {
        f32x16 v = f_keep(f_load(s + t), -INFINITY, lane(first - t), lane(limit - t));
        f_store(s + t, v);
        top = f_max(v, top);
    }
    float m_chunk = f_max_lane(top);
    for (int t = begin * TILE; t < end * TILE; t += TILE) {
        f32x16 p = f_exp(f_sub(f_load(s + t), f_set(m_chunk)));
        f_store(s + t, p);
        sum = f_add(sum, p);
    }
    join(&j->m[row], &j->l[row], m_chunk, f_sum(sum), keep, gain);
}

/* o = keep * o + gain * x. A chunk's -0 becomes 0, as it does where the chunk is summed up alone first. */
INLINE void mix(float *o, f32x16 x, float keep, float gain) {
    f_store(o, f_fma(f_add(x, f_zero()), f_set(gain), f_mul(f_load(o), f_set(keep))));
}

/* o[row] = keep * o[row] + gain * sum over t of s[row][t] V[t], in lanes d .. d + 16 D of R rows, t ascending. */
INLINE void gather(const struct attn_job *j, int row, const int R, int d, const int D, int from, int to,
                   float s[][CHUNK], const float *keep, const float *gain) {
    f32x16 acc[ROWS_MAX][4];
    const int cold = j->next && d == 0;
    UNROLL(8)
    for (int r = 0; r < R; r++)
        UNROLL(4)
        for (int i = 0; i < D; i++)
            acc[r][i] = f_zero();
    for (int t = from; t < to; t++) {
        const uint16_t *v = j->tiles[t / TILE] + j->head_dim * TILE + (t % TILE) * j->v_dim + d;
        for (int i = 0; cold && i < j->head_dim; i += 32)
            fetch(j->next[t / TILE] + t % TILE * j->head_dim + i);
        f32x16 x[4];
        UNROLL(4)
        for (int i = 0; i < D; i++)
            x[i] = f_load_f16(v + 16 * i);
        UNROLL(8)
        for (int r = 0; r < R; r++)
            UNROLL(4)
            for (int i = 0; i < D; i++)
                acc[r][i] = f_fma(f_set(s[r][t]), x[i], acc[r][i]);
    }
    UNROLL(8)
    for (int r = 0; r < R; r++)
        UNROLL(4)
        for (int i = 0; i < D; i++)
            mix(j->o + (size_t)(row + r) * (size_t)j->v_dim + d + 16 * i, acc[r][i], keep[r], gain[r]);
}

/* R rows from row on; T tiles at a time in scores, D vectors of V at a time: what fits the registers. */
INLINE void attend_rows(const struct attn_job *j, int row, const int R, const int T, const int D) {
    float s[ROWS_MAX][CHUNK], keep[ROWS_MAX], gain[ROWS_MAX];
    int from = j->first[row], to = j->limit[row], d = 0;
    for (int r = 1; r < R; r++) {
        from = j->first[row + r] < from ? j->first[row + r] : from;
        to = j->limit[row + r] > to ? j->limit[row + r] : to;
    }
    int begin = from / TILE, end = (to + TILE - 1) / TILE, tile = begin;
    for (; tile + T <= end; tile += T)
        score_tiles(j, row, R, tile, T, s);
    for (; tile < end; tile++)
        score_tiles(j, row, R, tile, 1, s);
    for (int r = 0; r < R; r++)
        weigh(j, row + r, begin, end, s[r], &keep[r], &gain[r]);
    for (; d + 16 * D <= j->v_dim; d += 16 * D)
        gather(j, row, R, d, D, from, to, s, keep, gain);
    for (; d < j->v_dim; d += 16)
        gather(j, row, R, d, 1, from, to, s, keep, gain);
}

static void attend(const struct attn_job *j) {
    for (int row = 0, n; row < j->n_rows; row += n) {
        n = j->n_rows - row < ROWS_MAX ? j->n_rows - row : ROWS_MAX;
        switch (n) {
        case 1: attend_rows(j, row, 1, 4, 4); break;
        case 2: attend_rows(j, row, 2, 2, ROWS_MAX / 2); break;
#if ROWS_MAX > 2
        case 3: attend_rows(j, row, 3, 1, ROWS_MAX / 4); break;
        case 4: attend_rows(j, row, 4, 1, ROWS_MAX > 4 ? 4 : 1); break;
#endif
#if ROWS_MAX > 4
        case 5: attend_rows(j, row, 5, 1, 4); break;
        case 6: attend_rows(j, row, 6, 1, 4); break;
        case 7: attend_rows(j, row, 7, 1, 2); break;
        case 8: attend_rows(j, row, 8, 1, 2); break;
#endif
        }
    }
}

static void attend_merge(float *m, float *l, float *o, float m_chunk, float l_chunk, const float *o_chunk, int v_dim) {
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

INLINE f32x16 within_f16(f32x16 x) { return f_min(f_max(x, f_set(-65504.0f)), f_set(65504.0f)); }

static void store_kv(uint16_t *tile, int slot, const float *k, const float *v, int head_dim, int v_dim) {
    uint16_t column[16], *row = tile + head_dim * TILE + slot * v_dim;
    EACH_16(head_dim) {
        f_store_f16(column, within_f16(f_load_n(k + i, m)));
        for (int d = 0; d < m; d++)
            tile[(i + d) * TILE + slot] = column[d];
        f_store_f16(row + i, within_f16(f_load_n(v + i, m)));
    }
}

void ISA(attn)(struct kernels *k) {
    k->attend = attend;
    k->attend_merge = attend_merge;
    k->attend_end = attend_end;
    k->store_kv = store_kv;
}
