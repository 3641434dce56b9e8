/* Experts: a router's choice, the lists of tokens by expert, and the sum of what they give
 * (../layers/experts.c). */

enum { EXPERTS_MAX = 4096, ACTIVE_MAX = 256 };
struct route_room {
    float p[EXPERTS_MAX], choice[EXPERTS_MAX];
    double piece[256], largest, sum;
    int chosen[ACTIVE_MAX];
    float weight[ACTIVE_MAX];
};

/* Probabilities of all: the sum over e^(p - largest) is one thread's, in ascending order. */
DEVICE void softmax(struct route_room &s, int n) {
    const int t = (int)threadIdx.x;
    if (t < 16) {
        float top = -INFINITY;
        for (int e = lane(); e < n; e += 16)
            top = f_max(s.p[e], top);
        top = f_max_lane(top);
        if (t == 0) {
            s.largest = top;
            s.sum = 0;
        }
    }
    __syncthreads();
    for (int first = 0; first < n; first += 256) {
        if (first + t < n)
            s.piece[t] = exp_exact(s.p[first + t] - s.largest);
        __syncthreads();
        for (int e = 0; t == 0 && e < least(n - first, 256); e++)
            s.sum += s.piece[e];
        __syncthreads();
    }
    for (int e = t; e < n; e += (int)blockDim.x)
        s.p[e] = (float)(exp_exact(s.p[e] - s.largest) / s.sum);
}

/* The expert with the largest score, of equal ones the first: by sixteen threads. */
DEVICE int find_best(const float *choice, int n) {
    float top = -INFINITY;
    int at = n;
    for (int e = lane(); e < n; e += 16)
        top = f_max(choice[e], top);
    top = f_max_lane(top);
    for (int e = lane(); e < n; e += 16)
        at = choice[e] == top ? least(at, e) : at;
    return i_min(at);
}

/* The weights of the chosen: of one thread. */
DEVICE void weigh_chosen(const struct cuda_route &a, struct route_room &s) {
    const int n = a.n_active;
    double sum = 0;
    if (a.gating == BMC_GATING_CHOSEN) {
        float largest = -INFINITY;
        for (int i = 0; i < n; i++)
            largest = s.weight[i] > largest ? s.weight[i] : largest;
        for (int i = 0; i < n; i++)
            sum += exp_exact((double)s.weight[i] - largest);
        for (int i = 0; i < n; i++)
            s.weight[i] = (float)(exp_exact((double)s.weight[i] - largest) / sum);
    }
    sum = 0;
    for (int i = 0; i < n; i++)
        sum += s.weight[i];
    for (int i = 0; i < n; i++)
        s.weight[i] *= (a.renorm ? 1.0f / (float)fmax(sum, 6.103515625e-5) : 1.0f) * a.scale;
}

/* Ascending by expert. */
DEVICE void choose(const struct cuda_route &a, struct route_room &s) {
    for (int n = 0; n < a.n_active; n++) {
        const int best = find_best(s.choice, a.n_experts);
        __syncwarp(0xffff);             /* all have read what the first thread changes now */
        if (threadIdx.x == 0) {
            int at = n;
            s.choice[best] = -INFINITY;
            for (; at > 0 && s.chosen[at - 1] > best; at--) {
                s.chosen[at] = s.chosen[at - 1];
                s.weight[at] = s.weight[at - 1];
            }
            s.chosen[at] = best;
            s.weight[at] = s.p[best];
        }
        __syncwarp(0xffff);
    }
    if (threadIdx.x == 0)
        weigh_chosen(a, s);
}

KERNEL(route, 256, struct cuda_route, struct route_room) {
    const int t = (int)threadIdx.x, n = a.n_experts;
    const float *scores = a.scores + blockIdx.x * a.stride;
    for (int e = t; e < n; e += (int)blockDim.x)
        s.p[e] = scores[e];
    __syncthreads();
    if (a.gating == BMC_GATING_SOFTMAX)
        softmax(s, n);
    for (int e = t; e < n; e += (int)blockDim.x) {
        if (a.gating == BMC_GATING_SIGMOID)
            s.p[e] = (float)(1 / (1 + exp_exact(-(double)s.p[e])));
        s.choice[e] = fmaxf(a.choice_bias ? s.p[e] + a.choice_bias[e] : s.p[e],
                            -3.402823466e38f); /* NaN is last, and chosen once */
    }
    __syncthreads();
    if (t == 0 && a.groups > 1)
        keep_groups(s.choice, n, a.groups, a.groups_used);
    __syncthreads();
    if (t < 16)
        choose(a, s);
    __syncthreads();
    for (int i = t; i < a.n_active; i += (int)blockDim.x) {
        a.chosen[blockIdx.x * (unsigned)a.n_active + (unsigned)i] = s.chosen[i];
        a.weight[blockIdx.x * (unsigned)a.n_active + (unsigned)i] = s.weight[i];
    }
}

/* Each thread counts and then places the entries of its own experts: no order depends on the grid. */
struct sort_room { int first[EXPERTS_MAX + 1]; };
KERNEL(sort_experts, 256, struct cuda_sort, struct sort_room) {
    const int t = (int)threadIdx.x, n = a.n_tok * a.n_active;
    for (int e = t; e < a.n_experts; e += (int)blockDim.x) {
        int count = 0;
        for (int i = 0; i < n; i++)
            count += a.chosen[i] == e;
        s.first[e + 1] = count;
    }
    __syncthreads();
    if (t == 0) {
        int used = 0;
        s.first[0] = 0;
        for (int e = 0; e < a.n_experts; e++) {
            if (s.first[e + 1])
                a.used[used++] = e;
            s.first[e + 1] += s.first[e];
        }
        for (; used < a.n_slots; used++)
            a.used[used] = -1;
    }
    __syncthreads();
    for (int e = t; e <= a.n_experts; e += (int)blockDim.x) {
        int at = s.first[e];
        a.first[e] = at;
        for (int i = 0; e < a.n_experts && at < s.first[e + 1]; i++)
            if (a.chosen[i] == e) {
                a.tok[at] = i / a.n_active;
                a.entry[i] = at++;
            }
    }
}

KERNEL(combine, 256, struct cuda_combine, struct no_room) {
    const size_t d = blockIdx.y * blockDim.x + threadIdx.x, first = blockIdx.x * (size_t)a.n_active;
    float *y = a.y + blockIdx.x * a.y_stride + d;
    (void)s;
    if (d >= (size_t)a.dim)
        return;
    float sum = a.add ? *y : 0.0f;
    for (size_t i = first; i < first + (size_t)a.n_active; i++)
        sum = fmaf(a.weight[i], a.rows[(size_t)a.entry[i] * a.rows_stride + d], sum);
    *y = sum;
}

KERNEL(switch_on, 256, struct cuda_switch, struct no_room) {
    const size_t d = blockIdx.y * blockDim.x + threadIdx.x;
    float *y = a.y + blockIdx.x * a.y_stride + d;
    (void)s;
    if (d < (size_t)a.dim)
        *y = fmaf(f_sigmoid(a.gate[blockIdx.x * a.gate_stride]), a.x[blockIdx.x * a.x_stride + d], *y);
}
