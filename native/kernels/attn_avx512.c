#include "lanes_avx512.h"
#include "attn.h"
