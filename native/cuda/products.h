/* Products of quantized panels and tokens in 8 bits: y = sum over blocks of 32 columns, ascending, of fma(t,
 * d, y). The terms t are made by many threads in any order; one thread adds up those of a row and a token. */

/* Which matrix, and which of its columns (tokens, or entries of an expert) this block of threads computes. */
struct share {
    const uint8_t *codes, *scales;
    const float *bias;
    float *out;
    const int32_t *tok;             /* where the columns' activations are; NULL: at `from` and on */
    float factor;
    int from, n;                    /* rows of `out`, the first and how many; 0: nothing to do */
};

DEVICE struct share find_share(const struct cuda_product &a, int tokens) {
    struct share s = { a.codes, a.scales, a.bias, a.out, NULL, a.factor, 0, a.n_tok };
    if (a.lists.used) {
        const int e = a.lists.used[blockIdx.z];
        if (e < 0) {
            s.n = 0;
            return s;
        }
        s.codes += e * a.expert_codes;
        s.scales += e * a.expert_scales;
        s.bias = a.bias ? a.bias + e * a.expert_bias : NULL;
        s.factor = a.factors ? a.factors[e] : a.factor;
        s.from = a.lists.first[e];
        s.n = a.lists.first[e + 1] - s.from;
    } else if (blockIdx.z) {
        s.codes = a.beside.codes;
        s.scales = a.beside.scales;
        s.bias = a.beside.bias;
        s.factor = a.beside.factor;
        s.out = a.beside.out;
    }
    const int skip = (int)blockIdx.y * tokens;
    s.from += skip;
    s.n = most(0, least(s.n - skip, tokens));
    s.tok = a.gathers ? a.lists.tok + s.from : NULL;
    return s;
}

/* Where a column's activations are; columns beyond the last are the last again. */
DEVICE int column_at(const struct share &s, int col) {
    col = least(col, s.n - 1);
    return s.tok ? s.tok[col] : s.from + col;
}
DEVICE const struct act_block *column(const struct cuda_product &a, const struct share &s, int block,
                                      int col) {
    return a.act + (size_t)block * (size_t)a.act_stride + column_at(s, col);
}

DEVICE void put(const struct cuda_product &a, const struct share &s, int row, int col, float y) {
    if (row >= a.n_rows || col >= s.n)
        return;
    float *out = s.out + (size_t)(s.from + col) * a.out_stride + row;
    if (s.factor != 0)
        y = s.factor * y + (s.bias ? s.bias[row] : 0.0f);
    else if (s.bias)
        y = y + s.bias[row];
    *out = a.add ? *out + y : y;
}

/* Where block b of a panel has its codes, its scales and the head of its superblock. */
struct block_at { const uint8_t *codes, *head, *scales; };
DEVICE struct block_at find_block(const struct cuda_product &a, const struct share &s, int panel, int b,
                                  const struct format f) {
    const int in = f.super / 32;
    const uint8_t *head = s.scales + (size_t)panel * a.scale_stride
                          + (size_t)(b / in) * (size_t)(f.head_bytes + in * f.scale_bytes);
    return { s.codes + (size_t)panel * a.code_stride + (size_t)b * (size_t)f.code_bytes, head,
             head + f.head_bytes + b % in * f.scale_bytes };
}

enum { WARPS = 8, ROUND = 32 }; /* of a block of threads; terms of a row and token that wait for their turn */

/* Blocks of a panel that are on their way from memory before they are read. A few thousand bytes for each
 * multiprocessor keep the memory busy, more than the loads of so few warps are. */
enum { FETCHED = 2 * ROUND };

/* By sixteen threads, or by each sixteen of a warp. */
DEVICE void fetch_block(const struct cuda_product &a, const struct share &s, int panel, int b, int blocks,
                        const struct format f) {
    const int byte = 32 * lane();
    if (b >= blocks)
        return;
    const struct block_at at = find_block(a, s, panel, b, f);
    if (byte < f.code_bytes)
        prefetch(at.codes + byte);
    if (byte < f.scale_bytes)
        prefetch(at.scales + byte);
    if (byte < f.head_bytes && b % (f.super / 32) == 0)
        prefetch(at.head + byte);
}

/* One to four tokens. Each sixteen threads take blocks of 32 columns of a panel in turn, and leave what they
 * add to the sums in shared memory. Then the sums are formed while others have begun with the next round. */
template <int C> struct narrow_room { float term[2][ROUND][C][PANEL_ROWS], d[2][ROUND][C]; };

template <int C> DEVICE void narrow(const struct cuda_product &a, struct narrow_room<C> &room,
                                    const struct format f, codes_fn *codes, scales_fn *scales) {
    const struct share s = find_share(a, C);
    const int blocks = a.k / 32, panel = (int)blockIdx.x;
    float y = 0;
    if (!s.n)
        return;
    for (int b = half_warp(); b < FETCHED; b += 2 * WARPS)
        fetch_block(a, s, panel, b, blocks, f);
    for (int first = 0, side = 0; first < blocks; first += ROUND, side ^= 1) {
        const int n = least(blocks - first, ROUND);
        for (int i = half_warp(); i < n; i += 2 * WARPS) {
            struct scales sc;
            const struct block_at at = find_block(a, s, panel, first + i, f);
            fetch_block(a, s, panel, first + i + FETCHED, blocks, f);
            scales(&sc, at.head, at.scales);
            UNROLL(4)
            for (int c = 0; c < C; c++) {
                const struct act_block *act = column(a, s, first + i, c);
                terms(f, codes, at.codes, &sc, act, &room.term[side][i][c][lane()], 1);
                if (lane() == 0)
                    room.d[side][i][c] = act->d;
            }
        }
        __syncthreads();
        if (half_warp() < C)
            for (int i = 0; i < n; i++)
                y = fmaf(room.term[side][i][half_warp()][lane()], room.d[side][i][half_warp()], y);
    }
    if (half_warp() < C)
        put(a, s, panel * PANEL_ROWS + lane(), half_warp(), y);
}

#if HAS_MMA

/* Scales and mins of a thread's two rows in a tensor core: [half of the columns][row]. */
struct row_scales { float scale[2][2], min[2][2]; };

typedef void low_scales_fn(struct low::scales *s, const uint8_t *head, const uint8_t *p);
typedef void high_scales_fn(struct high::scales *s, const uint8_t *head, const uint8_t *p);

/* The operand of 16 rows, and their scales. */
struct operand { uint32_t codes[4]; struct row_scales s; };
DEVICE struct operand load_operand(const struct block_at at, low::codes_fn *low_codes,
                                   high::codes_fn *high_codes, low_scales_fn *low_scales,
                                   high_scales_fn *high_scales) {
    const int q = (int)threadIdx.x % 4;
    struct low::scales s = {};
    struct high::scales t = {};
    low_scales(&s, at.head, at.scales);
    high_scales(&t, at.head, at.scales);
    struct operand o = {};
    o.codes[0] = low_codes(at.codes, q), o.codes[1] = high_codes(at.codes, q);
    o.codes[2] = low_codes(at.codes, q + 4), o.codes[3] = high_codes(at.codes, q + 4);
    UNROLL(2)
    for (int h = 0; h < 2; h++) {
        o.s.scale[h][0] = s.scale[h], o.s.scale[h][1] = t.scale[h];
        o.s.min[h][0] = s.min[h], o.s.min[h][1] = t.min[h];
    }
    return o;
}

/* Sums of integers begin at the bits of this float: they are floats when it is taken off, exactly, since they
 * stay below 2^22. */
#define ORIGIN 12582912.0f
enum { ORIGIN_BITS = 0x4b400000 };
DEVICE float from_origin(int32_t sum) { return bits_to_float((uint32_t)sum) - ORIGIN; }

/* What 32 columns add to the sums of 16 rows and 8 tokens, of which this thread has rows r and r + 8 (i / 2)
 * and tokens 2q and 2q + 1 (i % 2): terms() on tensor cores. mine: token r's activations, c: those of its two
 * sums. */
DEVICE void mma_terms(const struct format f, const struct operand &o, const struct act_block *mine,
                      const struct act_block *const c[2], float t[4]) {
    const int q = (int)threadIdx.x % 4;
    const uint32_t *acts = (const uint32_t *)(const void *)mine->q;
    const uint32_t tokens[2] = { acts[q], acts[q + 4] };
    int32_t d[4];
    if (f.halves) {
        int32_t e[4];
        UNROLL(4)
        for (int i = 0; i < 4; i++) {
            d[i] = c[i % 2]->neg_sum[FIRST] * f.zero + ORIGIN_BITS;
            e[i] = c[i % 2]->neg_sum[SECOND] * f.zero + ORIGIN_BITS;
        }
        mma_k16(d, o.codes, tokens[0]);
        mma_k16(e, o.codes + 2, tokens[1]);
        UNROLL(4)
        for (int i = 0; i < 4; i++)
            t[i] = fmaf(from_origin(e[i]), o.s.scale[1][i / 2], from_origin(d[i]) * o.s.scale[0][i / 2]);
    } else {
        UNROLL(4)
        for (int i = 0; i < 4; i++)
            d[i] = c[i % 2]->neg_sum[WHOLE] * f.zero + ORIGIN_BITS;
        mma_k32(d, o.codes, tokens);
        UNROLL(4)
        for (int i = 0; i < 4; i++)
            t[i] = from_origin(d[i]) * o.s.scale[0][i / 2];
    }
    UNROLL(4)
    for (int i = 0; i < 4; i++)
        if (f.mins && f.halves)
            t[i] = fmaf(o.s.min[1][i / 2], c[i % 2]->sum[SECOND],
                        fmaf(o.s.min[0][i / 2], c[i % 2]->sum[FIRST], t[i]));
        else if (f.mins)
            t[i] = fmaf(o.s.min[0][i / 2], c[i % 2]->sum[WHOLE], t[i]);
}

/* The same as narrow for G times eight tokens on tensor cores: a warp takes a block of 32 columns. The pitch
 * of a token's terms is such that a warp's go to different banks. */
enum { PITCH = 20 };
template <int G> struct wide_room { float term[2][ROUND / G][8 * G][PITCH], d[2][ROUND / G][8 * G]; };

template <int G> DEVICE void wide(const struct cuda_product &a, struct wide_room<G> &room,
                                  const struct format f, low::codes_fn *low_codes, high::codes_fn *high_codes,
                                  low_scales_fn *low_scales, high_scales_fn *high_scales) {
    enum { BLOCKS = ROUND / G, SUMS = G < 2 ? 1 : G / 2 };      /* a thread adds up one row of SUMS tokens */
    const struct share s = find_share(a, 8 * G);
    const int blocks = a.k / 32, panel = (int)blockIdx.x, warp = (int)threadIdx.x / 32,
              q = (int)threadIdx.x % 4, r = (int)threadIdx.x % 32 / 4;
    float y[SUMS] = {};
    if (!s.n)
        return;
    for (int b = warp; G < 4 && b < FETCHED; b += WARPS)
        fetch_block(a, s, panel, b, blocks, f);
    for (int first = 0, side = 0; first < blocks; first += BLOCKS, side ^= 1) {
        const int n = least(blocks - first, BLOCKS);
        for (int i = warp; i < n; i += WARPS) {
            if (G < 4)                      /* else there is more to compute than to wait for */
                fetch_block(a, s, panel, first + i + FETCHED, blocks, f);
            const struct operand o = load_operand(find_block(a, s, panel, first + i, f), low_codes,
                                                  high_codes, low_scales, high_scales);
            UNROLL(4)
            for (int g = 0; g < G; g++) {
                const int col = 8 * g;
                if (col >= s.n)
                    break;
                const struct act_block *mine = column(a, s, first + i, col + r);
                const struct act_block *const c[2] = { column(a, s, first + i, col + 2 * q),
                                                       column(a, s, first + i, col + 2 * q + 1) };
                float t[4];
                mma_terms(f, o, mine, c, t);
                UNROLL(4)
                for (int k = 0; k < 4; k++)
                    room.term[side][i][col + 2 * q + k % 2][r + k / 2 * 8] = t[k];
                if (q == 0)
                    room.d[side][i][col + r] = mine->d;
            }
        }
        __syncthreads();
        UNROLL(2)
        for (int k = 0; k < SUMS; k++) {
            const int col = half_warp() + 16 * k;
            if (col < s.n)
                for (int i = 0; i < n; i++)
                    y[k] = fmaf(room.term[side][i][col][lane()], room.d[side][i][col], y[k]);
        }
    }
    UNROLL(2)
    for (int k = 0; k < SUMS; k++)
        put(a, s, panel * PANEL_ROWS + lane(), half_warp() + 16 * k, y[k]);
}

/* Prompts: a warp has a panel, eight of which share 64 tokens, and all sums stay in registers, so columns
 * come in their order. Activations go to shared memory ahead of their use; their pitch keeps a warp's reads
 * of eight tokens in different banks. */
enum { TOKENS = 64, STEP = 4, ACT_PITCH = 80 };
struct tiles_room { alignas(16) uint8_t act[2][STEP][TOKENS][ACT_PITCH]; };

/* Begins to copy the activations of blocks [first, first + STEP). */
DEVICE void fetch_acts(const struct cuda_product &a, const struct share &s, int first, int blocks,
                       uint8_t (*act)[TOKENS][ACT_PITCH]) {
    for (int i = (int)threadIdx.x; i < STEP * TOKENS * 4; i += 32 * WARPS) {
        const int piece = i % 4, tok = i / 4 % TOKENS, b = i / 4 / TOKENS;
        if (first + b < blocks)
            copy_16(act[b][tok] + 16 * piece,
                    (const uint8_t *)(const void *)column(a, s, first + b, tok) + 16 * piece);
    }
    end_copies();
}

DEVICE void tiles(const struct cuda_product &a, struct tiles_room &room, const struct format f,
                  low::codes_fn *low_codes, high::codes_fn *high_codes, low_scales_fn *low_scales,
                  high_scales_fn *high_scales) {
    const struct share s = find_share(a, TOKENS);
    const int blocks = a.k / 32, panel = (int)blockIdx.x * WARPS + (int)threadIdx.x / 32,
              q = (int)threadIdx.x % 4, r = (int)threadIdx.x % 32 / 4;
    const bool works = panel * PANEL_ROWS < a.n_rows;
    float y[TOKENS / 8][4] = {};
    if (!s.n)
        return;
    fetch_acts(a, s, 0, blocks, room.act[0]);
    for (int first = 0, side = 0; first < blocks; first += STEP, side ^= 1) {
        fetch_acts(a, s, first + STEP, blocks, room.act[side ^ 1]);
        wait_copies<1>();
        __syncthreads();
        for (int b = 0; works && b < least(blocks - first, STEP); b++) {
            const struct operand o = load_operand(find_block(a, s, panel, first + b, f), low_codes,
                                                  high_codes, low_scales, high_scales);
            UNROLL(8)
            for (int g = 0; g < TOKENS / 8; g++) {
                const struct act_block *mine =
                    (const struct act_block *)(const void *)room.act[side][b][8 * g + r];
                const struct act_block *const c[2] = {
                    (const struct act_block *)(const void *)room.act[side][b][8 * g + 2 * q],
                    (const struct act_block *)(const void *)room.act[side][b][8 * g + 2 * q + 1]
                };
                float t[4];
                mma_terms(f, o, mine, c, t);
                UNROLL(4)
                for (int i = 0; i < 4; i++)
                    y[g][i] = fmaf(t[i], c[i % 2]->d, y[g][i]);
            }
        }
        __syncthreads();
    }
    UNROLL(8)
    for (int g = 0; g < TOKENS / 8; g++)
        UNROLL(4)
        for (int i = 0; i < 4; i++)
            put(a, s, panel * PANEL_ROWS + r + i / 2 * 8, 8 * g + 2 * q + i % 2, y[g][i]);
}

#define MMA_KERNEL(name, way, room, super, codes, scales, zero) \
    KERNEL(name, 32 * WARPS, struct cuda_product, room) { \
        way(a, s, FORMAT(super, codes, scales, zero), low::codes_##codes, high::codes_##codes, \
            low::scales##_scales, high::scales##_scales); \
    }
#define MMA_KERNELS(name, ...) \
    MMA_KERNEL(wide8_##name, wide<1>, struct wide_room<1>, __VA_ARGS__) \
    MMA_KERNEL(wide16_##name, wide<2>, struct wide_room<2>, __VA_ARGS__) \
    MMA_KERNEL(wide32_##name, wide<4>, struct wide_room<4>, __VA_ARGS__) \
    MMA_KERNEL(tiles_##name, tiles, struct tiles_room, __VA_ARGS__)
#else
#define MMA_KERNELS(...)
#endif

#define FORMAT(super, codes, scales, zero) \
    { super, CODES_##codes, SCALES_##scales, HEAD_##scales, HALVES_##scales, MINS_##scales, zero, \
      BITS_##codes }
#define NARROW_KERNEL(C, name, super, codes, scales, zero) \
    KERNEL(narrow##C##_##name, 32 * WARPS, struct cuda_product, struct narrow_room<C>) { \
        narrow<C>(a, s, FORMAT(super, codes, scales, zero), codes_##codes, scales##_scales); \
    }
#define PRODUCT_KERNELS(TYPE, name, ...) \
    NARROW_KERNEL(1, name, __VA_ARGS__) \
    NARROW_KERNEL(2, name, __VA_ARGS__) \
    NARROW_KERNEL(4, name, __VA_ARGS__) \
    MMA_KERNELS(name, __VA_ARGS__)
#ifndef CUDA_TYPES      /* a test may compile fewer */
#define CUDA_TYPES PANEL_TYPES
#endif
CUDA_TYPES(PRODUCT_KERNELS)
