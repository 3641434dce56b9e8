/* A test is a main() full of CHECKs. */
#ifndef CHECK_H
#define CHECK_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                                        \
    do {                                                                                        \
        if (!(condition)) {                                                                     \
            fprintf(stderr, "%s:%d: %s: not so: %s\n", __FILE__, __LINE__, __func__, #condition); \
            exit(1);                                                                            \
        }                                                                                       \
    } while (0)

/* xorshift64: the same numbers on every machine. */
static inline uint64_t random_bits(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/* 0 .. n - 1 */
static inline int64_t random_below(uint64_t *state, int64_t n) {
    return (int64_t)(random_bits(state) % (uint64_t)n);
}

#endif
