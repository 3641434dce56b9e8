#include "lanes_neon.h"
#include "panel.h"
