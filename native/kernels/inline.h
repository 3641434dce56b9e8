/* Functions that vanish into their callers and loops that vanish into straight code: sums live in registers only so. */
#ifndef INLINE_H
#define INLINE_H

#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL(n) _Pragma("clang loop unroll(full)")
#else
#define UNROLL(n) _Pragma(UNROLL_TEXT(GCC unroll n))
#define UNROLL_TEXT(x) #x
#endif

#endif
