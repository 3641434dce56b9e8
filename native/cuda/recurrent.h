/* Blocks with a state: the convolution over a few tokens before, the walk of the states, the log
 * (../layers/recurrent.c). */

/* A session's part of a stream: the current state, the anchor, the ring of log rows. */
DEVICE float *current_of(const struct cuda_recur &a, const struct cuda_run &run) {
    return run.memory + a.state_at;
}
DEVICE float *anchor_of(const struct cuda_recur &a, const struct cuda_run &run) {
    return current_of(a, run) + a.state_floats;
}
DEVICE float *log_row(const struct cuda_recur &a, const struct cuda_run &run, int position) {
    const int place = (position + a.n_before) % (LOG_MAX + a.n_before);
    return anchor_of(a, run) + a.state_floats + (size_t)place * a.state_row;
}

DEVICE float *row_at(float *rows, size_t stride, int t) { return rows + (size_t)t * stride; }

/* The convolution of token t, one channel. */
DEVICE float convolve(const struct cuda_recur &a, int t, size_t channel) {
    const struct cuda_run &run = a.runs[a.run[t]];
    float sum = a.conv_bias ? a.conv_bias[channel] : 0.0f;
    for (int i = 0; i < a.conv; i++) {
        const int back = a.conv - 1 - i, pos = a.at[t].pos - back;
        const float *row = pos >= run.start ? row_at(a.row, a.stride, t - back) : log_row(a, run, pos);
        sum = fmaf(a.weight[(size_t)i * a.weight_stride + channel], row[channel], sum);
    }
    return sum;
}

/* x / sqrt(sum x^2 + eps), of queries / sqrt(n) too. */
DEVICE void norm_key(const struct cuda_recur &a, float *x, bool query, struct row_room &s) {
    const int n = a.state_dim;
    norm_row(x, x, {}, n, BMC_NORM_RMS, a.eps / (float)n, s);
    scale_row(x, query ? 1.0f / (float)n : 1.0f / sqrtf((float)n), n);
}

/* A head's decay, and how much of its values it takes in. */
DEVICE void prepare_values(const struct cuda_recur &a, int t, int h, const float *v, int pad) {
    float *row = row_at(a.row, a.stride, t), *rate = row + a.decay + h;
    const float dt = of_softplus(*rate + a.dt_bias[h], NULL);
    __syncthreads();                        /* all have read the rate before its place is taken */
    if (threadIdx.x == 0)
        *rate = (float)exp_exact((double)(a.decay_rate[h] * dt));
    if (a.delta && threadIdx.x == 0) {
        float *beta = row_at(a.beta, a.beta_stride, t) + h;
        *beta = f_sigmoid(*beta);
    }
    for (int i = (int)threadIdx.x; !a.delta && i < pad; i += (int)blockDim.x)
        row[a.d + (size_t)(h * pad + i)] = v[i] * dt;
}

/* A group's keys or queries, or a head's values. */
KERNEL(recur_prepare, 128, struct cuda_recur, struct row_room) {
    const int t = (int)blockIdx.x, part = (int)blockIdx.y, groups = a.n_groups, g = part % groups,
              h = part - 2 * groups;
    const int keys = groups * a.state_dim, pad = (a.v_dim + 15) / 16 * 16, inner = a.n_heads * a.v_dim;
    const bool query = part >= groups;
    const int q_from = a.delta ? 0 : inner + keys, k_from = a.delta ? keys : inner,
              v_from = a.delta ? 2 * keys : 0;
    const int n = h < 0 ? a.state_dim : a.v_dim,
              from = h >= 0 ? v_from + h * n : (query ? q_from : k_from) + g * n;
    float *y = h >= 0  ? row_at(a.v, a.values, t) + h * pad
               : query ? row_at(a.q, a.keys, t) + g * n
                       : row_at(a.row, a.stride, t) + a.k + g * n;
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x)
        y[i] = of_silu(convolve(a, t, (size_t)(from + i)), NULL);
    if (h >= 0) {
        for (int i = n + (int)threadIdx.x; i < pad; i += (int)blockDim.x)
            y[i] = 0;
        __syncthreads();
        prepare_values(a, t, h, y, pad);
    } else if (a.delta)
        norm_key(a, y, query, s);
}

/* What tokens do to one value of a head's state for every key, and what they read (recur in
 * ../kernels/vec.h); v NULL: d is given, q NULL: nothing is read. Strides in floats, token to token. */
struct walk {
    const float *decay, *k, *q, *v, *beta;
    float *d, *o;
    size_t row_stride, q_stride, v_stride, beta_stride;
};

/* All keys: with k an update of s, then s^T x; without it (decay s)^T x. */
DEVICE float sweep(float *s, int n_keys, float decay, const float *k, float d, const float *x) {
    float sum[4] = {};
    for (int first = 0; first < n_keys; first += 4)
        UNROLL(4)
        for (int c = 0; c < 4; c++) {
            const int i = first + c;
            if (i >= n_keys)
                break;
            float v = decay * s[i * 16];
            if (k) {
                v = fmaf(k[i], d, v);
                s[i * 16] = v;
            }
            sum[c] = x ? fmaf(x[i], v, sum[c]) : sum[c];
        }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

DEVICE void advance(const struct cuda_recur &a, float *s, const struct walk &w, int n_tok) {
    for (size_t t = 0; t < (size_t)n_tok; t++) {
        const float decay = w.decay[t * w.row_stride], *k = w.k + t * w.row_stride;
        float *d = w.d + t * w.row_stride;
        if (w.v)
            *d = w.beta[t * w.beta_stride] * (w.v[t * w.v_stride] - sweep(s, a.state_dim, decay, NULL, 0, k));
        const float o = sweep(s, a.state_dim, decay, k, *d, w.q ? w.q + t * w.q_stride : NULL);
        if (w.q)
            w.o[t * w.v_stride] = o;
    }
}

/* This thread's value of a slice of sixteen, of a run. */
struct slice { size_t at, decay, k, d, q, value, beta; };

/* Tokens [from, to) of the text: those before the run stand in the log. */
DEVICE void advance_all(const struct cuda_recur &a, const struct cuda_run &run, struct slice c, float *s,
                        int from, int to) {
    for (; from < least(to, run.start); from++) {
        float *row = log_row(a, run, from);
        const struct walk w = { row + c.decay, row + c.k, NULL, NULL, NULL, row + c.d, NULL, 0, 0, 0, 0 };
        advance(a, s, w, 1);
    }
    if (from >= to)
        return;
    const int t = run.first + from - run.start;
    float *row = row_at(a.row, a.stride, t);
    const struct walk w = {
        row + c.decay,
        row + c.k,
        row_at(a.q, a.keys, t) + c.q,
        a.delta ? row_at(a.v, a.values, t) + c.value : NULL,
        a.delta ? row_at(a.beta, a.beta_stride, t) + c.beta : NULL,
        row + c.d,
        row_at(a.o, a.values, t) + c.value,
        a.stride,
        a.keys,
        a.values,
        a.beta_stride,
    };
    advance(a, s, w, to - from);
}

/* Two slices of a run; a thread has one value of one, for every key. It leaves the state and its anchor as
 * the run says. */
KERNEL(recur_walk, 32, struct cuda_recur, struct no_room) {
    const struct cuda_run &run = a.runs[blockIdx.y];
    const int slice = (int)blockIdx.x * 2 + half_warp(), pad = (a.v_dim + 15) / 16 * 16, h = slice * 16 / pad;
    const int g = a.interleaved ? h % a.n_groups : h / (a.n_heads / a.n_groups);
    const size_t key = (size_t)(g * a.state_dim), value = (size_t)(slice * 16 + lane()),
                 floats = (size_t)a.state_dim * 16;
    const struct slice c = { (size_t)slice * floats + (size_t)lane(),
                             a.decay + (size_t)h,
                             a.k + key,
                             a.d + value,
                             key,
                             value,
                             (size_t)h };
    (void)s;
    if (value >= a.values)
        return;
    float *state = current_of(a, run) + c.at, *anchor = anchor_of(a, run) + c.at;
    const bool moves = run.next_base > run.base;
    int from = run.replay ? run.base : run.start;
    for (size_t i = 0; run.replay && i < floats; i += 16)
        state[i] = anchor[i];
    if (moves && run.next_base < from)
        advance_all(a, run, c, anchor, run.base, run.next_base);
    else if (moves) {
        advance_all(a, run, c, state, from, run.next_base);
        for (size_t i = 0; i < floats; i += 16)
            anchor[i] = state[i];
        from = run.next_base;
    }
    advance_all(a, run, c, state, from, run.start + run.n);
}

/* norm(o) silu(gate), of a head; Mamba 2: norm((o + D x) silu(gate)), of a group. */
KERNEL(recur_finish, 128, struct cuda_recur, struct row_room) {
    const int t = (int)blockIdx.x, piece = (int)blockIdx.y, pad = (a.v_dim + 15) / 16 * 16;
    const int heads = a.delta ? 1 : a.n_heads / a.n_groups, size = heads * a.v_dim, first = piece * size;
    const float *o = row_at(a.o, a.values, t), *v = row_at(a.v, a.values, t),
                *gate = row_at(a.gate, a.gate_stride, t) + first;
    float *y = row_at(a.out, a.out_stride, t) + first;
    if (a.delta)
        norm_row(y, o + piece * pad, { a.norm, NULL }, size, BMC_NORM_RMS, a.eps, s);
    for (int i = (int)threadIdx.x; i < size; i += (int)blockDim.x) {
        const int h = piece * heads + i / a.v_dim, at = h * pad + i % a.v_dim;
        const float x = a.delta ? y[i] : fmaf(a.skip[h], v[at], o[at]);
        y[i] = x * of_silu(gate[i], NULL);
    }
    if (!a.delta && a.norm)
        norm_row(y, y, { a.norm + first, NULL }, size, BMC_NORM_RMS, a.eps, s);
}

/* The log gets the rows of the run's last tokens. */
KERNEL(recur_keep, 256, struct cuda_recur, struct no_room) {
    const struct cuda_run &run = a.runs[blockIdx.y];
    const size_t i = blockIdx.x * blockDim.x + threadIdx.x;
    (void)s;
    for (int pos = most(run.next_base - a.n_before, run.start); i < a.state_row && pos < run.start + run.n;
         pos++)
        log_row(a, run, pos)[i] = row_at(a.row, a.stride, run.first + pos - run.start)[i];
}

/* out = c * conv(b * x), rows [b | c | x]: a thread has a channel of all tokens; b x stands in the place of
 * b. */
KERNEL(short_conv, 256, struct cuda_recur, struct no_room) {
    const size_t i = blockIdx.x * blockDim.x + threadIdx.x, dim = (size_t)a.dim;
    (void)s;
    for (int t = 0; i < dim && t < a.n_tok; t++) {
        float *row = row_at(a.row, a.stride, t);
        row[i] = row[i] * row[2 * dim + i];
        row_at(a.out, a.out_stride, t)[i] = convolve(a, t, i) * row[dim + i];
    }
}
