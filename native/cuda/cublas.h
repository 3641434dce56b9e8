/* NVIDIA's cuBLAS, opened when prompts by cuBLAS are asked for: libcublas.so.13, .12 or .11, or the file that
 * is named. Declared here, so that neither a header nor a library of CUDA is needed to build pybmc. */
#ifndef CUDA_CUBLAS_H
#define CUDA_CUBLAS_H

#include <stddef.h>
#include <stdint.h>

struct gpu;

#define CUBLAS(X) \
    X(cublasCreate_v2, (void **handle)) \
    X(cublasDestroy_v2, (void *handle)) \
    X(cublasSetStream_v2, (void *handle, void *stream)) \
    X(cublasSetWorkspace_v2, (void *handle, void *memory, size_t bytes)) \
    X(cublasSetMathMode, (void *handle, int mode)) \
    X(cublasGemmEx, (void *handle, int op_a, int op_b, int m, int n, int k, const void *alpha, \
                     const void *a, int a_type, int lda, const void *b, int b_type, int ldb, \
                     const void *beta, void *c, int c_type, int ldc, int compute, int algorithm))

struct cublas_functions {
#define CUBLAS_FIELD(name, args) int (*name) args;
    CUBLAS(CUBLAS_FIELD)
#undef CUBLAS_FIELD
};

/* The library's functions; path "": by its usual names. 0, or BMC_EDEVICE. */
int cublas_find(const char *path, struct cublas_functions *found);

/* Bytes of GPU memory that all products share: with a fixed size the same call has the same bits. */
enum { CUBLAS_WORKSPACE = 32 << 20 };

/* A handle of the library for a stream of a GPU. workspace: CUBLAS_WORKSPACE bytes there. */
struct cublas;
int cublas_open(const struct gpu *gpu, const char *path, void *stream, void *workspace, struct cublas **made);
void cublas_close(struct cublas *b);

/* sums (n, stride) = rows (m, k) times tokens (n, k), f16, rows side by side; sums are float32. */
struct cublas_product { const uint16_t *rows, *tokens; float *sums; int m, n, k, stride; };
int cublas_multiply(const struct cublas *b, const struct cublas_product *p);    /* queued; 0, or a failure */

#endif
