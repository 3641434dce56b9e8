/* The GPU's kernels. Compiled by nvcc (-fmad=false), and by a C++ compiler for the CPU grid,
 * tests/cuda/grid.h.
 *
 * The promise is that of ../kernels.h: the CPU's bits. Integers are exact, and each sum of floats has the
 * CPU's order: what may be computed in any order waits in shared memory for the thread that adds it up. No
 * atomics; no block waits for another. */
#ifndef CUDA_KERNELS_CU
#define CUDA_KERNELS_CU

#define _Static_assert static_assert
#include "args.h"
#include "../route.h"
#include "../state.h"
#include <math.h>

#ifdef __CUDACC__
#define DEVICE static __device__ __forceinline__
#define PRAGMA(words) _Pragma(#words)
#define UNROLL(n) PRAGMA(unroll n)
/* A kernel of `threads` threads with the arguments `a` and the shared memory `s`; its body follows. Two
 * blocks of up to 256 threads have to fit a multiprocessor's registers. */
#define KERNEL(name, threads, arguments, room) \
    DEVICE void body_##name(const arguments &a, room &s); \
    extern "C" __global__ void __launch_bounds__(threads, threads <= 256 ? 2 : 1) name(const arguments a) { \
        __shared__ room s; \
        body_##name(a, s); \
    } \
    DEVICE void body_##name(const arguments &a, room &s)
#else
#define DEVICE static inline __attribute__((always_inline))
#define UNROLL(n)
#define KERNEL(name, threads, arguments, room) \
    static_assert(sizeof(room) <= 48 << 10, "shared memory of " #name); \
    static void body_##name(const arguments &a, room &s); \
    static void call_##name(const void *a, void *s) { body_##name(*(const arguments *)a, *(room *)s); } \
    static_assert(sizeof(arguments) <= 4096 && threads <= 1024 && threads % 32 == 0, "launch of " #name); \
    static const bool added_##name = grid_add(#name, call_##name, sizeof(arguments), sizeof(room), threads); \
    static void body_##name(const arguments &a, room &s)
#endif

/* Tensor cores for 8 bits, and copies past registers, are there from compute capability 8.0 on. */
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define HAS_MMA 1
#else
#define HAS_MMA 0
#endif

#define INLINE DEVICE
#define UNROLL_BY(n)
#define TOGETHER 1
#define u_shr(a, s, mask) ((a) >> (s) & 0x01010101u * (mask))
#define u_shl(a, s, mask) ((a) << (s) & 0x01010101u * (mask))

#include "ptx.h"

/* Three views of a warp. Lanes: each sixteen threads are a panel's rows, or sixteen neighbours of a row. Low
 * and high: a tensor core's rows, of which four threads share one. */
namespace low {
#define ROW ((int)threadIdx.x / 4 % 8)
#include "lanes_cuda.h"
#undef ROW
}
namespace high {
#define ROW ((int)threadIdx.x / 4 % 8 + 8)
#include "lanes_cuda.h"
#undef ROW
}
namespace lanes {
#define ROW ((int)threadIdx.x & 15)
#include "lanes_cuda.h"
#undef ROW
}
using namespace lanes;

struct no_room { char unused; };

DEVICE int least(int a, int b) { return a < b ? a : b; }
DEVICE int most(int a, int b) { return a > b ? a : b; }

/* This thread's lane of sixteen, and which sixteen of the block it is in. */
DEVICE int lane(void) { return (int)threadIdx.x & 15; }
DEVICE int half_warp(void) { return (int)threadIdx.x / 16; }

#include "products.h"
#include "floats.h"
#include "halves.h"
#include "rows.h"
#include "attend.h"
#include "experts.h"
#include "recurrent.h"
#include "altup.h"

#endif
