#include "memory.h"

#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

static const size_t HUGE_PAGE = 2 << 20;

static size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

size_t memory_unit(size_t bytes) { return bytes >= HUGE_PAGE ? HUGE_PAGE : (size_t)sysconf(_SC_PAGESIZE); }

size_t memory_whole(size_t bytes) {
    size_t huge = round_up(bytes, HUGE_PAGE);
    return huge - bytes < bytes / 8 ? huge : round_up(bytes, (size_t)sysconf(_SC_PAGESIZE));
}

/* With room to spare, which is then trimmed, a mapping starts at a huge page. */
void *memory_map(size_t bytes, bool usable) {
    const int protection = usable ? PROT_READ | PROT_WRITE : PROT_NONE;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | (usable ? 0 : MAP_NORESERVE);
    size_t slack = bytes >= HUGE_PAGE ? HUGE_PAGE : 0;
    char *start = mmap(NULL, bytes + slack, protection, flags, -1, 0);
    if (start == MAP_FAILED)
        return NULL;
    if (slack) {
        size_t head = -(uintptr_t)start % HUGE_PAGE;
        size_t end = round_up(head + bytes, (size_t)sysconf(_SC_PAGESIZE));
        if (head)
            munmap(start, head);
        if (bytes + slack > end)
            munmap(start + end, bytes + slack - end);
        start += head;
        memory_pages(start, bytes, true);
    }
    return start;
}

/* Memory that does not get what is advised is as good, only slower. */
void memory_pages(void *memory, size_t bytes, bool huge) {
#ifdef MADV_HUGEPAGE
    if (bytes >= HUGE_PAGE || !huge)
        madvise(memory, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#else
    (void)memory, (void)bytes, (void)huge;
#endif
}

#ifdef MREMAP_FIXED
bool memory_grows(void) { return true; }

/* Where it is, if the addresses behind it are free; else to a place that huge pages fit, so that they move whole. */
void *memory_grow(void *memory, size_t bytes, size_t wanted) {
    if ((uintptr_t)memory % memory_unit(wanted) == 0 && mremap(memory, bytes, wanted, 0) != MAP_FAILED)
        return memory;
    char *space = memory_map(wanted, false);
    if (!space)
        return NULL;
    if (mremap(memory, bytes, wanted, MREMAP_MAYMOVE | MREMAP_FIXED, space) != MAP_FAILED)
        return space;
    munmap(space, wanted);
    return NULL;
}
#else
bool memory_grows(void) { return false; }

void *memory_grow(void *memory, size_t bytes, size_t wanted) {
    (void)memory, (void)bytes, (void)wanted;
    return NULL;
}
#endif

void memory_unmap(void *memory, size_t bytes) {
    if (memory)
        munmap(memory, bytes);
}

int memory_use(void *memory, size_t bytes) { return mprotect(memory, bytes, PROT_READ | PROT_WRITE); }

void memory_give_back(const void *file, size_t bytes) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t from = ((uintptr_t)file + page - 1) & -page, to = ((uintptr_t)file + bytes) & -page;
    if (from < to)
        madvise((void *)from, to - from, MADV_DONTNEED);
}
