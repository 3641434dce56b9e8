/* Every kernel of native/cuda on the CPU grid: the bits of the CPU's own code, with threads in ascending
 * order and in shuffled ones.
 *
 * Each check has one set of arguments. The CPU's code works on it, then the kernel on the same memory as it
 * was before; what both leave in the outputs is compared byte for byte, guards round them included.
 *
 * test_kernels FILE: the kernels of a file of PTX instead. */
#include "ptx_grid.h"

#ifdef FEW_TYPES
#include "few_types.h"
#endif
#include "../../native/cuda/kernels.cu"

extern "C" {
#include "reference.h"
}

#include <functional>
#include <initializer_list>
#include <stdarg.h>
#include <string>
#include <vector>

static int n_checks, n_bad;
static ptx_module compiled;             /* the kernels of a file, if there is one */

static const grid_kernel *find_kernel(const std::string &name) {
    return compiled.kernels.empty() ? grid_find(name.c_str()) : compiled.find(name);
}
static bool has_mma(void) { return compiled.kernels.empty() || compiled.read.target >= 80; }

/* floats: bytes of a float where it consists of such (tiles are f16), else 0. */
struct output { void *p; size_t bytes, floats; };
template <class T> static output out(std::vector<T> &v) { return { v.data(), v.size() * sizeof(T), 0 }; }
static output out(std::vector<float> &v) { return { v.data(), v.size() * sizeof v[0], sizeof(float) }; }
static output out(std::vector<cuda_best> &v) { return { v.data(), v.size() * sizeof v[0], sizeof(float) }; }
static output out(std::vector<char> &v) { return { v.data(), v.size(), sizeof(uint16_t) }; }

static std::string bytes_of(const std::vector<output> &outs) {
    std::string all;
    for (const output &o : outs)
        all.append((const char *)o.p, o.bytes);
    return all;
}

static void restore(const std::vector<output> &outs, const std::string &bytes) {
    size_t at = 0;
    for (const output &o : outs) {
        memcpy(o.p, bytes.data() + at, o.bytes);
        at += o.bytes;
    }
}

/* The bits of NaN are the machine's: a GPU has one NaN. Here as well, then. */
static std::string with_one_nan(const std::vector<output> &outs, std::string bytes) {
    char *at = bytes.empty() ? NULL : &bytes[0];
    for (const output &o : outs) {
        for (size_t i = 0; o.floats && i + o.floats <= o.bytes; i += o.floats) {
            uint32_t x = 0;
            memcpy(&x, at + i, o.floats);
            if (o.floats == 4 ? (x & INT32_MAX) > 0x7f800000 : (x & INT16_MAX) > 0x7c00)
                memset(at + i, 0x7f, o.floats);
        }
        at += o.bytes;
    }
    return bytes;
}

/* The outputs have the bytes that the reference gave them. */
static void check(const std::string &what, const std::vector<output> &outs,
                  const std::function<void()> &reference, const std::function<void()> &kernel) {
    const std::string before = bytes_of(outs);
    reference();
    const std::string expected = bytes_of(outs);
    if (expected == before) {
        printf("%s: the reference changed nothing\n", what.c_str());
        n_bad++;
    }
    for (uint32_t order : { 0u, 77u }) {
        restore(outs, before);
        grid.order = order;
        kernel();
        const std::string found = bytes_of(outs);
        n_checks++;
        if (found == expected
            || (!compiled.kernels.empty() && with_one_nan(outs, found) == with_one_nan(outs, expected)))
            continue;
        size_t at = 0;
        while (found[at] == expected[at])
            at++;
        printf("%s, order %u: other bits, first at byte %zu of %zu\n", what.c_str(), order, at, found.size());
        n_bad++;
    }
}

template <class A> static void launch(const std::string &name, cuda_grid g, const A &args) {
    const grid_kernel *kernel = find_kernel(name);
    if (!kernel || kernel->args != sizeof args) {
        printf("%s: no such kernel, or of other arguments\n", name.c_str());
        exit(1);
    }
    const char *wrong = grid_launch(kernel, { g.x, g.y, g.z }, g.threads, &args);
    if (*wrong) {
        printf("%s\n", wrong);
        n_bad++;
    }
}

static std::vector<float> noises(size_t n, float by = 1) {
    std::vector<float> x(n);
    for (float &v : x)
        v = noise() * by;
    return x;
}

static std::vector<act_block> blocks(size_t n) {
    std::vector<act_block> b(n);
    memset((void *)b.data(), 0x11, n * sizeof b[0]);
    return b;
}

static std::string text(const char *format, ...) __attribute__((format(printf, 1, 2)));
static std::string text(const char *format, ...) {
    char line[200];
    va_list list;
    va_start(list, format);
    vsnprintf(line, sizeof line, format, list);
    va_end(list);
    return line;
}

/* ---- products ---- */

/* A matrix, or several experts', with activations. */
struct weights {
    int type, rows, k, n_tok;
    std::vector<packed> parts;
    std::vector<uint8_t> codes, scales;
    std::vector<float> x, bias, factors;
    std::vector<act_block> act;
    cuda_product args;
};

static weights new_weights(int type, int rows, int k, int n_tok, int n_experts) {
    weights w = {};
    const size_t stride = (size_t)(k + 15) / 16 * 16;
    w.type = type, w.rows = rows, w.k = k, w.n_tok = n_tok;
    for (int e = 0; e < n_experts; e++) {
        const packed p = random_panels(type, rows, k);
        const size_t panels = (size_t)(rows + 15) / 16;
        w.codes.insert(w.codes.end(), p.codes, p.codes + panels * p.code_stride);
        w.scales.insert(w.scales.end(), p.scales, p.scales + panels * p.scale_stride);
        w.args.code_stride = p.code_stride;
        w.args.scale_stride = p.scale_stride;
        free(p.codes), free(p.scales);
    }
    w.x = noises((size_t)n_tok * stride);
    w.bias = noises((size_t)(rows * n_experts));
    w.factors = noises((size_t)n_experts);
    w.act = blocks((size_t)((n_tok + 1) * (k / 32)));
    const cuda_quantize q = { n_tok, k / 32, w.x.data(), stride, w.act.data(), n_tok + 1 };
    reference_quantize(&q);
    return w;
}

static cuda_product product_args(weights &w, int with_bias, int add, float factor, std::vector<float> &result,
                                 int stride) {
    cuda_product a = w.args;
    a.codes = w.codes.data(), a.scales = w.scales.data();
    a.n_rows = w.rows, a.k = w.k, a.n_tok = w.n_tok;
    a.act = w.act.data(), a.act_stride = w.n_tok + 1;
    a.x = w.x.data(), a.x_stride = (size_t)(w.k + 15) / 16 * 16;
    a.bias = with_bias ? w.bias.data() : NULL;
    a.factor = factor, a.add = add;
    a.out = result.data(), a.out_stride = (size_t)stride;
    return a;
}

static void check_product(int type, cuda_way way, int rows, int k, int n_tok) {
    weights w = new_weights(type, rows, k, n_tok, 1);
    const int mode = n_tok + rows, stride = rows + 3;
    std::vector<float> result = noises((size_t)(n_tok * stride));
    const cuda_product a = product_args(w, mode & 1, mode >> 1 & 1, mode % 3 ? 0.0f : 0.7f, result, stride);
    const std::string name = std::string(cuda_way_name(way)) + "_" + cuda_type_name(type);
    check(
        text("%s: %d rows, %d columns, %d tokens", name.c_str(), rows, k, n_tok), { out(result) },
        [&] { reference_product(type, &a); }, [&] { launch(name, product_grid(way, &a), a); });
}

/* Two matrices in a launch are what two launches are. */
static void check_two(int type, cuda_way way, int n_tok) {
    const int rows = 21, stride = 32, add = n_tok % 2;
    weights w = new_weights(type, rows, 256, n_tok, 2);
    std::vector<float> result = noises((size_t)(n_tok * stride)), second = noises((size_t)(n_tok * stride));
    cuda_product a = product_args(w, 1, add, 0, result, stride), b = a;
    b.codes += w.codes.size() / 2, b.scales += w.scales.size() / 2, b.bias += rows, b.factor = 0.7f;
    b.out = second.data();
    a.beside = { b.codes, b.scales, b.bias, b.factor, b.out };
    const std::string name = std::string(cuda_way_name(way)) + "_" + cuda_type_name(type);
    check(
        text("%s: two, %d tokens", name.c_str(), n_tok), { out(result), out(second) },
        [&] { reference_product(type, &a), reference_product(type, &b); },
        [&] { launch(name, product_grid(way, &a), a); });
}

/* Experts: 5 of them, of which one has no token. */
static void check_experts(int type, cuda_way way, int gathers) {
    enum { EXPERTS = 5, TOKENS_OF_PASS = 9, ENTRIES = 18, SLOTS = 5 };
    static const int32_t first[EXPERTS + 1] = { 0, 7, 8, 8, 17, 18 }, used[SLOTS] = { 0, 1, 3, 4, -1 };
    static const int32_t tok[ENTRIES] = { 0, 1, 2, 4, 6, 7, 8, 3, 0, 1, 2, 3, 4, 5, 6, 7, 8, 5 };
    const int rows = 21, k = 256, stride = 32;
    weights w = new_weights(type, rows, k, gathers ? TOKENS_OF_PASS : ENTRIES, EXPERTS);
    std::vector<float> result = noises(ENTRIES * stride);
    cuda_product a = product_args(w, gathers, 0, 0, result, stride);
    a.lists = { used, first, tok, SLOTS, TOKENS_OF_PASS };
    a.gathers = gathers;
    a.expert_codes = w.codes.size() / EXPERTS, a.expert_scales = w.scales.size() / EXPERTS,
    a.expert_bias = (size_t)rows;
    a.factors = gathers ? w.factors.data() : NULL;
    const std::string name = std::string(cuda_way_name(way)) + "_" + cuda_type_name(type);
    check(
        text("%s: experts, gathers %d", name.c_str(), gathers), { out(result) },
        [&] { reference_product(type, &a); }, [&] { launch(name, product_grid(way, &a), a); });
}

/* Widths that each way is made for and others: one group of tokens, a part of one, several. */
static const struct { cuda_way way; std::initializer_list<int> widths; } quantized_ways[] = {
    { NARROW1, { 1, 2 } },     { NARROW2, { 2, 1, 3 } },   { NARROW4, { 4, 3, 6 } }, { WIDE8, { 8, 5, 9 } },
    { WIDE16, { 16, 9, 17 } }, { WIDE32, { 32, 17, 64 } }, { TILES, { 64, 7, 70 } },
};

static void products_of_type(int type) {
    int turn = type;
    for (const auto &w : quantized_ways)
        for (int n : w.widths) {
            if (w.way > NARROW4 && !has_mma())
                continue;
            const int rounds = turn++ % 3; /* one block and fewer than a round of them; one round; several */
            check_product(type, w.way, turn % 2 ? 37 : 16, rounds == 0 ? 256 : rounds == 1 ? 1024 : 1280, n);
        }
    if (has_mma())
        check_product(type, TILES, 16 * 9 + 5, 256, 3);
    for (cuda_way way : { NARROW4, WIDE8, TILES })
        if (way == NARROW4 || has_mma())
            check_experts(type, way, turn++ % 2);
    for (cuda_way way : { NARROW1, WIDE8 })
        if (way == NARROW1 || has_mma())
            check_two(type, way, way == NARROW1 ? 1 : 7);
}

static void every_product(void) {
#define CHECK_TYPE(TYPE, name, ...) \
    if (find_kernel("narrow1_" #name)) \
        products_of_type(TYPE);
    PANEL_TYPES(CHECK_TYPE)
#undef CHECK_TYPE
}

/* Columns that are no multiple of anything: only float weights have those. */
static void float_products(void) {
    for (int type : { TYPE_F32, TYPE_F16, TYPE_BF16 }) {
        for (int n : { 1, 3, 8, 9, 20 })
            check_product(type, FLOATS, n % 2 ? 37 : 16, n % 3 ? 100 : 64, n);
        for (int n : { 1, 9 })          /* more stretches than are under way at a time */
            check_product(type, FLOATS, 37, 900, n);
        for (int n : { 5, 64, 70 })
            check_product(type, FLOAT_TILES, n % 2 ? 37 : 70, n % 5 ? 100 : 48, n);
        for (cuda_way way : { FLOATS, FLOAT_TILES })
            check_experts(type, way, way == FLOATS);
        check_two(type, FLOATS, 3);
    }
}

/* ---- prompts by cuBLAS ---- */

/* The weights of a matrix, (rows, k): what the CPU's products with tokens of a single 1 give. */
static std::vector<float> weights_by_products(weights &w) {
    const int k = w.k;
    std::vector<float> x((size_t)(k * ((k + 15) / 16 * 16))), result((size_t)(w.rows * k));
    std::vector<act_block> act = blocks((size_t)(k * (k / 32 + 1)));
    cuda_product a = product_args(w, 0, 0, 0, result, w.rows);
    a.n_tok = a.act_stride = k, a.act = act.data(), a.x = x.data();
    for (int t = 0; t < k; t++) {
        x[(size_t)t * a.x_stride + (size_t)t] = 1;
        for (int b = 0; b < k / 32; b++) {
            act_block *one = &act[(size_t)(b * k + t)];
            memset(one, 0, sizeof *one);
            one->q[t % 32] = t / 32 == b;
            act_set(one, 1, t / 32 == b && t % 32 < 16, t / 32 == b && t % 32 >= 16);
        }
    }
    reference_product(w.type, &a);
    std::vector<float> by_row(result.size());
    for (int r = 0; r < w.rows; r++)
        for (int c = 0; c < k; c++)
            by_row[(size_t)(r * k + c)] = result[(size_t)(c * w.rows + r)];
    return by_row;
}

/* Rows of n floats as f16, the largest of each in [2^14, 2^15). */
static void halve_rows(const float *x, size_t x_stride, int rows, int n, uint16_t *out, size_t stride,
                       float *powers) {
    for (int r = 0; r < rows; r++) {
        float largest = 0;
        int exponent = 0;
        for (int i = 0; i < n; i++)
            largest = fmaxf(largest, fabsf(x[(size_t)r * x_stride + (size_t)i]));
        frexpf(largest, &exponent);     /* largest < 2^exponent */
        exponent = largest >= 0x1p-112f ? exponent : -111;
        powers[r] = ldexpf(1, exponent - 15);
        for (size_t i = 0; i < stride; i++)
            out[(size_t)r * stride + i] =
                (int)i < n ? f32_to_f16(ldexpf(x[(size_t)r * x_stride + i], 15 - exponent)) : 0;
    }
}

/* A product with a single 1 has no zero of the other sign. */
static void no_minus_zero(std::vector<uint16_t> &halves) {
    for (uint16_t &h : halves)
        h = h == 0x8000 ? 0 : h;
}

static void check_halves(int type, int rows, int k) {
    weights w = new_weights(type, rows, k, 1, 1);
    const size_t stride = (size_t)(k + 15) / 16 * 16, n = (size_t)rows * stride;
    std::vector<uint16_t> halves(n + 8, 7);
    std::vector<float> powers = noises((size_t)rows + 3), unused(1), values = weights_by_products(w);
    cuda_halves a = {};
    a.of = product_args(w, 0, 0, 0, unused, 1);
    a.out = halves.data(), a.stride = stride, a.powers = powers.data();
    const std::string name = std::string("halves_") + cuda_type_name(type);
    check(
        text("%s: %d rows, %d columns", name.c_str(), rows, k), { out(halves), out(powers) },
        [&] {
            halve_rows(values.data(), (size_t)k, rows, k, halves.data(), stride, powers.data());
            no_minus_zero(halves);
        },
        [&] {
            launch(name, halves_grid(&a), a);
            no_minus_zero(halves);
        });
}

static void halves_of_weights(void) {
#define CHECK_HALVES(TYPE, ...) check_halves(TYPE, TYPE % 2 ? 37 : 16, TYPE % 2 ? 512 : 1024);
    CUDA_TYPES(CHECK_HALVES)
#undef CHECK_HALVES
    for (int type : { TYPE_F32, TYPE_F16, TYPE_BF16 })
        for (int k : { 100, 64 })
            check_halves(type, k == 64 ? 16 : 37, k);
}

/* Activations that f16 does not hold as they are: too large, too small, all zero. */
static void halves_of_tokens(void) {
    static const float sizes[] = { 1, 1e6f, 3e-9f, 0, 1e38f, 1e-38f, 0x1p-112f, 65504 };
    const int n = sizeof sizes / sizeof *sizes;
    for (int k : { 64, 100, 2080 }) {
        const size_t x_stride = (size_t)k + 5, stride = (size_t)(k + 15) / 16 * 16;
        std::vector<float> x = noises(n * x_stride), powers = noises((size_t)n + 1);
        std::vector<uint16_t> halves(n * stride + 8, 7);
        for (size_t i = 0; i < x.size(); i++)
            x[i] *= sizes[i / x_stride];
        const cuda_halve_tokens a = { n, k, x.data(), x_stride, halves.data(), stride, powers.data() };
        check(
            text("halve_tokens: %d values", k), { out(halves), out(powers) },
            [&] { halve_rows(x.data(), x_stride, n, k, halves.data(), stride, powers.data()); },
            [&] { launch("halve_tokens", halve_tokens_grid(&a), a); });
        for (uint16_t h : halves)
            if ((h & 0x7c00) == 0x7c00) {
                printf("halve_tokens: %d values: one overflows\n", k);
                n_bad++;
            }
    }
}

static void finishing(void) {
    const int n_tok = 5, rows = 301;
    for (int mode = 0; mode < 8; mode++) {
        std::vector<float> sums = noises(n_tok * 304), row_powers(rows), token_powers(n_tok),
                           bias = noises(rows), result = noises(n_tok * 310);
        for (float &p : row_powers)
            p = ldexpf(1, (int)(random_number() % 40) - 20);
        for (float &p : token_powers)
            p = ldexpf(1, (int)(random_number() % 40) - 20);
        const cuda_finish a = { n_tok, rows, sums.data(), 304, row_powers.data(), token_powers.data(),
                                mode & 1 ? bias.data() : NULL, mode & 2 ? 0.7f : 0, result.data(), 310,
                                mode >> 2 };
        check(
            text("finish: mode %d", mode), { out(result) },
            [&] {
                for (int t = 0; t < n_tok; t++)
                    for (int r = 0; r < rows; r++) {
                        float y = sums[(size_t)(t * 304 + r)] * row_powers[r] * token_powers[t];
                        y = mode & 2 ? 0.7f * y + (mode & 1 ? bias[r] : 0) : mode & 1 ? y + bias[r] : y;
                        result[(size_t)(t * 310 + r)] = (mode & 4 ? result[(size_t)(t * 310 + r)] : 0) + y;
                    }
            },
            [&] { launch("finish", finish_grid(&a), a); });
    }
}

/* What product_way chooses is a kernel that is there, and a grid that covers every row and token. */
static void every_way_exists(void) {
    for (int type : { TYPE_Q4_0, TYPE_F16 })
        for (int mma = 0; mma <= has_mma(); mma++)
            for (int n = 1; n <= 130; n++) {
                cuda_product a = {};
                a.n_tok = n, a.n_rows = 137;
                const cuda_way way = product_way(type, &a, mma);
                const cuda_grid g = product_grid(way, &a);
                const cuda_tile tile = product_tile(way);
                const std::string name = std::string(cuda_way_name(way)) + "_" + cuda_type_name(type);
                n_checks++;
                if (!find_kernel(name) || (int)g.y * tile.tokens < n
                    || (int)g.x * tile.panels * 16 < 137 || g.z != 1) {
                    printf("%s: %d tokens, grid %u, %u, %u\n", name.c_str(), n, g.x, g.y, g.z);
                    n_bad++;
                }
            }
}

/* ---- rows ---- */

static void norms(void) {
    for (int dim : { 64, 100, 4128 })
        for (int mode = 0; mode < 8; mode++) {
            const int n = 3;
            const size_t stride = (size_t)(dim + 15) / 16 * 16, size = n * stride;
            std::vector<float> x = noises(size, 3), y0 = noises(size), y1 = noises(size),
                               input = noises(size), result = noises(size), w = noises(8 * stride);
            std::vector<act_block> act = blocks((size_t)((n + 1) * (dim / 32 + 1)));
            cuda_norm a = {};
            a.n_tok = n, a.dim = dim, a.stride = stride, a.x = x.data(), a.y[0] = y0.data(),
            a.y[1] = y1.data();
            a.n_waits = mode % 3, a.scale[0] = mode & 1 ? 0.5f : 1, a.scale[1] = 1.25f,
            a.result_scale = mode & 4 ? 0.3f : 1, a.sum_scale = mode & 2 ? 0.7f : 1;
            std::vector<float> others = noises(2 * size);
            if (mode > 5)
                a.others = others.data(), a.others_stride = 2 * stride, a.n_others = 2;
            const float *row[8];
            for (int i = 0; i < 8; i++)
                row[i] = w.data() + (size_t)i * stride;
            if (mode != 1)
                a.post[0] = { row[0], row[1] };
            if (mode & 2)
                a.post[1] = { row[2], NULL };
            if (mode == 2 || mode == 5)
                a.sum = { row[3], NULL };
            if (mode & 4)
                a.result = { row[4], row[5] };
            if (mode != 3)
                a.norm = { row[6], mode & 1 ? row[7] : NULL };
            a.input = mode & 1 ? input.data() : NULL;
            a.out = result.data(), a.act = mode == 6 ? NULL : act.data(), a.act_stride = n + 1;
            a.kind = mode & 2 ? BMC_NORM_LAYER : BMC_NORM_RMS, a.eps = 1e-5f;
            check(
                text("norm_tokens: %d values, mode %d", dim, mode),
                { out(x), out(y0), out(y1), out(input), out(result), out(act), out(others) },
                [&] { reference_norm(&a); },
                [&] { launch("norm_tokens", norm_grid(&a), a); });
        }
}

static void norms_of_parts(void) {
    for (int mode = 0; mode < 4; mode++) {
        const int n = 2, parts = mode & 1 ? 3 : 1, size = 72;
        const size_t stride = 240;
        std::vector<float> x = noises(n * stride, 2), y = noises(n * stride), w = noises(600),
                           f = noises(size);
        std::vector<act_block> act = blocks(12);
        cuda_norm_rows a = {};
        a.n_tok = n, a.n_parts = parts, a.n = size, a.x = mode & 2 ? y.data() : x.data(), a.y = y.data(),
        a.x_stride = a.y_stride = stride, a.pitch = 80;
        if (mode)
            a.norm = { w.data(), w.data() + 240 };
        a.weight_pitch = mode == 3 ? 72 : 0;
        a.scale = mode & 1 ? 0.25f : 1, a.factors = mode & 2 ? f.data() : NULL,
        a.kind = mode == 3 ? BMC_NORM_LAYER : BMC_NORM_RMS, a.eps = 1e-6f;
        a.act = parts == 1 ? act.data() : NULL, a.act_stride = 3;
        check(text("norm_rows: mode %d", mode), { out(y), out(act) }, [&] { reference_norm_rows(&a); },
              [&] { launch("norm_rows", norm_rows_grid(&a), a); });
    }
}

static void quantizing(void) {
    const int n = 3, n_blocks = 19;
    std::vector<float> x = noises(n * 640);
    std::vector<act_block> act = blocks(n_blocks * 5);
    for (int i = 0; i < 32; i++)
        x[i] = 0, x[32 + i] = 1e-38f * (float)i, x[64 + i] = (float)i + 0.5f, x[96 + i] = i ? 0.0f : -3e38f;
    const cuda_quantize a = { n, n_blocks, x.data(), 640, act.data(), 5 };
    check(
        "quantize", { out(act) }, [&] { reference_quantize(&a); },
        [&] { launch("quantize", quantize_grid(&a), a); });
}

static void activations(void) {
    for (int kind = 0; kind < BMC_ACTS; kind++)
        for (int mode = 0; mode < 4; mode++) {
            const int n = 2, dim = mode & 1 ? 600 : 76;
            const size_t stride = 608;
            std::vector<float> up = noises(n * stride, 4), gate = noises(n * stride, 8);
            std::vector<act_block> act = blocks(3 * 20);
            if (kind == BMC_ACT_SWIGLU_OAI && mode & 2)
                continue;
            gate[0] = 0, gate[1] = 100, gate[2] = -100, gate[3] = -0.0f, gate[4] = 1e15f, gate[5] = 1e-30f;
            const cuda_activate a = { n,
                                      dim,
                                      kind,
                                      { 0.8f, 0.9f, 0.5f, -1e-6f },
                                      up.data(),
                                      mode & 2 ? NULL : gate.data(),
                                      stride,
                                      stride,
                                      mode == 1 ? NULL : act.data(),
                                      3 };
            check(
                text("activate: kind %d, %d values, gate %d", kind, dim, !(mode & 2)), { out(up), out(act) },
                [&] { reference_activate(&a); }, [&] { launch("activate", activate_grid(&a), a); });
        }
}

static void keeping_rows(void) {
    const int32_t tok[] = { 0, 2, 3, 6 };
    std::vector<float> x = noises(7 * 304);
    const cuda_keep_rows a = { x.data(), 304, tok, 4 };
    check(
        "keep_rows", { out(x) },
        [&] {
            for (int i = 0; i < 4; i++)
                memmove(&x[(size_t)i * 304], &x[(size_t)tok[i] * 304], 304 * sizeof(float));
        },
        [&] { launch("keep_rows", keep_rows_grid(&a), a); });
}

static void best_logits(void) {
    for (int mode = 0; mode < 4; mode++) {
        const int n = 2, vocab = mode == 3 ? 256 : 700;
        std::vector<float> logits = noises(n * 704, 10);
        std::vector<cuda_best> found((size_t)(n * best_parts(vocab)));
        for (int i = 0; i < 40; i++)
            logits[(size_t)(300 + 3 * i)] = 99;         /* of equals the first */
        if (mode == 2)
            for (int i = 512; i < 700; i++)
                logits[(size_t)i] = NAN;
        const cuda_best_of a = {
            n, vocab, logits.data(), 704, mode & 1 ? 0.5f : 1, mode == 1 ? 30.0f : 0, found.data()
        };
        check(
            text("best: mode %d", mode), { out(logits), out(found) }, [&] { reference_best(&a); },
            [&] { launch("best", best_grid(&a), a); });
    }
}

/* ---- attention ---- */

/* Sessions with rows in segments of a few tiles; two streams before this one and heads of each. */
struct cache {
    std::vector<std::vector<char>> memory;
    std::vector<std::vector<char *>> segments;
    std::vector<cuda_rows> rows;
    int64_t before, tile_bytes;
};

static void new_cache(cache &c, int sessions, int n_rows, int heads, int k_dim, int v_dim) {
    const int segment_tiles = 3, tiles = (n_rows + 15) / 16, pad = (v_dim + 15) / 16 * 16;
    c.tile_bytes = 32 * (k_dim + pad);
    c.before = 2 * c.tile_bytes;
    c.segments.resize((size_t)sessions);
    c.memory.reserve((size_t)(sessions * (tiles / segment_tiles + 1)));
    for (auto &list : c.segments) {
        for (int i = 0; i < tiles; i += segment_tiles) {
            c.memory.emplace_back((size_t)(segment_tiles * (c.before + heads * c.tile_bytes)));
            uint16_t *half = (uint16_t *)(void *)c.memory.back().data();
            for (size_t k = 0; k < c.memory.back().size() / 2; k++)
                half[k] = f32_to_f16(noise());
            list.push_back(c.memory.back().data());
        }
        c.rows.push_back({ list.data(), segment_tiles });
    }
}

static std::vector<output> outputs_of(cache &c) {
    std::vector<output> outs;
    for (auto &m : c.memory)
        outs.push_back(out(m));
    return outs;
}

static void placing(void) {
    struct { int heads, kv, k_dim, v_dim, style, late, mode;
    } cases[] = {
        { 4, 2, 64, 64, BMC_ROPE_HALVES, 0, 0 }, { 6, 3, 24, 24, BMC_ROPE_PAIRS, 1, 1 },
        { 2, 1, 100, 36, BMC_ROPE_NONE, 0, 2 },  { 4, 4, 128, 128, BMC_ROPE_HALVES, 0, 3 },
        { 2, 2, 48, 48, BMC_ROPE_PAIRS, 0, 4 },  { 4, 2, 32, 32, BMC_ROPE_HALVES, 1, 5 },
    };
    for (const auto &c : cases) {
        const int n = 5, mode = c.mode, pitch = mode == 3 ? 2 * c.k_dim : c.k_dim;
        const cuda_token at[n] = { { 7, 8, 0, 0, 0 },
                                   { 8, 9, 0, 0, 0 },
                                   { 47, 48, 0, 1, 1 },
                                   { 48, 49, 0, 1, 1 },
                                   { 31, 32, 0, 0, 0 } };
        const int32_t dims[2] = { c.k_dim / 2, c.k_dim };
        const size_t q_stride = (size_t)(c.heads * pitch + 15) / 16 * 16,
                     k_stride = (size_t)(c.kv * c.k_dim + 15) / 16 * 16,
                     v_stride = (size_t)(c.kv * c.v_dim + 15) / 16 * 16;
        std::vector<float> q = noises(n * q_stride), k = noises(n * k_stride), v = noises(n * v_stride),
                           cos = noises(2 * 8 * 64), sin = noises(2 * 8 * 64), w = noises(4096),
                           scales(n, 0.11f);
        cache kept;
        new_cache(kept, 2, 64, c.kv, c.k_dim, c.v_dim);
        k[0] = 1e6f, v[1] = -1e6f, k[2] = NAN;          /* beyond f16 */
        cuda_place a = {};
        a.n_tok = n, a.n_heads = c.heads, a.n_kv_heads = c.kv, a.k_dim = c.k_dim, a.v_dim = c.v_dim;
        a.q = q.data(), a.k = mode == 4 ? NULL : k.data(), a.v = mode == 0 || mode == 3 ? NULL : v.data();
        a.q_stride = q_stride, a.k_stride = k_stride, a.v_stride = v_stride, a.q_pitch = (size_t)pitch;
        a.at = at, a.rows = kept.rows.data(), a.before = kept.before, a.tile_bytes = kept.tile_bytes;
        a.cos = cos.data(), a.sin = sin.data(), a.turns = 64, a.rope_rows = 8, a.rope_dims = dims,
        a.rope_style = c.style, a.rope_late = c.late;
        if (mode & 1) {
            a.q_norm = { w.data(), mode == 5 ? w.data() + 3000 : NULL },
            a.q_norm_pitch = mode == 1 ? (size_t)c.k_dim : 0;
            a.k_norm = { w.data() + 1024, NULL }, a.k_norm_pitch = mode == 1 ? (size_t)c.k_dim : 0;
        }
        a.v_norm = mode == 0 || mode == 5, a.scale = 0.125f, a.scales = mode == 2 ? scales.data() : NULL;
        a.kind = mode == 5 ? BMC_NORM_LAYER : BMC_NORM_RMS, a.eps = 1e-6f;
        std::vector<output> outs = outputs_of(kept);
        outs.push_back(out(q));
        check(
            text("place: mode %d", mode), outs,
            [&] {
                std::vector<float> k_before = k,
                                   v_before = v; /* the CPU's code places keys in their buffer first */
                reference_place(&a);
                k = k_before, v = v_before;
            },
            [&] { launch("place", place_grid(&a), a); });
    }
}

struct attention_case {
    int heads, kv, k_dim, v_dim, n, pos, window, causal, last;
    float softcap, alibi;
    int sinks, gate, shared;
};

static void attend_case(const attention_case &c, int number) {
    /* Two sequences side by side: n tokens of one, one token of the other. */
    const int n = c.n + 1, group = c.heads / c.kv, rows = c.pos + c.n, end = c.causal ? 0 : rows;
    std::vector<cuda_token> at;
    for (int t = 0; t < c.n; t++)
        at.push_back({ c.pos + t, end ? end : c.pos + t + 1, c.last, 0, 0 });
    at.push_back({ c.causal ? 20 : 0, c.causal ? 21 : 5, c.last, 1, 0 });
    std::vector<cuda_task> tasks;
    for (int first = 0; first < c.n; first += attend_tokens(group))
        tasks.push_back({ first, c.n - first < attend_tokens(group) ? c.n - first : attend_tokens(group) });
    tasks.push_back({ c.n, 1 });
    cache kept;
    new_cache(kept, 2, rows < 32 ? 32 : rows, c.kv, c.k_dim, c.shared ? 0 : c.v_dim);
    const size_t q_stride = (size_t)(c.heads * c.k_dim + 15) / 16 * 16,
                 stride = (size_t)(c.heads * c.v_dim + 15) / 16 * 16;
    const int per_head = c.gate == 2;
    std::vector<float> q = noises((size_t)n * q_stride, 0.3f), result = noises((size_t)n * stride),
                       gate = noises((size_t)n * stride), sinks = noises((size_t)c.heads), slopes;
    std::vector<act_block> act = blocks((size_t)(n + 1) * (size_t)(c.heads * c.v_dim / 32 + 1));
    for (int h = 0; h < c.heads; h++)
        slopes.push_back((float)exp2(-(double)c.alibi * (h + 1) / c.heads));
    cuda_attend a = {};
    a.n_tasks = (int)tasks.size(), a.n_tok = n, a.n_heads = c.heads, a.n_kv_heads = c.kv, a.k_dim = c.k_dim,
    a.v_dim = c.v_dim, a.shared = c.shared;
    a.tasks = tasks.data(), a.at = at.data(), a.rows = kept.rows.data(), a.before = kept.before,
    a.tile_bytes = kept.tile_bytes;
    a.q = q.data(), a.q_stride = q_stride, a.q_pitch = (size_t)c.k_dim, a.window = c.window,
    a.causal = c.causal, a.softcap = c.softcap;
    a.slopes = c.alibi > 0 ? slopes.data() : NULL, a.sinks = c.sinks ? sinks.data() : NULL;
    a.out = result.data(), a.out_stride = stride;
    a.gate = c.gate ? gate.data() : NULL, a.gate_stride = stride,
    a.gate_pitch = per_head ? 1 : (size_t)c.v_dim, a.gate_act = per_head ? BMC_ACT_SOFTPLUS : BMC_ACT_SIGMOID;
    a.act = c.v_dim % 32 ? NULL : act.data(), a.act_stride = n + 1;
    a.n_chunks = (rows - 1) / CHUNK + 1 + number % 2; /* a graph has chunks for rows that are only reserved */
    const std::string fresh = bytes_of({ out(result), out(act) });
    for (int direct = 0; direct < 2; direct++) {
        a.direct = direct;
        std::vector<float> parts(attend_parts(&a), NAN);
        a.parts = parts.data();
        restore({ out(result), out(act) }, fresh);
        check(
            text("attend: case %d, direct %d", number, direct), { out(result), out(act) },
            [&] { reference_attend(&a, c.alibi); },
            [&] {
                launch("attend", attend_grid(&a), a);
                if (!direct)
                    launch("attend_merge", attend_merge_grid(&a), a);
            });
    }
}

static void attending(void) {
    /* heads, heads of keys, k_dim, v_dim, tokens, position, window, causal, last, softcap, ALiBi, sinks,
     * gate, shared */
    static const attention_case cases[] = {
        { 8, 2, 64, 64, 1, 700, 0, 1, 0, 0, 0, 0, 0 },      { 8, 2, 64, 64, 7, 250, 0, 1, 0, 0, 0, 0, 1 },
        { 4, 1, 128, 128, 5, 510, 0, 1, 0, 30, 0, 0, 0 },   { 4, 4, 80, 80, 20, 500, 0, 1, 0, 0, 8, 0, 0 },
        { 6, 3, 24, 24, 3, 13, 0, 1, 0, 0, 0, 1, 2 },       { 4, 2, 64, 32, 7, 900, 300, 1, 0, 0, 0, 1, 0 },
        { 2, 1, 256, 256, 4, 300, 0, 1, 0, 0, 0, 0, 0 },    { 4, 2, 32, 32, 3, 1000, 0, 1, 100, 0, 0, 0, 0 },
        { 4, 2, 32, 32, 3, 1000, 200, 1, 400, 0, 0, 1, 0 }, { 40, 1, 32, 32, 2, 290, 0, 1, 0, 0, 0, 0, 0 },
        { 20, 1, 544, 512, 1, 30, 0, 1, 0, 0, 0, 0, 0 },
        { 20, 1, 544, 512, 1, 300, 0, 1, 0, 0, 0, 0, 0, 1 }, { 3, 1, 44, 40, 9, 270, 0, 1, 0, 0, 0, 0, 0, 1 },
        { 4, 4, 32, 32, 30, 0, 0, 0, 0, 0, 0, 0, 0 },
        { 2, 2, 32, 32, 40, 230, 64, 0, 0, 0, 0, 0, 0 },
    };
    int number = 0;
    for (const attention_case &c : cases)
        attend_case(c, number++);
}

/* ---- experts ---- */

static void routing(void) {
    for (int mode = 0; mode < 12; mode++) {
        const int n = 3, experts = mode % 4 == 0 ? 300 : 24, active = mode % 4 == 2 ? 1 : 6;
        const size_t stride = 304;
        std::vector<float> scores = noises(n * stride, 2), bias = noises((size_t)experts);
        std::vector<int32_t> chosen((size_t)(n * active));
        std::vector<float> weight((size_t)(n * active));
        for (int e = 0; e < 12; e++)
            scores[(size_t)e] = 0.5f;                   /* of equals the first */
        if (mode == 7)
            for (int e = 0; e < 10; e++)             /* NaN is never chosen before others */
                scores[stride + (size_t)e] = NAN;
        const cuda_route a = { n,
                               experts,
                               active,
                               scores.data(),
                               stride,
                               mode & 1 ? bias.data() : NULL,
                               1 + mode % 3,
                               mode >> 1 & 1,
                               mode >= 8 ? 4 : 0,
                               mode >= 8 ? 2 : 0,
                               mode & 4 ? 2.5f : 1,
                               chosen.data(),
                               weight.data() };
        check(text("route: mode %d", mode), { out(chosen), out(weight) }, [&] { reference_route(&a); },
              [&] { launch("route", route_grid(&a), a); });
    }
}

/* Each entry is where its token and expert say, tokens ascending; sums over them are the CPU's. */
static void sorting_and_combining(void) {
    const int n = 70, experts = 9, active = 3, slots = 9, dim = 300, entries = n * active;
    std::vector<int32_t> chosen, used((size_t)slots), first((size_t)experts + 1), tok((size_t)entries),
        entry((size_t)entries);
    for (int t = 0; t < n; t++)
        for (int i = 0; i < active; i++)
            chosen.push_back(2 * i + (int)(random_number() % 2));       /* ascending; 6 and more have none */
    const cuda_sort a = { n,           experts,      active,     slots,       chosen.data(),
                          used.data(), first.data(), tok.data(), entry.data() };
    check("sort_experts", { out(used), out(first), out(tok), out(entry) }, [&] {
        int at = 0, n_used = 0;
        for (int e = 0; e < experts; e++) {
            first[(size_t)e] = at;
            for (int i = 0; i < entries; i++)
                if (chosen[(size_t)i] == e) {
                    tok[(size_t)at] = i / active;
                    entry[(size_t)i] = at++;
                }
            if (at > first[(size_t)e])
                used[(size_t)n_used++] = e;
        }
        first[(size_t)experts] = at;
        for (; n_used < slots; n_used++)
            used[(size_t)n_used] = -1;
    }, [&] { launch("sort_experts", sort_grid(&a), a); });
    for (int add = 0; add < 2; add++) {
        std::vector<float> weight = noises((size_t)entries), rows = noises((size_t)entries * 304),
                           y = noises((size_t)n * 304);
        const cuda_combine c = { n,           active, dim,      add, entry.data(), weight.data(),
                                 rows.data(), 304,    y.data(), 304 };
        check(
            text("combine: add %d", add), { out(y) }, [&] { reference_combine(&c); },
            [&] { launch("combine", combine_grid(&c), c); });
    }
    std::vector<float> gate = noises((size_t)n * 16), x = noises((size_t)n * 304),
                       y = noises((size_t)n * 304);
    const cuda_switch s = { n, dim, gate.data(), x.data(), y.data(), 16, 304, 304 };
    check(
        "switch_on", { out(y) }, [&] { reference_switch(&s); },
        [&] { launch("switch_on", switch_grid(&s), s); });
}

/* ---- blocks with a state ---- */

/* Three runs: one token that only joins the log; tokens after a part of the log, which is replayed; more
 * tokens than the log holds. */
static void recurrent_case(const char *name, cuda_recur a, int number) {
    enum { RUNS = 3 };
    static const int n_of[RUNS] = { 1, 3, 50 }, start_of[RUNS] = { 7, 10, 2 }, base_of[RUNS] = { 3, 6, 2 },
                     replays[RUNS] = { 0, 1, 0 };
    std::vector<cuda_run> runs;
    std::vector<int32_t> run;
    std::vector<cuda_token> at;
    for (int i = 0; i < RUNS; i++) {
        const int start = start_of[i], n = n_of[i], end = start + n;
        runs.push_back({ NULL, (int32_t)run.size(), start, n, base_of[i],
                         n == 1        ? base_of[i]
                         : n > LOG_MAX ? end - LOG_MAX
                                       : start,
                         replays[i] });
        for (int t = 0; t < n; t++) {
            run.push_back(i);
            at.push_back({ start + t, start + t + 1, 0, i, 0 });
        }
    }
    if (number % 2)                                     /* the log is full: the anchor moves within the log */
        runs[0] = { NULL, 0, 51, 1, 3, 20, number % 4 == 1 }, at[0].pos = 51;
    size_t state_floats;
    std::vector<float> work = noises(reference_recur_layout(&a, (int)run.size(), NULL, &state_floats), 0.7f);
    reference_recur_layout(&a, (int)run.size(), work.data(), &state_floats);
    std::vector<float> states = noises(RUNS * state_floats, 0.5f),
                       weight = noises((size_t)a.conv * a.weight_stride + 16), bias = noises(a.weight_stride),
                       heads = noises(512), norm = noises(4096);
    for (int i = 0; i < RUNS; i++)
        runs[(size_t)i].memory = states.data() + (size_t)i * state_floats;
    for (int i = 0; i < 128; i++)
        heads[(size_t)(128 + i)] = -fabsf(heads[(size_t)(128 + i)]);
    a.n_tok = (int)run.size(), a.n_runs = RUNS, a.runs = runs.data(), a.run = run.data(), a.at = at.data();
    a.weight = weight.data(), a.conv_bias = number % 2 ? bias.data() : NULL, a.dt_bias = heads.data(),
    a.decay_rate = heads.data() + 128, a.skip = heads.data() + 256;
    a.norm = a.delta || number % 2 ? norm.data() : NULL, a.eps = 1e-6f;
    check(
        text("%s: case %d", name, number), { out(work), out(states) },
        [&] { reference_recur(&a, a.n_tok, work.data()); },
        [&] {
            if (a.dim)
                launch("short_conv", short_conv_grid(&a), a);
            else {
                launch("recur_prepare", recur_prepare_grid(&a), a);
                launch("recur_walk", recur_walk_grid(&a), a);
                launch("recur_finish", recur_finish_grid(&a), a);
            }
            launch("recur_keep", recur_keep_grid(&a), a);
        });
}

static void recurrent_blocks(void) {
    for (int i = 0; i < 4; i++) {
        cuda_recur delta = {}, mamba = {}, conv = {};
        delta.delta = 1, delta.conv = 4, delta.n_heads = 4, delta.n_groups = 2,
        delta.state_dim = i < 2 ? 32 : 21, delta.v_dim = i == 3 ? 40 : 32, delta.interleaved = i & 1;
        recurrent_case("delta net", delta, i);
        mamba.conv = 4, mamba.n_heads = 6, mamba.n_groups = 2, mamba.state_dim = i < 2 ? 16 : 19,
        mamba.v_dim = i == 3 ? 24 : 32;
        recurrent_case("Mamba 2", mamba, i);
        conv.dim = i & 1 ? 300 : 64, conv.conv = 3;
        recurrent_case("short convolution", conv, i);
    }
}

static void placing_compressed(void) {
    for (int style : { BMC_ROPE_PAIRS, BMC_ROPE_HALVES }) {
        const int n = 3, heads = 3, nope = 20, turned = 16, rank = 40, rows = rank + turned;
        const cuda_token at[n] = { { 15, 16, 0, 0, 0 }, { 16, 17, 0, 0, 0 }, { 40, 41, 0, 1, 0 } };
        const int32_t dims[2] = { turned, turned };
        std::vector<float> q = noises(n * 112), kv = noises(n * 64), nopes = noises(n * 64),
                           query = noises(n * 176), cos = noises(256), sin = noises(256), w = noises(64);
        cache kept;
        new_cache(kept, 2, 64, 1, rows, 0);
        cuda_place_compressed a = {};
        a.n_tok = n, a.n_heads = heads, a.nope = nope, a.rank = rank, a.turned = turned, a.q = q.data(),
        a.kv = kv.data(), a.nopes = nopes.data(), a.query = query.data();
        a.q_stride = 112, a.kv_stride = 64, a.nopes_stride = 64, a.query_stride = 176;
        a.at.at = at, a.at.rows = kept.rows.data(), a.at.before = kept.before,
        a.at.tile_bytes = kept.tile_bytes;
        a.at.cos = cos.data(), a.at.sin = sin.data(), a.at.turns = 8, a.at.rope_rows = 8,
        a.at.rope_dims = dims, a.at.rope_style = style;
        a.at.k_norm = { w.data(), NULL }, a.at.scale = 0.2f, a.at.kind = BMC_NORM_RMS, a.at.eps = 1e-6f;
        std::vector<output> outs = outputs_of(kept);
        outs.push_back(out(nopes));
        outs.push_back(out(query));
        check(text("place_compressed: style %d", style), outs, [&] {
            std::vector<float> q_before = q, kv_before = kv;
            reference_place_compressed(&a);
            q = q_before, kv = kv_before;
        }, [&] { launch("place_compressed", place_compressed_grid(&a), a); });
    }
}

#include "test_altup.h"

static void load(const char *path) {
    std::ifstream file(path);
    const std::string wrong = ptx_load(path, std::string(std::istreambuf_iterator<char>(file), {}), compiled);
    printf("%s", wrong.c_str());
    if (!wrong.empty())
        exit(1);
}

int main(int argc, char **argv) {
    if (argc > 1)
        load(argv[1]);
    every_product();
    float_products();
    every_way_exists();
    halves_of_weights();
    halves_of_tokens();
    finishing();
    norms();
    norms_of_parts();
    quantizing();
    activations();
    keeping_rows();
    best_logits();
    placing();
    attending();
    routing();
    sorting_and_combining();
    recurrent_blocks();
    placing_compressed();
    joining_per_layer();
    scaling_rows();
    adding_normed_rows();
    gating();
    altup_blocks();
    printf("%d kernels, %d checks, %d with other bits\n",
           compiled.kernels.empty() ? grid.n_kernels : (int)compiled.kernels.size(), n_checks, n_bad);
    return n_bad != 0;
}
