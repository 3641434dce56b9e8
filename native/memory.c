#include "memory.h"

#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

static const size_t HUGE_PAGE = 2 << 20;

/* Mapped with room to spare, then trimmed to whole huge pages. */
void *huge_alloc(size_t bytes) {
    bytes = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    char *start = mmap(NULL, bytes + HUGE_PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (start == MAP_FAILED)
        return NULL;
    size_t head = -(uintptr_t)start % HUGE_PAGE;
    if (head)
        munmap(start, head);
    munmap(start + head + bytes, HUGE_PAGE - head);
#ifdef MADV_HUGEPAGE
    madvise(start + head, bytes, MADV_HUGEPAGE);
#endif
    return start + head;
}

void huge_free(void *memory, size_t bytes) {
    if (memory)
        munmap(memory, (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
}

void give_back(const void *data, size_t bytes) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t from = ((uintptr_t)data + page - 1) & -page, to = ((uintptr_t)data + bytes) & -page;
    if (from < to)
        madvise((void *)from, to - from, MADV_DONTNEED);
}
