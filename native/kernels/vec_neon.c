#include "lanes_neon.h"
#include "vec.h"
