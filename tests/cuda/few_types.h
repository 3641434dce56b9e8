/* One type of each way to decode: for programs that are compiled often. */
#include "panels.h"

#define CUDA_TYPES(X) \
    X(TYPE_Q4_0,   q4_0,    32, u4,  d,    8)  \
    X(TYPE_IQ4_NL, iq4_nl,  32, nl4, d,    128) \
    X(TYPE_Q2_K,   q2_k,   256, u2,  km16, 0)  \
    X(TYPE_Q6_K,   q6_k,   256, u6,  k16,  32)
