#include "kernels/lanes_avx512.h"
#include "spin.h"
