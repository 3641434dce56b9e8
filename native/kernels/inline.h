/* Functions that are always inlined and loops that are always unrolled: otherwise sums would
 * not stay in registers. */
#ifndef INLINE_H
#define INLINE_H

#define INLINE static inline __attribute__((always_inline))
#define PRAGMA(x) _Pragma(#x)
#ifdef __clang__
#define UNROLL(n) PRAGMA(clang loop unroll(full))
#define UNROLL_BY(n) PRAGMA(clang loop unroll_count(n))
#else
#define UNROLL(n) PRAGMA(GCC unroll n)
#define UNROLL_BY(n) PRAGMA(GCC unroll n)
#endif

#endif
