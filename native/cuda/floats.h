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

#define FLOAT_KERNELS(TYPE, name, size) \
    typedef struct floats_room<1, 8, 64> few_room_##name; \
    typedef struct floats_room<4, 64, 16> many_room_##name; \
    KERNEL(floats_##name, 128, struct cuda_product, few_room_##name) { \
        floats<1, 8, 64, 1>(a, s, size, value_##name); \
    } \
    KERNEL(float_tiles_##name, 256, struct cuda_product, many_room_##name) { \
        floats<4, 64, 16, 4>(a, s, size, value_##name); \
    }
FLOAT_PANEL_TYPES(FLOAT_KERNELS)
