#include "memory.h"

#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static const size_t HUGE_PAGE = 2 << 20;

static size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

size_t memory_whole(size_t bytes) {
    size_t huge = round_up(bytes, HUGE_PAGE);
    return huge - bytes < bytes / 8 ? huge : round_up(bytes, (size_t)sysconf(_SC_PAGESIZE));
}

/* If the system does not follow the advice the memory is only slower. */
static void advise_huge_pages(void *memory, size_t bytes) {
#ifdef MADV_HUGEPAGE
    madvise(memory, bytes, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

/* With room to spare, which is then trimmed, a mapping starts at a huge page. */
void *memory_map(size_t bytes) {
    size_t slack = bytes >= HUGE_PAGE ? HUGE_PAGE : 0;
    char *start = mmap(NULL, bytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
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
        advise_huge_pages(start, bytes);
    }
    return start;
}

void memory_unmap(void *memory, size_t bytes) {
    if (memory)
        munmap(memory, bytes);
}

void memory_expect(const void *file, size_t bytes) {
    uintptr_t from = (uintptr_t)file & -(uintptr_t)sysconf(_SC_PAGESIZE);
    madvise((void *)from, (uintptr_t)file + bytes - from, MADV_WILLNEED);
}

void memory_give_back(const void *file, size_t bytes) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t from = ((uintptr_t)file + page - 1) & -page, to = ((uintptr_t)file + bytes) & -page;
    if (from < to)
        madvise((void *)from, to - from, MADV_DONTNEED);
}

static size_t host_whole(void *of, size_t bytes) { return (void)of, memory_whole(bytes); }

static void *host_map(void *of, size_t bytes) { return (void)of, memory_map(bytes); }

static void host_unmap(void *of, void *memory, size_t bytes) { (void)of, memory_unmap(memory, bytes); }

static int host_copy(void *of, void *to, const void *from, size_t bytes) {
    return (void)of, memcpy(to, from, bytes), 0;
}

static int host_zero(void *of, void *memory, size_t bytes) { return (void)of, memset(memory, 0, bytes), 0; }

static int host_no_failure(void *of) { return (void)of, 0; }

const struct memory memory_host = {
    .whole = host_whole, .map = host_map, .unmap = host_unmap, .copy = host_copy, .zero = host_zero,
    .failed = host_no_failure, .fetch = host_copy, .send = host_copy, .wait = host_no_failure,
};
