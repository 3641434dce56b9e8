/* Rows of floats: norms, activations, blocks of 8 bits, the best of the logits. */

/* Where a row is summed up: a stretch of it at a time, in sixteen lanes. */
enum { STRETCH = 4096 };
struct row_room { float values[STRETCH], sum; };

/* What `take` gives for the elements of a row is put in their places: a thread has the elements
 * i % blockDim.x, and takes AT_ONCE of them before it puts the first, so that their loads are under way
 * together. */
enum { AT_ONCE = 4 };
template <class Take, class Put> DEVICE void each(int n, Take take, Put put) {
    const int step = (int)blockDim.x;
    for (int first = (int)threadIdx.x; first < n; first += AT_ONCE * step) {
        float v[AT_ONCE];
        UNROLL(4)
        for (int c = 0; c < AT_ONCE; c++)
            if (first + c * step < n)
                v[c] = take(first + c * step);
        UNROLL(4)
        for (int c = 0; c < AT_ONCE; c++)
            if (first + c * step < n)
                put(first + c * step, v[c]);
    }
}

/* The sum over a row in the CPU's sixteen lanes, by the first sixteen threads: of x, or of (x - mean)^2. All
 * threads call it and get the sum. */
DEVICE float sum_row(const float *x, int n, float mean, bool squares, struct row_room &s) {
    float sum = 0;
    for (int first = 0; first < n; first += STRETCH) {
        const int len = least(n - first, STRETCH);
        __syncthreads();
        each(len, [=](int i) { return x[first + i]; }, [&](int i, float v) { s.values[i] = v; });
        __syncthreads();
        if (threadIdx.x < 16)
            UNROLL(16)
            for (int i = lane(); i < len; i += 16) {
                const float v = s.values[i] - mean;
                sum = squares ? fmaf(v, v, sum) : sum + v;
            }
    }
    if (threadIdx.x < 16) {
        sum = f_sum(sum);
        if (threadIdx.x == 0)
            s.sum = sum;
    }
    __syncthreads();
    return s.sum;
}

/* y = norm(x), y may be x; weight or bias NULL: without it. In all loops over a row a thread has the same
 * elements, so they need no barrier between them. */
DEVICE void norm_row(float *y, const float *x, struct cuda_weights w, int n, int kind, float eps,
                     struct row_room &s) {
    const float mean = kind == BMC_NORM_LAYER ? sum_row(x, n, 0, false, s) / (float)n : 0.0f;
    const float by = 1.0f / sqrtf(sum_row(x, n, mean, true, s) / (float)n + eps);
    each(n,
         [=](int i) {
             float v = (x[i] - mean) * by;
             v = w.weight ? v * w.weight[i] : v;
             return w.bias ? v + w.bias[i] : v;
         },
         [=](int i, float v) { y[i] = v; });
    __syncthreads();
}

DEVICE void copy_row(float *y, const float *x, int n) {
    each(n, [=](int i) { return x[i]; }, [=](int i, float v) { y[i] = v; });
    __syncthreads();
}

DEVICE void scale_row(float *y, float by, int n) {
    if (by != 1.0f)
        each(n, [=](int i) { return y[i] * by; }, [=](int i, float v) { y[i] = v; });
}

DEVICE void add_row(float *y, const float *x, int n) {
    each(n, [=](int i) { return y[i] + x[i]; }, [=](int i, float v) { y[i] = v; });
}

/* The row's whole blocks of 32, to the column of the tile that `act` begins. */
DEVICE void quantize_row(struct act_block *act, int stride, const float *x, int n) {
    for (int b = half_warp(); b < n / 32; b += (int)blockDim.x / 16)
        quantize_block(act + (size_t)b * (size_t)stride, f_load(x + 32 * b), f_load(x + 32 * b + 16));
}

/* x += the results that wait for it. */
DEVICE void settle(const struct cuda_norm &a, float *x, size_t row, struct row_room &s) {
    float *sum = a.y[0] + row;
    for (int i = 0; i < a.n_waits; i++) {
        float *y = a.y[i] + row;
        if (a.post[i].weight)
            norm_row(y, y, a.post[i], a.dim, a.kind, a.eps, s);
        scale_row(y, a.scale[i], a.dim);
        if (i)
            add_row(sum, y, a.dim);
    }
    if (a.sum.weight)
        norm_row(sum, sum, a.sum, a.dim, a.kind, a.eps, s);
    for (int i = 0; i < a.n_others; i++)
        add_row(a.others + blockIdx.x * a.others_stride + (size_t)i * (size_t)a.dim, sum, a.dim);
    if (!a.n_others)
        add_row(x, sum, a.dim);
    scale_row(x, a.sum_scale, a.dim);
    if (a.result.weight)
        norm_row(x, x, a.result, a.dim, a.kind, a.eps, s);
    scale_row(x, a.result_scale, a.dim);
}

KERNEL(norm_tokens, NORM_THREADS, struct cuda_norm, struct row_room) {
    const size_t row = blockIdx.x * a.stride;
    float *x = a.x + row, *out = a.out + row;
    if (a.n_waits)
        settle(a, x, row, s);
    for (int i = (int)threadIdx.x; a.input && i < (int)a.stride; i += (int)blockDim.x)
        a.input[row + (size_t)i] = x[i];
    if (a.norm.weight)
        norm_row(out, x, a.norm, a.dim, a.kind, a.eps, s);
    else
        copy_row(out, x, a.dim);
    if (a.act)
        quantize_row(a.act + blockIdx.x, a.act_stride, out, a.dim);
}

KERNEL(norm_rows, NORM_THREADS, struct cuda_norm_rows, struct row_room) {
    const size_t part = blockIdx.y;
    const float *x = a.x + blockIdx.x * a.x_stride + part * a.pitch;
    float *y = a.y + blockIdx.x * a.y_stride + part * a.pitch;
    struct cuda_weights w = a.norm;
    w.weight = w.weight ? w.weight + part * a.weight_pitch : NULL;
    w.bias = w.bias ? w.bias + part * a.weight_pitch : NULL;
    norm_row(y, x, w, a.n, a.kind, a.eps, s);
    scale_row(y, a.scale, a.n);
    for (int i = (int)threadIdx.x; a.factors && i < a.n; i += (int)blockDim.x)
        y[i] = y[i] * a.factors[i];
    __syncthreads();
    if (a.act)
        quantize_row(a.act + blockIdx.x, a.act_stride, y, a.n);
}

KERNEL(quantize, 256, struct cuda_quantize, struct no_room) {
    const int b = (int)blockIdx.y * 16 + half_warp();
    const float *x = a.x + blockIdx.x * a.stride + 32 * (size_t)b;
    (void)s;
    if (b < a.n_blocks)
        quantize_block(a.act + (size_t)b * (size_t)a.act_stride + blockIdx.x, f_load(x), f_load(x + 16));
}

/* f(gate) of an activation that needs nothing else. */
DEVICE float act_value(int kind, float gate, const float *param) {
#define ACT_CASE(KIND, name) case KIND: return of_##name(gate, param);
    switch (kind) { GATE_ACTS(ACT_CASE) }
#undef ACT_CASE
    return 0;
}

KERNEL(activate, 256, struct cuda_activate, struct no_room) {
    const int b = (int)blockIdx.y * 16 + half_warp(), left = a.dim - 32 * b;
    float *up = a.up + blockIdx.x * a.stride + 32 * (size_t)b, v[2];
    const float *gate = a.gate ? a.gate + blockIdx.x * a.gate_stride + 32 * (size_t)b : up;
    const float *with = a.x ? a.x + blockIdx.x * a.x_stride + 32 * (size_t)b : up;
    (void)s;
    if (left <= 0)
        return;
    for (int h = 0; h < 2; h++) {
        const float x = f_load_n(with + 16 * h, left - 16 * h), g = f_load_n(gate + 16 * h, left - 16 * h);
        if (a.kind == BMC_ACT_SWIGLU_OAI)
            v[h] = swiglu_oai_of(x, g);
        else
            v[h] = a.gate ? x * act_value(a.kind, g, a.param) : act_value(a.kind, g, a.param);
        f_store_n(up + 16 * h, v[h], left - 16 * h);
    }
    if (a.act && left >= 32)
        quantize_block(a.act + (size_t)b * (size_t)a.act_stride + blockIdx.x, v[0], v[1]);
}

KERNEL(keep_rows, 256, struct cuda_keep_rows, struct no_room) {
    const size_t at = blockIdx.x * blockDim.x + threadIdx.x;
    (void)s;
    for (int i = 0; at < a.stride && i < a.n; i++)
        a.x[(size_t)i * a.stride + at] = a.x[(size_t)a.tok[i] * a.stride + at];
}

/* Sixteen threads look at the part's logits, all make them ready. */
struct best_room { float logits[256]; };
KERNEL(best, 256, struct cuda_best_of, struct best_room) {
    const int first = (int)blockIdx.x * 256, n = least(a.vocab_size - first, 256), t = (int)threadIdx.x;
    float *logits = a.logits + blockIdx.y * a.stride + first;
    if (t < n) {
        float x = logits[t];
        x = a.scale != 1.0f ? x * a.scale : x;
        x = a.softcap > 0 ? a.softcap * f_tanh(x / a.softcap) : x;
        s.logits[t] = logits[t] = x;
    }
    __syncthreads();
    if (t >= 16)
        return;
    float top = -INFINITY, sum = 0;
    int at = n - 1;
    for (int i = lane(); i < n; i += 16)
        top = f_max(s.logits[i], top);
    top = f_max_lane(top);
    for (int i = lane(); i < n; i += 16) {
        sum = sum + f_weight(s.logits[i] - top);
        at = s.logits[i] == top ? least(at, i) : at;
    }
    sum = f_sum(sum);
    at = i_min(at);
    if (t == 0)
        a.best[blockIdx.y * gridDim.x + blockIdx.x] = { top, top, sum, first + at };
}
