#include "lanes_avx2.h"
#include "vec.h"
