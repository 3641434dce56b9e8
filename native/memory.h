/* Large zeroed memory straight from the system. */
#ifndef MEMORY_H
#define MEMORY_H

#include <stddef.h>

void *huge_alloc(size_t bytes);             /* zero, on huge pages where there are any, aligned to one; NULL on failure */
void huge_free(void *memory, size_t bytes); /* NULL is fine */
void give_back(const void *data, size_t bytes);     /* whole pages of a file mapping that are not needed for now */

#endif
