/* Memory straight from the system: zeroed pages, huge ones where there are any. */
#ifndef MEMORY_H
#define MEMORY_H

#include <stdbool.h>
#include <stddef.h>

/* Zeroed memory; from 2 MB up aligned to huge pages and, where the system has some, in huge pages: with 4 KB pages the
 * kernels would wait for the TLB. Not usable: address space only, which costs nothing until memory_use. NULL on failure. */
void *memory_map(size_t bytes, bool usable);
void memory_unmap(void *memory, size_t bytes);      /* the same number of bytes; NULL is fine */
int memory_use(void *memory, size_t bytes);         /* whole pages of address space; 0 unless the system refuses */

/* Larger, what is new of it zero; it may move, its pages are not copied. NULL if the system refuses: nothing changed. */
void *memory_grow(void *memory, size_t bytes, size_t wanted);
bool memory_grows(void);                            /* whether this system can do that */

void memory_pages(void *memory, size_t bytes, bool huge);   /* advice: take huge pages, or none */

size_t memory_unit(size_t bytes);                   /* the page a mapping of so many bytes is made of */
size_t memory_whole(size_t bytes);                  /* in whole pages; in huge ones where that adds less than an eighth */

void memory_give_back(const void *file, size_t bytes);      /* whole pages of a file mapping that are not needed for now */

#endif
