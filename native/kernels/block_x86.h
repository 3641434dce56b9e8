/* What AVX2's and AVX512's lanes share of an act_block. */
#ifndef BLOCK_X86_H
#define BLOCK_X86_H

#include "../kernels.h"
#include "inline.h"
#include <immintrin.h>

/* act_set() from registers, and the bytes. fours: the sums of four bytes each. */
INLINE void act_store(struct act_block *act, float d, __m256i q, __m256i fours) {
    _mm256_storeu_si256((void *)act->q, q);
    fours = _mm256_hadd_epi32(fours, fours);
    fours = _mm256_hadd_epi32(fours, fours);
    __m128i first = _mm256_castsi256_si128(fours), second = _mm256_extracti128_si256(fours, 1);
    __m128i sums = _mm_unpacklo_epi64(_mm_unpacklo_epi32(first, second), _mm_add_epi32(first, second));
    __m128 floats = _mm_castsi128_ps(_mm_slli_si128(_mm_castps_si128(_mm_cvtepi32_ps(sums)), 4));
    _mm_storeu_ps(&act->d, _mm_move_ss(floats, _mm_set_ss(d)));
    _mm_storeu_si128((void *)act->neg_sum,
                     _mm_sub_epi32(_mm_setzero_si128(), _mm_blend_epi32(sums, _mm_setzero_si128(), 8)));
}

#endif
