#include "kernels/lanes_avx2.h"
#include "spin.h"
