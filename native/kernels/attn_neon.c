#include "lanes_neon.h"
#include "attn.h"
