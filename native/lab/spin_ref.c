#include "kernels/lanes_ref.h"
#include "spin.h"
