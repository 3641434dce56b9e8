#include "lanes_ref.h"
#include "panel.h"
