#include "cublas.h"

#include "../error.h"
#include "driver.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct cublas { struct cublas_functions f; void *handle; int gpu; };

/* cuBLAS's numbers. */
enum { ALLOC_FAILED = 3 };
enum { AS_IT_IS = 0, TRANSPOSED_MATRIX = 1 };
enum { REAL_32F = 0, REAL_16F = 2, COMPUTE_32F = 68, DEFAULT_ALGORITHM = -1 };
enum { SUMS_IN_FLOAT32 = 16 };          /* math mode: also those of the parts that a product is cut into */

static int status_of(int gpu, const char *what, int code) {
    static const struct { int code; const char *text; } list[] = {
        { 1, "not initialized" },   { ALLOC_FAILED, "out of memory" }, { 7, "invalid value" },
        { 8, "the GPU is too old" }, { 11, "memory cannot be reached" }, { 13, "execution failed" },
        { 14, "internal error" },   { 15, "not supported" },
    };
    const char *text = "unknown error";
    if (!code)
        return 0;
    for (size_t i = 0; i < sizeof list / sizeof *list; i++)
        text = list[i].code == code ? list[i].text : text;
    return fail(code == ALLOC_FAILED ? BMC_ENOMEM : BMC_EDEVICE, "GPU %d: cuBLAS: %s: %s (%d)", gpu, what,
                text, code);
}

/* libcublas needs libcublasLt; beside a file that is named, it may be where the system does not look. */
static void open_companion(const char *path) {
    const char *name = strstr(path, "libcublas.so");
    char other[4096];
    if (name && snprintf(other, sizeof other, "%.*slibcublasLt%s", (int)(name - path), path,
                         name + strlen("libcublas")) < (int)sizeof other)
        dlopen(other, RTLD_NOW | RTLD_LOCAL);
}

/* NULL with the sentence recorded. */
static void *open_library(const char *path) {
    static const char *const names[] = { "libcublas.so.13", "libcublas.so.12", "libcublas.so.11" };
    void *library = NULL;
    if (*path) {
        open_companion(path);
        library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (!library)
            fail(BMC_EDEVICE, "cuBLAS cannot be opened: %s", dlerror());
        return library;
    }
    for (size_t i = 0; i < sizeof names / sizeof *names && !library; i++)
        library = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
    if (!library)
        fail(BMC_EDEVICE, "cuBLAS is missing: %s; pip install nvidia-cublas brings it (with a driver before "
                          "580: nvidia-cublas-cu12)", dlerror());
    return library;
}

int cublas_find(const char *path, struct cublas_functions *found) {
    const struct { const char *name; void *place; } list[] = {
#define CUBLAS_ROW(name, args) { #name, &found->name },
        CUBLAS(CUBLAS_ROW)
#undef CUBLAS_ROW
    };
    void *library = open_library(path);
    if (!library)
        return BMC_EDEVICE;
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        void *function = dlsym(library, list[i].name);
        if (!function) {
            dlclose(library);
            return fail(BMC_EDEVICE, "cuBLAS: %s has no %s: expected version 11 or later; pip install "
                                     "nvidia-cublas brings a new one",
                        *path ? path : "libcublas", list[i].name);
        }
        memcpy(list[i].place, &function, sizeof function);
    }
    return 0;
}

int cublas_open(const struct gpu *gpu, const char *path, void *stream, void *workspace,
                struct cublas **made) {
    struct cublas *b = calloc(1, sizeof *b);
    if (!b)
        return fail(BMC_ENOMEM, "no memory for cuBLAS");
    *made = b;
    b->gpu = gpu->index;
    int status = cublas_find(path, &b->f);
    if (!status)
        status = status_of(b->gpu, "getting ready (the driver may be too old for it)",
                           b->f.cublasCreate_v2(&b->handle));
    if (!status)                            /* before the workspace, which this call takes away */
        status = status_of(b->gpu, "taking the stream", b->f.cublasSetStream_v2(b->handle, stream));
    if (!status)
        status = status_of(b->gpu, "taking its workspace",
                           b->f.cublasSetWorkspace_v2(b->handle, workspace, CUBLAS_WORKSPACE));
    return status ? status
                  : status_of(b->gpu, "setting the math mode",
                              b->f.cublasSetMathMode(b->handle, SUMS_IN_FLOAT32));
}

void cublas_close(struct cublas *b) {
    if (b && b->handle)
        b->f.cublasDestroy_v2(b->handle);
    free(b);
}

/* cuBLAS has columns side by side: our rows are its matrix transposed, and our sums its m x n. */
int cublas_multiply(const struct cublas *b, const struct cublas_product *p) {
    static const float one = 1, zero = 0;
    return status_of(b->gpu, "multiplying",
                     b->f.cublasGemmEx(b->handle, TRANSPOSED_MATRIX, AS_IT_IS, p->m, p->n, p->k, &one,
                                       p->rows, REAL_16F, p->k, p->tokens, REAL_16F, p->k, &zero, p->sums,
                                       REAL_32F, p->stride, COMPUTE_32F, DEFAULT_ALGORITHM));
}
