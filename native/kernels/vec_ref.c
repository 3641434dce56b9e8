#include "lanes_ref.h"
#include "vec.h"
