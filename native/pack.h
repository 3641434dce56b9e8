/* GGUF rows into panels (panels.h), once, at load. */
#ifndef PACK_H
#define PACK_H

#include <stddef.h>
#include <stdint.h>

struct panel_size { size_t codes, scales; };      /* bytes of one panel; scales 0 for float types */

int panel_runs(int type);                         /* 1 if this type can be packed and computed with */
int panel_quantized(int type);                    /* 1 if its activations are 8-bit blocks, 0 if floats */
struct panel_size panel_size(int type, int64_t n_cols);

/* One panel from n_rows (1..16) rows at `rows`, row_bytes apart; the rest of it becomes rows of zeros. Rows
 * of TYPE_COARSE, which does not run by itself, are floats. */
void pack_panel(int type, const void *rows, size_t row_bytes, int n_rows, int64_t n_cols, uint8_t *codes,
                uint8_t *scales);

#endif
