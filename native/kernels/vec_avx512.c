#include "lanes_avx512.h"
#include "vec.h"
