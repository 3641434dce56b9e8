/* Keys and values into their tiles, and attention over them: a chunk of 256 rows is summed up on its own,
 * chunks are merged in their order (../kernels/attn.h). */

DEVICE uint16_t *find_tile(const struct cuda_rows &rows, int64_t before, int64_t tile_bytes, int head,
                           int64_t tile) {
    const int64_t segment = tile / rows.segment_tiles, left = tile - segment * rows.segment_tiles;
    char *at = rows.segments[segment] + before * rows.segment_tiles
               + (head * rows.segment_tiles + left) * tile_bytes;
    return (uint16_t *)(void *)at;
}

/* ---- place ---- */

enum { HEAD_MAX = 1024 };
struct place_room { struct row_room row; float head[HEAD_MAX], values[HEAD_MAX]; };

/* A head's first values turn by the token's position. */
DEVICE void turn(const struct cuda_place &a, float *head) {
    const int table = a.rope | a.at[blockIdx.x].rope, half = a.rope_style ? a.rope_dims[table] / 2 : 0;
    const size_t at = ((size_t)table * (size_t)a.rope_rows + blockIdx.x) * (size_t)a.turns;
    for (int i = (int)threadIdx.x; i < half; i += (int)blockDim.x) {
        float *x = head + (a.rope_style == BMC_ROPE_PAIRS ? 2 * i : i),
              *y = a.rope_style == BMC_ROPE_PAIRS ? x + 1 : x + half;
        const float cos = a.cos[at + (size_t)i], sin = a.sin[at + (size_t)i], u = *x, v = *y;
        *x = u * cos - v * sin;
        *y = u * sin + v * cos;
    }
    __syncthreads();
}

DEVICE void place_head(const struct cuda_place &a, float *head, int h, struct cuda_weights w, size_t pitch,
                       struct row_room &s) {
    if (a.rope_late)
        turn(a, head);
    if (w.weight) {
        w.weight += (size_t)h * pitch;
        w.bias = w.bias ? w.bias + (size_t)h * pitch : NULL;
        norm_row(head, head, w, a.k_dim, a.kind, a.eps, s);
    }
    if (!a.rope_late)
        turn(a, head);
}

/* A query of a head, or a KV head's key and value. */
KERNEL(place, 32, struct cuda_place, struct place_room) {
    const int t = (int)blockIdx.x, h = (int)blockIdx.y - a.n_heads, pad = (a.v_dim + 15) / 16 * 16,
              slot = a.at[t].pos % TILE;
    if (h < 0) {
        float *q = a.q + (size_t)t * a.q_stride + blockIdx.y * a.q_pitch;
        const float scale = a.scales ? a.scales[t] : a.scale;
        copy_row(s.head, q, a.k_dim);
        place_head(a, s.head, (int)blockIdx.y, a.q_norm, a.q_norm_pitch, s.row);
        for (int i = (int)threadIdx.x; i < a.k_dim; i += (int)blockDim.x)
            q[i] = s.head[i] * scale;
        return;
    }
    copy_row(s.head, a.k + (size_t)t * a.k_stride + (size_t)h * (size_t)a.k_dim, a.k_dim);
    copy_row(s.values, a.v ? a.v + (size_t)t * a.v_stride + (size_t)h * (size_t)a.v_dim : s.head, a.v_dim);
    if (a.v_norm)
        norm_row(s.values, s.values, {}, a.v_dim, a.kind, a.eps, s.row);
    place_head(a, s.head, h, a.k_norm, a.k_norm_pitch, s.row);
    uint16_t *tile = find_tile(a.rows[a.at[t].session], a.before, a.tile_bytes, h, a.at[t].pos / TILE);
    for (int i = (int)threadIdx.x; i < a.k_dim; i += (int)blockDim.x)
        tile[i * TILE + slot] = float_to_half(within_f16(s.head[i]));
    for (int i = (int)threadIdx.x; i < pad; i += (int)blockDim.x)
        tile[a.k_dim * TILE + slot * pad + i] = float_to_half(i < a.v_dim ? within_f16(s.values[i]) : 0.0f);
}

/* ---- attend ---- */

DEVICE int v_pad(const struct cuda_attend &a) { return (a.v_dim + 15) / 16 * 16; }

/* The rows that a token sees of a chunk, counted from its beginning; none where first >= limit. The first
 * chunk is exempt from what the pass says (attend.c). */
struct seen { int first, limit; };
DEVICE struct seen rows_seen(const struct cuda_attend &a, const struct cuda_token &at, int chunk) {
    const int window = chunk && at.last && (!a.window || at.last < a.window) ? at.last : a.window;
    const int back = a.causal ? window - 1 : window / 2, start = chunk * CHUNK;
    const int first = window && at.pos > back ? at.pos - back : 0;
    const int limit = a.causal || !a.window ? at.end : least(at.end, at.pos + a.window / 2 + 1);
    return { most(first - start, 0), least(limit - start, CHUNK) };
}
DEVICE bool sees(struct seen s) { return s.first < s.limit; }

/* The queries of a block of threads: row r is token first + r / heads, head begin + r % heads. */
struct batch { int first, heads, begin, n, h; };
DEVICE struct batch find_batch(const struct cuda_attend &a) {
    const int group = a.n_heads / a.n_kv_heads, part = (int)blockIdx.y / a.n_kv_heads * ATTEND_ROWS;
    const struct cuda_task task = a.tasks[blockIdx.x];
    const int heads = least(group - part, ATTEND_ROWS), h = (int)blockIdx.y % a.n_kv_heads;
    return { task.first, heads, h * group + part, task.n * heads, h };
}
DEVICE int token_of(struct batch b, int r) { return b.first + r / b.heads; }
DEVICE int head_of(struct batch b, int r) { return b.begin + r % b.heads; }

/* Queries and scores in shared memory: the values of a query a stretch at a time. */
struct attend_room {
    alignas(16) float q[CHUNK][ATTEND_ROWS];
    alignas(16) float s[ATTEND_ROWS][CHUNK];
    float m[ATTEND_ROWS], l[ATTEND_ROWS], keep[ATTEND_ROWS], gain[ATTEND_ROWS];
    struct seen seen[ATTEND_ROWS];
};

/* sum[r] = fma(x, y[r], sum[r]) for the n values at x, `pitch` apart, in their order; `pair` gives y. */
template <int R, int N, class Pair>
DEVICE void add_some(float *sum, const uint16_t *x, int pitch, Pair pair) {
    uint16_t v[N];
    UNROLL(16)
    for (int i = 0; i < N; i++)
        v[i] = x[i * pitch];
    UNROLL(16)
    for (int i = 0; i < N; i++)
        UNROLL(16)
        for (int r = 0; r < R; r++)
            sum[r] = fmaf(pair(r, i), half_to_float(v[i]), sum[r]);
}
template <int R, class Pair>
DEVICE void add_values(float *sum, const uint16_t *x, int pitch, int n, Pair pair) {
    int i = 0;
    for (; i + TILE <= n; i += TILE)
        add_some<R, TILE>(sum, x + i * pitch, pitch, [=](int r, int j) { return pair(r, i + j); });
    for (; i < n; i++)
        add_some<R, 1>(sum, x + i * pitch, pitch, [=](int r, int) { return pair(r, i); });
}

/* s[r][t] = q[r] . K[t]: a thread a row of the cache, a chain over the key's values for each of R queries. */
template <int R> DEVICE void score(const struct cuda_attend &a, struct batch b, int chunk, struct seen any,
                                   struct attend_room &s) {
    const int t = (int)threadIdx.x;
    const bool works = t >= any.first && t < any.limit;
    const uint16_t *k = NULL;
    float sum[R] = {};
    if (works)
        k = find_tile(a.rows[a.at[b.first].session], a.before, a.tile_bytes, b.h,
                      chunk * (CHUNK / TILE) + t / TILE)
            + t % TILE;
    for (int first = 0; first < a.k_dim; first += CHUNK) {
        const int n = least(a.k_dim - first, CHUNK);
        __syncthreads();
        for (int i = t; i < n * R; i += (int)blockDim.x) {
            const int r = i / n, d = i % n, row = least(r, b.n - 1);
            s.q[d][r] = a.q[(size_t)token_of(b, row) * a.q_stride + (size_t)head_of(b, row) * a.q_pitch
                            + (size_t)(first + d)];
        }
        __syncthreads();
        if (works)
            add_values<R>(sum, k + first * TILE, TILE, n, [&](int r, int d) { return s.q[d][r]; });
    }
    UNROLL(16)
    for (int r = 0; r < R; r++)
        if (r < b.n)
            s.s[r][t] = works ? sum[r] : -INFINITY;
}

/* Softcap, then ALiBi: its slope times the distance is taken off. */
DEVICE float bend(const struct cuda_attend &a, struct batch b, int r, float v, int distance) {
    if (a.softcap > 0)
        v = a.softcap * f_tanh(v / a.softcap);
    return a.slopes ? fmaf(-a.slopes[head_of(b, r)], fabsf((float)distance), v) : v;
}

/* Scores become weights e^(s - the largest), exactly 0 where the query does not look: sixteen threads a
 * query. Leaves the largest score in keep and the sum of the weights in gain. */
DEVICE void weigh(const struct cuda_attend &a, struct batch b, int chunk, struct attend_room &s) {
    for (int r = half_warp(); r < b.n; r += (int)blockDim.x / 16) {
        const struct seen seen = s.seen[r];
        const int at = a.at[token_of(b, r)].pos - chunk * CHUNK;
        float top = -INFINITY, sum = 0;
        if (!sees(seen))
            continue;
        for (int t = lane(); t < CHUNK; t += TILE) {
            float v = -INFINITY;
            if (t >= seen.first && t < seen.limit)
                v = bend(a, b, r, s.s[r][t], at - t);
            s.s[r][t] = v;
            top = f_max(v, top);
        }
        top = f_max_lane(top);
        for (int t = lane(); t < CHUNK; t += TILE) {
            const float p = f_weight(s.s[r][t] - top);
            s.s[r][t] = p;
            sum = sum + p;
        }
        sum = f_sum(sum);
        if (lane() == 0) {
            s.keep[r] = top;
            s.gain[r] = sum;
        }
    }
    __syncthreads();
}

/* A chunk's largest score and sum of weights join those before it: what both have to be multiplied with when
 * they are added. */
struct joined { float keep, gain; };
DEVICE struct joined join(float *m, float *l, float m_chunk, float l_chunk) {
    const float old = *m;
    *m = m_chunk > old ? m_chunk : old;
    const struct joined j = { f_weight(old - *m), f_weight(m_chunk - *m) };
    *l = *l * j.keep + l_chunk * j.gain;
    return j;
}
DEVICE float mix(float o, float x, struct joined j) { return fmaf(x + 0.0f, j.gain, o * j.keep); }

/* Where a query's sums over a chunk are: v_pad of them, the largest score, the sum of the weights. direct:
 * over all chunks. */
DEVICE float *part_of(const struct cuda_attend &a, int token, int head, int chunk) {
    const size_t query = (size_t)token * (size_t)a.n_heads + (size_t)head;
    return a.parts
           + (query * (size_t)(a.direct ? 1 : a.n_chunks) + (size_t)(a.direct ? 0 : chunk))
                 * (size_t)(v_pad(a) + 2);
}

/* The weighted sum of the rows, a value a thread, for R queries. */
template <int R> DEVICE void gather(const struct cuda_attend &a, struct batch b, int chunk, struct seen any,
                                    struct attend_room &s) {
    const int pad = v_pad(a), pitch = a.shared ? 1 : pad;
    const struct cuda_rows &rows = a.rows[a.at[b.first].session];
    for (int d = (int)threadIdx.x; d < pad; d += (int)blockDim.x) {
        const int place = a.shared ? least(d, a.k_dim - 1) * TILE : a.k_dim * TILE + d;
        float sum[R] = {};
        for (int t = any.first; t < any.limit;) {
            const int end = least(any.limit, (t / TILE + 1) * TILE);
            const uint16_t *v =
                find_tile(rows, a.before, a.tile_bytes, b.h, chunk * (CHUNK / TILE) + t / TILE) + place;
            add_values<R>(sum, v + t % TILE * pitch, pitch, end - t,
                          [&](int r, int i) { return s.s[r][t + i]; });
            t = end;
        }
        UNROLL(16)
        for (int r = 0; r < R; r++)
            if (r < b.n && sees(s.seen[r])) {
                float *o = part_of(a, token_of(b, r), head_of(b, r), chunk) + d;
                *o = a.direct ? mix(*o, sum[r], { s.keep[r], s.gain[r] }) : sum[r] + 0.0f;
            }
    }
}

/* What a chunk says of each query: to `parts`, or joined with the chunks before it. */
DEVICE void keep_sums(const struct cuda_attend &a, struct batch b, int chunk, struct attend_room &s) {
    const int r = (int)threadIdx.x, pad = v_pad(a);
    if (r < b.n && sees(s.seen[r]) && a.direct) {
        const struct joined j = join(&s.m[r], &s.l[r], s.keep[r], s.gain[r]);
        s.keep[r] = j.keep;
        s.gain[r] = j.gain;
    } else if (r < b.n && sees(s.seen[r])) {
        float *part = part_of(a, token_of(b, r), head_of(b, r), chunk) + pad;
        part[0] = s.keep[r];
        part[1] = s.gain[r];
    }
    __syncthreads();
}

template <int R> DEVICE void attend_rows(const struct cuda_attend &a, struct batch b, int chunk,
                                         struct seen any, struct attend_room &s) {
    score<R>(a, b, chunk, any, s);
    __syncthreads();
    weigh(a, b, chunk, s);
    keep_sums(a, b, chunk, s);
    gather<R>(a, b, chunk, any, s);
}

DEVICE void attend_chunk(const struct cuda_attend &a, struct batch b, int chunk, struct attend_room &s) {
    struct seen any = { CHUNK, 0 };
    __syncthreads();
    if ((int)threadIdx.x < b.n)
        s.seen[threadIdx.x] = rows_seen(a, a.at[token_of(b, (int)threadIdx.x)], chunk);
    __syncthreads();
    for (int r = 0; r < b.n; r += b.heads)
        if (sees(s.seen[r]))
            any = { least(any.first, s.seen[r].first), most(any.limit, s.seen[r].limit) };
    if (!sees(any))
        return;
    if (b.n == 1)
        attend_rows<1>(a, b, chunk, any, s);
    else if (b.n <= 4)
        attend_rows<4>(a, b, chunk, any, s);
    else if (b.n <= 8)
        attend_rows<8>(a, b, chunk, any, s);
    else
        attend_rows<ATTEND_ROWS>(a, b, chunk, any, s);
}

/* A query's result: the sink is one more score without a value; divided by the sum of the weights, and
 * through its gate. */
DEVICE float finish_value(const struct cuda_attend &a, int token, int head, int d, float o, float m,
                          float l) {
    if (a.sinks && a.sinks[head] != -INFINITY)
        o = mix(o, 0, join(&m, &l, a.sinks[head], 1));
    o = o / l;
    if (a.gate) {
        const float *gate = a.gate + (size_t)token * a.gate_stride + (size_t)head * a.gate_pitch;
        o = o * act_value(a.gate_act, gate[a.gate_pitch > 1 ? d : 0], NULL);
    }
    return o;
}

DEVICE float *result_of(const struct cuda_attend &a, int token, int head) {
    return a.out + (size_t)token * a.out_stride + (size_t)head * (size_t)a.v_dim;
}
DEVICE struct act_block *result_act(const struct cuda_attend &a, int token, int head) {
    return a.act + (size_t)(head * a.v_dim / 32) * (size_t)a.act_stride + token;
}

KERNEL(attend, 256, struct cuda_attend, struct attend_room) {
    const struct batch b = find_batch(a);
    const int pad = v_pad(a);
    if (!a.direct) {
        for (int chunk = (int)blockIdx.z; chunk < a.n_chunks; chunk += (int)gridDim.z)
            attend_chunk(a, b, chunk, s);
        return;
    }
    for (int i = (int)threadIdx.x; i < b.n * pad; i += (int)blockDim.x)
        part_of(a, token_of(b, i / pad), head_of(b, i / pad), 0)[i % pad] = 0;
    if (threadIdx.x < ATTEND_ROWS) {
        s.m[threadIdx.x] = -INFINITY;
        s.l[threadIdx.x] = 0;
    }
    for (int chunk = 0; chunk < a.n_chunks; chunk++)
        attend_chunk(a, b, chunk, s);
    __syncthreads();
    for (int i = (int)threadIdx.x; i < b.n * a.v_dim; i += (int)blockDim.x) {
        const int r = i / a.v_dim, d = i % a.v_dim, token = token_of(b, r), head = head_of(b, r);
        result_of(a, token, head)[d] =
            finish_value(a, token, head, d, part_of(a, token, head, 0)[d], s.m[r], s.l[r]);
    }
    __syncthreads();
    for (int i = half_warp(); a.act && i < b.n * (a.v_dim / 32); i += (int)blockDim.x / 16) {
        const int r = i / (a.v_dim / 32), block = i % (a.v_dim / 32), token = token_of(b, r),
                  head = head_of(b, r);
        const float *x = result_of(a, token, head) + 32 * block;
        quantize_block(result_act(a, token, head) + (size_t)block * (size_t)a.act_stride, f_load(x),
                       f_load(x + 16));
    }
}

/* Chunks whose sums a thread loads together. */
enum { AHEAD = 8 };
KERNEL(attend_merge, 128, struct cuda_attend, struct no_room) {
    const int token = (int)blockIdx.x, head = (int)blockIdx.y, pad = v_pad(a);
    const struct cuda_token at = a.at[token];
    float *out = result_of(a, token, head);
    (void)s;
    for (int d = (int)threadIdx.x; d < a.v_dim; d += (int)blockDim.x) {
        float m = -INFINITY, l = 0, o = 0;
        for (int first = 0; first < a.n_chunks; first += AHEAD) {
            struct { float o, m, l; } of[AHEAD];
            bool seen[AHEAD];
            UNROLL(8)
            for (int i = 0; i < AHEAD; i++) {
                seen[i] = first + i < a.n_chunks && sees(rows_seen(a, at, first + i));
                const float *part = part_of(a, token, head, first + i);
                if (seen[i])
                    of[i] = { part[d], part[pad], part[pad + 1] };
            }
            UNROLL(8)
            for (int i = 0; i < AHEAD; i++)
                if (seen[i])
                    o = mix(o, of[i].o, join(&m, &l, of[i].m, of[i].l));
        }
        out[d] = finish_value(a, token, head, d, o, m, l);
    }
    __syncthreads();
    if (a.act)
        quantize_row(result_act(a, token, head), a.act_stride, out, a.v_dim);
}

/* ---- compressed attention ---- */

/* A head's query, or the token's row [c | r]: the norm is of c, the turn of r. */
KERNEL(place_compressed, 32, struct cuda_place_compressed, struct place_room) {
    const int t = (int)blockIdx.x, h = (int)blockIdx.y, rows = a.rank + a.turned,
              slot = a.at.at[t].pos % TILE;
    if (h < a.n_heads) {
        const int n = a.nope + a.turned;
        copy_row(s.head, a.q + (size_t)t * a.q_stride + (size_t)(h * n), n);
        turn(a.at, s.head + a.nope);
        for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) {
            const float x = s.head[i] * a.at.scale;
            if (i < a.nope)
                a.nopes[(size_t)t * a.nopes_stride + (size_t)(h * a.nope + i)] = x;
            else
                a.query[(size_t)t * a.query_stride + (size_t)(h * rows + a.rank + i - a.nope)] = x;
        }
        return;
    }
    copy_row(s.head, a.kv + (size_t)t * a.kv_stride, rows);
    norm_row(s.head, s.head, a.at.k_norm, a.rank, a.at.kind, a.at.eps, s.row);
    turn(a.at, s.head + a.rank);
    uint16_t *tile =
        find_tile(a.at.rows[a.at.at[t].session], a.at.before, a.at.tile_bytes, 0, a.at.at[t].pos / TILE);
    for (int i = (int)threadIdx.x; i < rows; i += (int)blockDim.x)
        tile[i * TILE + slot] = float_to_half(within_f16(s.head[i]));
}
