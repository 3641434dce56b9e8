/* One number for the bits of each kernel's outputs, from inputs that integers make: a line a kernel, equal on
 * every ISA here, and (make test-arm) on every machine. */
#include "check.h"
#include "cpu.h"
#include "exp.h"
#include "pack.h"
#include "panels.h"

#include <math.h>
#include <string.h>

static uint64_t state = 88172645463325252u, hash = 0xcbf29ce484222325u;

static void fold(const void *p, size_t bytes) {
    for (size_t i = 0; i < bytes; i++)
        hash = (hash ^ ((const uint8_t *)p)[i]) * 0x100000001b3u;       /* FNV-1a */
}

/* The reference's line is printed, every other ISA's is the same. */
static void line(const struct kernels *k, int at, const char *name) {
    static uint64_t lines[64];
    if (!strcmp(k->name, "ref")) {
        printf("%-10s %016llx\n", name, (unsigned long long)hash);
        lines[at] = hash;
    }
    CHECK(hash == lines[at]);
    state = 88172645463325252u, hash = 0xcbf29ce484222325u;
}

static void numbers(float *x, int n, float size) {
    for (int i = 0; i < n; i++)
        x[i] = (float)(random_below(&state, 1 << 25) - (1 << 24)) * 0x1p-24f * size;
}

/* Any bytes but for one bit, so that no f16, bf16 or float among them is infinite or NaN. */
static void bytes(void *p, size_t n, int but) {
    for (size_t i = 0; i < n; i++)
        ((uint8_t *)p)[i] = (uint8_t)(random_bits(&state) & ~(uint64_t)but);
}

static void panels(const struct kernels *k, int type) {
    enum { PANELS = 5, ROWS = 16 * PANELS - 3, K = 512 };
    static uint8_t codes[PANELS * K * 64], scales[PANELS * K * 4];
    static float x[TILE_COLS * K], bias[ROWS], out[TILE_COLS * ROWS];
    static struct act_block act[TILE_COLS * K / 32];
    struct panel_size size = panel_size(type, K);
    CHECK(PANELS * size.codes <= sizeof codes && PANELS * size.scales <= sizeof scales);
    memset(out, 0, sizeof out);
    bytes(codes, PANELS * size.codes, panel_quantized(type) ? 0 : 0x40);
    bytes(scales, PANELS * size.scales, 0x40);
    numbers(x, TILE_COLS * K, 3);
    numbers(bias, ROWS, 10);
    for (int n = 1; n <= TILE_COLS; n++) {
        for (int col = 0; col < n; col++)
            k->quantize(act + col, n, x + col * K, K / 32);
        k->panel[type](&(struct panel_job){
            .codes = codes, .scales = scales, .code_stride = size.codes, .scale_stride = size.scales,
            .n_panels = PANELS, .n_rows = ROWS,
            .k = K, .n_cols = n, .act = act, .x = x, .x_stride = K, .bias = n % 2 ? bias : NULL, .out = out,
            .out_stride = ROWS, .add = n % 3 == 2,
        });
        fold(out, (size_t)(n * ROWS) * sizeof *out);
    }
}

/* Chunks in a row, and each alone and merged after, give the same. softcap: 0, or with ALiBi too. */
static void attention(const struct kernels *k, int head_dim, float softcap) {
    enum { MOST = 256, CHUNKS = 2 };
    static uint16_t cache[CHUNKS * CHUNK / TILE][2 * TILE * MOST];
    static float q[ATTN_ROWS * MOST], o[ATTN_ROWS * MOST], alone[ATTN_ROWS * MOST], merged[ATTN_ROWS * MOST],
        row[2 * MOST];
    int v_dim = (head_dim + 15) / 16 * 16;
    for (int n = 1; n <= ATTN_ROWS; n++) {
        float m[ATTN_ROWS], l[ATTN_ROWS] = { 0 }, merged_m[ATTN_ROWS], merged_l[ATTN_ROWS] = { 0 };
        memset(o, 0, sizeof o);
        memset(merged, 0, sizeof merged);
        numbers(q, n * head_dim, 2);
        for (int i = 0; i < n; i++)
            m[i] = merged_m[i] = -INFINITY;
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            const uint16_t *tiles[CHUNK / TILE];
            const float *rows[ATTN_ROWS];
            int first[ATTN_ROWS], limit[ATTN_ROWS], own[ATTN_ROWS];
            float slope[ATTN_ROWS];
            for (int i = 0; i < CHUNK / TILE; i++)
                tiles[i] = cache[chunk * (CHUNK / TILE) + i];
            for (int t = 0; t < CHUNK; t++) {
                numbers(row, 2 * head_dim, random_below(&state, 50) ? 1.0f : 1e5f * (float)(t % 2));
                k->store_kv(cache[chunk * (CHUNK / TILE) + t / TILE], t % TILE, row, row + head_dim, head_dim,
                            head_dim);
            }
            for (int i = 0; i < n; i++) {
                rows[i] = q + i * head_dim;
                first[i] = (int)random_below(&state, 100);
                limit[i] = CHUNK - (int)random_below(&state, 100);
                own[i] = 2 * CHUNK - chunk * CHUNK - i;
                slope[i] = 1.0f / (float)(8 + i);
            }
            float alone_m[ATTN_ROWS], alone_l[ATTN_ROWS] = { 0 };
            struct attn_job job = { .tiles = tiles,
                                    .head_dim = head_dim,
                                    .v_dim = v_dim,
                                    .n_rows = n,
                                    .q = rows,
                                    .first = first,
                                    .limit = limit,
                                    .m = m,
                                    .l = l,
                                    .o = o,
                                    .softcap = softcap,
                                    .slope = softcap > 0 ? slope : NULL,
                                    .at = own };
            k->attend(&job);
            memset(alone, 0, sizeof alone);
            for (int i = 0; i < n; i++)
                alone_m[i] = -INFINITY;
            job.m = alone_m, job.l = alone_l, job.o = alone;
            k->attend(&job);
            for (int i = 0; i < n; i++)
                k->attend_merge(&merged_m[i], &merged_l[i], merged + i * v_dim, alone_m[i], alone_l[i],
                                alone + i * v_dim, v_dim);
            /* Nothing seen: nothing changes. */
            k->attend_merge(merged_m, merged_l, merged, -INFINITY, 0, alone, v_dim);
        }
        CHECK(!memcmp(m, merged_m, (size_t)n * sizeof *m) && !memcmp(l, merged_l, (size_t)n * sizeof *l));
        CHECK(!memcmp(o, merged, (size_t)(n * v_dim) * sizeof *o));
        fold(l, sizeof l);
        for (int i = 0; i < n; i++) {
            k->attend_end(row, o + i * v_dim, l[i], head_dim);
            fold(row, (size_t)head_dim * sizeof *row);
        }
    }
}

static void rows(const struct kernels *k) {
    enum { N = 333 };
    static const float xielu[] = { 0.8f, 1.3f, 0.5f, -1e-6f };
    float x[N], a[N], b[N], y[N];
    struct act_block act[N / 32] = { 0 };
    for (int size = 1; size < 100; size += 7) {
        numbers(x, N, (float)size);
        numbers(a, N, 2);
        numbers(b, N, (float)size);
        k->quantize(act, 1, x, N / 32), fold(act, sizeof act);
        k->rmsnorm(y, x, a, NULL, N, 1e-5f), fold(y, sizeof y);
        k->rmsnorm(y, x, NULL, b, N, 1e-5f), fold(y, sizeof y);
        k->layernorm(y, x, a, b, N, 1e-5f), fold(y, sizeof y);
        for (int f = 0; f < BMC_ACTS; f++)
            k->act[f](y, a, x, N, xielu), fold(y, sizeof y);
        k->add(y, x, N), fold(y, sizeof y);
        k->scale(y, a[0], N), fold(y, sizeof y);
        k->mul(y, x, N), fold(y, sizeof y);
        k->axpy(y, a[1], x, N), fold(y, sizeof y);
        k->softcap(y, 30, N), fold(y, sizeof y);
        y[0] = k->largest(x, N);
        y[1] = k->sum_exp(x, y[0], N);
        k->rope_pairs(y, a, b, N - 1), fold(y, sizeof y);
        k->rope_halves(y, a, b, N - 1), fold(y, sizeof y);
    }
}

/* Convolutions of 1 to 5 rows, then their results as keys, values and queries of a recurrence. */
static void recurrences(const struct kernels *k) {
    enum { TOKENS = 9, N = 150, STRIDE = 160 };
    float x[(TOKENS + 4) * N], weight[5 * STRIDE], bias[N], y[TOKENS][N], s[N * 16], d[TOKENS * 16],
        o[TOKENS * 16];
    for (int width = 1; width <= 5; width++) {
        numbers(x, (TOKENS + 4) * N, 1);
        numbers(weight, 5 * STRIDE, 0.5f);
        numbers(bias, N, 0.1f);
        numbers(s, N * 16, 1);
        for (int t = 0; t < TOKENS; t++) {
            const float *rows[5];
            for (int i = 0; i < width; i++)
                rows[i] = x + (t + i) * N;
            k->conv(y[t], rows, weight, (N + 15) / 16 * 16, width % 2 ? bias : NULL, width, N);
            k->scale(y[t], 0.1f, N);
        }
        fold(y, sizeof y);
        k->recur(&(struct recur_job){
            .s = s, .n_keys = N - 30 + width, .n_tok = TOKENS, .decay = x, .k = y[0], .q = y[0] + 20,
            .v = x + 1,
            .beta = x + 17, .d = d, .o = o, .decay_stride = N, .k_stride = N, .q_stride = N, .v_stride = N,
            .beta_stride = N, .d_stride = 16, .o_stride = 16,
        });
        fold(s, sizeof s), fold(d, sizeof d), fold(o, sizeof o);
    }
}

/* Experts' probabilities and states' decay. */
static void exponentials(void) {
    for (int i = -2000; i <= 2000; i++) {
        const double y = exp_exact(i * 0.31);
        fold(&y, sizeof y);
    }
}

static void every_kernel(const struct kernels *k) {
    int at = 0;
    for (int type = 0; type < N_TYPES; type++)
        if (panel_runs(type)) {
            panels(k, type);
            line(k, at++, types[type].name);
        }
    attention(k, 128, 0);
    line(k, at++, "attend 128");
    attention(k, 80, 0);
    line(k, at++, "attend 80");
    attention(k, 32, 20);
    line(k, at++, "softcap");
    rows(k);
    line(k, at++, "rows");
    recurrences(k);
    line(k, at++, "recur");
    exponentials();
    line(k, at++, "exp");
}

int main(void) {
    struct kernels k;
    for (int level = 0; kernels_at(level, &k); level++)
        every_kernel(&k);
    return 0;
}
