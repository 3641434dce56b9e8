#include "lanes_avx2.h"
#include "attn.h"
