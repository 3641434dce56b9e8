#include "space.h"

#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

static const size_t HUGE_PAGE = 2 << 20;

size_t page_size(void) { return (size_t)sysconf(_SC_PAGESIZE); }

void use_small_pages(void *memory, size_t bytes) {
#ifdef MADV_NOHUGEPAGE
    madvise(memory, bytes, MADV_NOHUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

static void use_huge_pages(void *memory, size_t bytes) {
#ifdef MADV_HUGEPAGE
    if (bytes >= HUGE_PAGE)
        madvise(memory, bytes, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

/* The space before the first huge page and behind the last byte is given back. */
char *space_map(size_t bytes) {
    size_t whole = (bytes + page_size() - 1) / page_size() * page_size();
    char *start = mmap(NULL, whole + HUGE_PAGE, PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED)
        return NULL;
    size_t head = -(uintptr_t)start % HUGE_PAGE;
    if (head)
        munmap(start, head);
    munmap(start + head + whole, HUGE_PAGE - head);
    use_huge_pages(start + head, whole);
    return start + head;
}

int space_use(char *space, size_t bytes) { return mprotect(space, bytes, PROT_READ | PROT_WRITE); }

#ifdef MREMAP_FIXED
bool space_moves(void) { return true; }

/* At its place, if the addresses behind it are free; else at one that starts a huge page, so that huge
 * pages move whole. */
char *space_move(char *memory, size_t bytes, size_t wanted) {
    char *moved = memory, *space = NULL;
    if ((uintptr_t)memory % HUGE_PAGE || mremap(memory, bytes, wanted, 0) == MAP_FAILED) {
        space = space_map(wanted);
        moved = space ? mremap(memory, bytes, wanted, MREMAP_MAYMOVE | MREMAP_FIXED, space) : MAP_FAILED;
    }
    if (moved == MAP_FAILED) {
        if (space)
            munmap(space, wanted);
        return NULL;
    }
    use_huge_pages(moved, wanted);
    return moved;
}
#else
bool space_moves(void) { return false; }

char *space_move(char *memory, size_t bytes, size_t wanted) {
    (void)memory, (void)bytes, (void)wanted;
    return NULL;
}
#endif
