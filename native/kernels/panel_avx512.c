#include "lanes_avx512.h"
#include "panel.h"
