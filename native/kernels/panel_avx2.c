#include "lanes_avx2.h"
#include "panel.h"
