/* Address space apart from memory, for ways to grow that reserve it first or move pages in it. */
#ifndef SPACE_H
#define SPACE_H

#include <stdbool.h>
#include <stddef.h>

size_t page_size(void);
void use_small_pages(void *memory, size_t bytes);           /* advice to take no huge pages */

/* Address space that starts at a huge page; no memory until space_use. NULL if the system refuses. */
char *space_map(size_t bytes);
int space_use(char *space, size_t bytes);                   /* 0 unless the system refuses */

/* A mapping's pages, at its place or another, with more bytes after them, which are zero. NULL: nothing
 * has changed. */
char *space_move(char *memory, size_t bytes, size_t wanted);
bool space_moves(void);                                     /* whether this system can do that */

#endif
