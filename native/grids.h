/* The grids of the IQ types: which combinations of 8 levels (IQ3: 4) a file's index stands for. An entry has them from its lowest
 * bits up: of two bits each, 0 1 2, for IQ1 and IQ2; of four bits each, 0 .. 7, for IQ3. split.c says what a level means. */
#ifndef GRIDS_H
#define GRIDS_H

#include <stdint.h>

extern const uint16_t iq1_grid[2048], iq2_xxs_grid[256], iq2_xs_grid[512], iq2_s_grid[1024], iq3_xxs_grid[256], iq3_s_grid[512];

#endif
