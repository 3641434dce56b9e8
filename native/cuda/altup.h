/* Inputs of each layer, LAuReL's sum, sparse gates, AltUp's versions of x (../layers/per_layer.c, laurel.c,
 * dense.c, altup.c). */

KERNEL(join_per_layer, 256, struct cuda_join, struct row_room) {
    const size_t at = blockIdx.x * a.stride + blockIdx.y * (size_t)a.dim;
    float *y = a.projected + at, *inputs = a.inputs + at;
    for (int i = (int)threadIdx.x; i < a.dim; i += (int)blockDim.x)
        y[i] = y[i] * a.by_projected;
    norm_row(y, y, { a.norm, NULL }, a.dim, BMC_NORM_RMS, a.eps, s);
    for (int i = (int)threadIdx.x; i < a.dim; i += (int)blockDim.x)
        inputs[i] = fmaf(a.by_row, inputs[i], y[i]) * a.by_sum;
}

KERNEL(scale_rows, 256, struct cuda_scale_rows, struct no_room) {
    const int at = 32 * ((int)blockIdx.y * 16 + half_warp()), left = a.dim - at;
    const float *x = a.x + blockIdx.x * a.stride + at;
    float *y = a.y + blockIdx.x * a.stride + at, v[2];
    (void)s;
    if (left <= 0)
        return;
    for (int h = 0; h < 2; h++) {
        v[h] = f_load_n(x + 16 * h, left - 16 * h) * f_load_n(a.by + at + 16 * h, left - 16 * h);
        f_store_n(y + 16 * h, v[h], left - 16 * h);
    }
    if (left >= 32)
        quantize_block(a.act + (size_t)(at / 32) * (size_t)a.act_stride + blockIdx.x, v[0], v[1]);
}

KERNEL(add_normed, 256, struct cuda_add_normed, struct row_room) {
    const size_t row = blockIdx.x * a.stride;
    float *y = a.y + row, *out = a.out + row;
    norm_row(y, y, { a.norm, NULL }, a.dim, a.kind, a.eps, s);
    for (int i = (int)threadIdx.x; i < a.dim; i += (int)blockDim.x) {
        y[i] = y[i] + a.x[row + (size_t)i];
        out[i] = a.add ? out[i] + y[i] : y[i];
    }
}

/* Sums of ../sums.h: a thread is a lane. All threads call it and get the sum over the row, of the values or
 * of (value - mean)^2. */
struct lanes_room { double lane[SUM_LANES]; };
DEVICE double sum_lanes(const float *x, int n, double mean, bool squares, struct lanes_room &s) {
    const int t = (int)threadIdx.x;
    double sum = 0;
    for (int i = t; i < n; i += SUM_LANES)
        sum += squares ? (x[i] - mean) * (x[i] - mean) : (double)x[i];
    __syncthreads();
    s.lane[t] = sum;
    for (int half = SUM_LANES / 2; half; half /= 2) {
        __syncthreads();
        if (t < half)
            s.lane[t] += s.lane[t + half];
    }
    __syncthreads();
    return s.lane[0];
}

KERNEL(thin_out, SUM_LANES, struct cuda_thin, struct lanes_room) {
    float *gate = a.gate + blockIdx.x * a.stride;
    const double mean = sum_lanes(gate, a.n, 0, false, s) / a.n;
    const double deviation = sqrt(sum_lanes(gate, a.n, mean, true, s) / most(a.n - 1, 1));
    const float least = (float)(mean + a.sparsity * deviation);
    for (int i = (int)threadIdx.x; i < a.n; i += SUM_LANES)
        gate[i] = gate[i] > least ? gate[i] - least : 0.0f;
}

DEVICE float mean_square(const float *x, int n, struct lanes_room &s) {
    return (float)(sum_lanes(x, n, 0, true, s) / n);
}

KERNEL(altup_lengths, SUM_LANES, struct cuda_altup, struct lanes_room) {
    const float length = mean_square(a.x + blockIdx.x * a.stride, a.dim, s);
    float *rows = a.rows + blockIdx.x * a.rows_stride, *out = a.out + blockIdx.x * a.stride;
    for (int i = 0; i < a.n - 1; i++) {
        float *y = rows + (size_t)i * (size_t)a.dim;
        const float own = mean_square(y, a.dim, s),
                    by = sqrtf(length / (own > ALTUP_LEAST ? own : ALTUP_LEAST));
        for (int d = (int)threadIdx.x; d < a.dim; d += SUM_LANES)
            y[d] = y[d] * by;
    }
    for (int d = (int)threadIdx.x; d < a.dim; d += SUM_LANES) {
        float sum = 0;
        for (int i = 0; a.sums && i < a.n - 1; i++)
            sum = sum + rows[(size_t)i * (size_t)a.dim + (size_t)d];
        if (a.sums || !a.add)
            out[d] = a.add ? out[d] + sum : sum;
    }
}

/* A token's coefficients, `rows` of them. */
struct altup_room { float router[ALTUP_MAX], c[ALTUP_MAX * ALTUP_MAX]; };
DEVICE void find_coefficients(const struct cuda_altup &a, int rows, struct altup_room &s) {
    const int t = (int)threadIdx.x;
    if (t < a.n)
        s.router[t] = f_tanh(a.scores[blockIdx.x * a.scores_stride + (size_t)t] * a.by);
    __syncthreads();
    if (t < rows) {
        float c = 0;
        for (int i = 0; i < a.n; i++)
            c = c + a.coef[t * a.n + i] * s.router[i];
        s.c[t] = c;
    }
    __syncthreads();
}

KERNEL(altup_predict, 256, struct cuda_altup, struct altup_room) {
    const size_t d = blockIdx.y * blockDim.x + threadIdx.x, dim = (size_t)a.dim;
    float *rows = a.rows + blockIdx.x * a.rows_stride + d, *out = a.out + blockIdx.x * a.stride + d;
    float old[ALTUP_MAX];
    find_coefficients(a, a.n * a.n, s);
    if (d >= dim)
        return;
    old[0] = a.x[blockIdx.x * a.stride + d];
    UNROLL(ALTUP_MAX)
    for (int i = 1; i < ALTUP_MAX; i++)
        old[i] = i < a.n ? rows[(size_t)i * dim] : 0.0f;
    UNROLL(ALTUP_MAX)
    for (int i = 0; i < ALTUP_MAX; i++) {
        float change = 0;
        if (i >= a.n)
            break;
        UNROLL(ALTUP_MAX)
        for (int j = 0; j < ALTUP_MAX; j++)
            if (j < a.n)
                change = fmaf(s.c[i * a.n + j], old[j], change);
        rows[(size_t)i * dim] = old[i] + change;
        if (!i)
            *out = a.add ? *out + change : change;
    }
}

KERNEL(altup_correct, 256, struct cuda_altup, struct altup_room) {
    const size_t d = blockIdx.y * blockDim.x + threadIdx.x, dim = (size_t)a.dim;
    float *rows = a.rows + blockIdx.x * a.rows_stride + d, *out = a.out + blockIdx.x * a.stride + d;
    find_coefficients(a, a.n, s);
    if (d >= dim)
        return;
    const float missed = fmaf(-1.0f, rows[0], a.x[blockIdx.x * a.stride + d]);
    for (int i = 1; i < a.n; i++)
        rows[(size_t)i * dim] = fmaf(1.0f + s.c[i], missed, rows[(size_t)i * dim]);
    const float change = fmaf(s.c[0], missed, 0.0f);
    *out = a.add ? *out + change : change;
}
