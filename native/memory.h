/* Memory straight from the system: zeroed pages, huge ones where there are any. */
#ifndef MEMORY_H
#define MEMORY_H

#include <stddef.h>

/* Zeroed memory; from 2 MB up aligned to huge pages and, where the system has some, in huge pages: with 4 KB
 * pages the kernels would wait for the TLB. NULL on failure. */
void *memory_map(size_t bytes);
void memory_unmap(void *memory, size_t bytes);      /* the same number of bytes; NULL is fine */

/* In whole pages; in huge ones where that adds less than an eighth. */
size_t memory_whole(size_t bytes);

/* A part of a file mapping that is read soon, all of it. */
void memory_expect(const void *file, size_t bytes);
/* Whole pages of a file mapping that are not needed for now. */
void memory_give_back(const void *file, size_t bytes);

/* Where memory comes from: the host, or a GPU, whose addresses are only passed on. */
struct memory {
    void *of;                                       /* the first argument of the functions */
    size_t (*whole)(void *of, size_t bytes);        /* rounded up to what it gives at a time */
    void *(*map)(void *of, size_t bytes);           /* zeroed; NULL: see `failed` */
    void (*unmap)(void *of, void *memory, size_t bytes);
    int (*copy)(void *of, void *to, const void *from, size_t bytes);        /* 0, or -1 */
    int (*zero)(void *of, void *memory, size_t bytes);
    /* What the thread's last map or copy failed of, with its sentence; 0: no memory was left. */
    int (*failed)(void *of);
    /* Pieces to the host and from it. `send` has read its bytes when it returns; `fetch` has written them
     * after `wait`, which follows in any case, on the same thread. 0, or the first failure since the last
     * `wait`, with its sentence. A GPU's are for one thread at a time. */
    int (*fetch)(void *of, void *to, const void *from, size_t bytes);
    int (*send)(void *of, void *to, const void *from, size_t bytes);
    int (*wait)(void *of);
};
extern const struct memory memory_host;

#endif
