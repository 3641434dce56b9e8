#include "lanes_ref.h"
#include "attn.h"
