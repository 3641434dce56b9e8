/* cuBLAS without a GPU: part of the driver of driver.cpp, in whose memory and streams it works. It takes the
 * one kind of product that pybmc asks for, and is stricter about it than a real one. Products happen when the
 * stream is awaited.
 *
 * What tests set: which call from now on fails ("cublas_fail_in", 0: none), with which code; whether
 * neighbouring ones differ by a little ("cublas_varies"). What they ask: "cublas_products" so far, of how
 * many shapes ("cublas_shapes"). */
#include <set>
#include <tuple>

enum { NOT_INITIALIZED = 1, INVALID_VALUE = 7, COLUMNS = 512 };

struct cublas { void *stream = NULL; bool workspace = false; int mode = 0; };

static const bool has_cublas =
    (settings.insert({ { "cublas_fail_in", 0 },
                       { "cublas_fail_code", 13 },
                       { "cublas_varies", 0 },
                       { "cublas_products", 0 },
                       { "cublas_shapes", 0 } }),
     true);
static std::set<std::tuple<int, int, int>> shapes;

static int begin_cublas(const char *name) {
    if (settings["cublas_fail_in"] > 0 && --settings["cublas_fail_in"] == 0) {
        failed = name;
        return (int)settings["cublas_fail_code"];
    }
    return current ? 0 : NOT_INITIALIZED;
}

#define BEGIN_CUBLAS() \
    std::lock_guard<std::recursive_mutex> held(lock); \
    if (int code = begin_cublas(__func__)) \
        return code

API int cublasCreate_v2(void **handle) {
    BEGIN_CUBLAS();
    *handle = new cublas;
    count(1, 0);
    return OK;
}

API int cublasDestroy_v2(void *handle) {
    std::lock_guard<std::recursive_mutex> held(lock);
    delete (cublas *)handle;
    count(-1, 0);
    return OK;
}

API int cublasSetStream_v2(void *handle, void *s) {
    BEGIN_CUBLAS();
    ((cublas *)handle)->stream = s;
    ((cublas *)handle)->workspace = false;          /* as the real one: back to its own */
    return OK;
}

API int cublasSetWorkspace_v2(void *handle, void *memory, size_t bytes) {
    BEGIN_CUBLAS();
    if ((uint64_t)memory % 256 || !inside((uint64_t)memory, bytes))
        return INVALID_VALUE;
    ((cublas *)handle)->workspace = true;
    return OK;
}

API int cublasSetMathMode(void *handle, int mode) {
    BEGIN_CUBLAS();
    ((cublas *)handle)->mode = mode;
    return OK;
}

static std::vector<float> floats_of(const uint16_t *p, size_t n) {
    std::vector<float> x(n);
    for (size_t i = 0; i < n; i++)
        x[i] = f16_to_f32(p[i]);
    return x;
}

/* c[j * stride + i] = by * sum over k of a[i][k] b[j][k], in eight sums: an order that is not ours. */
static int multiply(const uint16_t *a, const uint16_t *b, float *c, int m, int n, int k, int stride,
                    float by) {
    const size_t depth = (size_t)k;
    if (!inside((uint64_t)a, 2 * depth * (size_t)m) || !inside((uint64_t)b, 2 * depth * (size_t)n)
        || !inside((uint64_t)c, 4 * ((size_t)stride * (size_t)(n - 1) + (size_t)m)))
        return ILLEGAL_ADDRESS;
    const std::vector<float> rows = floats_of(a, depth * (size_t)m), tokens = floats_of(b, depth * (size_t)n);
    for (size_t j = 0; j < (size_t)n; j++)
        for (size_t i = 0; i < (size_t)m; i++) {
            float sum[8] = {};
            for (size_t d = 0; d < depth; d++)
                sum[d % 8] += rows[i * depth + d] * tokens[j * depth + d];
            c[j * (size_t)stride + i] =
                by * (((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7])));
        }
    return OK;
}

API int cublasGemmEx(void *handle, int op_a, int op_b, int m, int n, int k, const void *alpha, const void *a,
                     int a_type, int lda, const void *b, int b_type, int ldb, const void *beta, void *c,
                     int c_type, int ldc, int compute, int algorithm) {
    BEGIN_CUBLAS();
    const cublas *own = (cublas *)handle;
    if (!own->stream || !own->workspace || own->mode != 16 || ((stream *)own->stream)->capturing)
        return NOT_INITIALIZED;
    const bool kinds = op_a == 1 && op_b == 0 && a_type == 2 && b_type == 2 && c_type == 0 && compute == 68
                       && algorithm == -1,
               sizes = m > 0 && k > 0 && n == COLUMNS && lda == k && ldb == k && ldc >= m,
               aligned = k % 8 == 0 && ldc % 4 == 0 && ((uint64_t)a | (uint64_t)b | (uint64_t)c) % 16 == 0;
    if (!kinds || !sizes || !aligned || *(const float *)alpha != 1 || *(const float *)beta != 0)
        return INVALID_VALUE;
    shapes.insert({ m, n, k });
    settings["cublas_products"]++;
    settings["cublas_shapes"] = (long long)shapes.size();
    const float by = 1 + 0x1p-12f * (float)(settings["cublas_varies"] ? settings["cublas_products"] % 7 : 0);
    return enqueue(own->stream, [=] {
        return multiply((const uint16_t *)a, (const uint16_t *)b, (float *)c, m, n, k, ldc, by);
    });
}
