#include "kernels/lanes_neon.h"
#include "spin.h"
