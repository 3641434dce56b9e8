/* The grids of the IQ types: the levels of 8 weights (IQ3: 4) that an index of a file stands for. An entry
 * holds them from its lowest bits up, in two bits each (0 to 2), those of IQ3 in four (0 to 7). types.h
 * has what a level means. */
#ifndef GRIDS_H
#define GRIDS_H

#include <stdint.h>

extern const uint16_t iq1_grid[2048];
extern const uint16_t iq2_xxs_grid[256], iq2_xs_grid[512], iq2_s_grid[1024];
extern const uint16_t iq3_xxs_grid[256], iq3_s_grid[512];

#endif
