/* Products of float weights: y = fma(w, x, y) over ascending columns, one chain a row and token. All threads
 * copy a stretch of both to shared memory, the next one while this one is added up. */

typedef float value_fn(const uint8_t *p);
DEVICE float value_f32(const uint8_t *p) { return *(const float *)(const void *)p; }
DEVICE float value_f16(const uint8_t *p) { return half_to_float(*(const uint16_t *)(const void *)p); }
DEVICE float value_bf16(const uint8_t *p) {
    return bits_to_float((uint32_t)*(const uint16_t *)(const void *)p << 16);
}

/* P panels and C tokens a block of threads: P, C and the columns of a stretch. */
template <int P, int C, int K> struct floats_room { float w[2][K][P][PANEL_ROWS], x[2][K][C + 1]; };

template <int P, int C, int K> DEVICE void copy_stretch(const struct cuda_product &a, const struct share &s,
                                                        struct floats_room<P, C, K> &room, int side,
                                                        int first, int size, value_fn *value) {
    const int n = least(a.k - first, K), panels = (a.n_rows + PANEL_ROWS - 1) / PANEL_ROWS;
    for (int i = (int)threadIdx.x; i < n * P * PANEL_ROWS; i += (int)blockDim.x) {
        const int row = i % PANEL_ROWS, k = i / PANEL_ROWS % n, p = i / PANEL_ROWS / n,
                  panel = least((int)blockIdx.x * P + p, panels - 1);
        room.w[side][k][p][row] = value(s.codes + (size_t)panel * a.code_stride
                                        + (size_t)((first + k) * PANEL_ROWS + row) * (size_t)size);
    }
    for (int i = (int)threadIdx.x; i < n * C; i += (int)blockDim.x) {
        const int k = i % n, c = i / n;
        room.x[side][k][c] = a.x[(size_t)column_at(s, c) * a.x_stride + (size_t)(first + k)];
    }
}

/* A thread has a row of each of the P panels and N tokens. */
template <int P, int C, int K, int N> DEVICE void floats(const struct cuda_product &a,
                                                         struct floats_room<P, C, K> &room, int size,
                                                         value_fn *value) {
    const struct share s = find_share(a, C);
    const int col = half_warp() * N;
    float y[P][N] = {};
    if (!s.n)
        return;
    copy_stretch(a, s, room, 0, 0, size, value);
    for (int first = 0, side = 0; first < a.k; first += K, side ^= 1) {
        __syncthreads();
        if (first + K < a.k)
            copy_stretch(a, s, room, side ^ 1, first + K, size, value);
        for (int k = 0; k < least(a.k - first, K); k++)
            UNROLL(4)
            for (int p = 0; p < P; p++)
                UNROLL(4)
                for (int c = 0; c < N; c++)
                    y[p][c] = fmaf(room.w[side][k][p][lane()], room.x[side][k][col + c], y[p][c]);
    }
    UNROLL(4)
    for (int p = 0; p < P; p++)
        UNROLL(4)
        for (int c = 0; c < N; c++)
            put(a, s, ((int)blockIdx.x * P + p) * PANEL_ROWS + lane(), col + c, y[p][c]);
}

/* Few tokens: stretches of K columns of a panel as they lie, and of the activations, are on their way to
 * shared memory while the one before them is added up, STAGES of them in turn. */
enum { STAGES = 4, FEW = 8 };
template <int K, int SIZE> struct streamed_room {
    alignas(16) uint8_t w[STAGES][K * PANEL_ROWS * SIZE];
    float x[STAGES][K][FEW + 1];
};

template <int K, int SIZE> DEVICE void stream_stretch(const struct cuda_product &a, const struct share &s,
                                                      struct streamed_room<K, SIZE> &room, int stretch) {
    enum { COLUMN = PANEL_ROWS * SIZE, PIECES = COLUMN / 16 };
    const int first = stretch * K, side = stretch % STAGES, n = least(a.k - first, K);
    const uint8_t *from = s.codes + (size_t)blockIdx.x * a.code_stride + (size_t)first * COLUMN;
    for (int i = (int)threadIdx.x; i < n * PIECES; i += (int)blockDim.x)
        copy_16(room.w[side] + 16 * i, from + 16 * i);
    for (int i = (int)threadIdx.x; i < s.n * K; i += (int)blockDim.x)
        if (i % K < n)
            copy_4(&room.x[side][i % K][i / K],
                   a.x + (size_t)column_at(s, i / K) * a.x_stride + (size_t)(first + i % K));
    end_copies();
}

template <int K, int SIZE>
DEVICE void streamed(const struct cuda_product &a, struct streamed_room<K, SIZE> &room, value_fn *value) {
    const struct share s = find_share(a, FEW);
    const int col = half_warp();
    float y = 0;
    if (!s.n)
        return;
    for (int i = 0; i < STAGES - 1; i++)
        stream_stretch(a, s, room, i);
    for (int i = 0; i * K < a.k; i++) {
        const int side = i % STAGES, n = col < s.n ? least(a.k - i * K, K) : 0;
        wait_copies<STAGES - 2>();
        __syncthreads();                    /* all have their copies, and are done with the stretch before */
        stream_stretch(a, s, room, i + STAGES - 1);
        UNROLL(16)
        for (int k = 0; k < n; k++)
            y = fmaf(value(room.w[side] + (k * PANEL_ROWS + lane()) * SIZE), room.x[side][k][col], y);
    }
    put(a, s, (int)blockIdx.x * PANEL_ROWS + lane(), col, y);
}

#define FLOAT_KERNELS(TYPE, name, size) \
    typedef struct streamed_room<(size > 2 ? 64 : 128), size> few_room_##name; \
    typedef struct floats_room<4, 64, 16> many_room_##name; \
    KERNEL(floats_##name, 128, struct cuda_product, few_room_##name) { streamed(a, s, value_##name); } \
    KERNEL(float_tiles_##name, 256, struct cuda_product, many_room_##name) { \
        floats<4, 64, 16, 4>(a, s, size, value_##name); \
    }
FLOAT_PANEL_TYPES(FLOAT_KERNELS)
