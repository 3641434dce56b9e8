/* The KV arena: rows of keys and values for every layer and KV head, and the ways it may grow.
 *
 * A tile holds 16 rows of one (layer, head): first their keys, then their values; the arena only knows its size.
 * A segment holds tiles [first, first + segment_tiles) of every layer and head:
 *
 *   | layer 0: head 0: tile tile .. tile | head 1: tile .. tile | .. | layer 1: .. |
 *
 * and the arena is a list of segments. Fresh memory is zero. The policies (enum bmc_growth):
 *
 *   COPY       one segment; a larger one is allocated for r more rows, the rows in use are copied, the old one goes.
 *              r = 1 allocates and copies at every row, as concatenating caches do.
 *   GEOMETRIC  likewise, but a growth makes it `factor` times larger at least.
 *   CHUNK      segments of r rows are appended; nothing moves.
 *   MAX        one segment for the cap, touched at the start.
 *   MAX_LAZY   one segment for the cap, whose pages become memory when they are written.
 *   RESERVE    address space for the cap, which costs nothing; segments of r rows inside it are made usable in turn.
 *   REMAP      one mapping of segments of r rows. To grow, the system moves its pages to where there is room behind
 *              them. That needs old rows to stay the beginning of the new ones, hence segments: in one segment each
 *              head's rows would have to be moved apart.
 *
 * Memory comes from mmap, in huge pages from 2 MB up: with 4 KB pages attention would wait for the TLB. */
#ifndef ARENA_H
#define ARENA_H

#include "bmc.h"

#include <stdbool.h>
#include <stdint.h>

enum { TILE_ROWS = 16, MAX_ROWS = 1 << 30 };

struct arena_config {
    int n_layers;
    int n_heads;                    /* KV heads */
    int64_t tile_bytes;             /* K and V of 16 rows of one head; a multiple of 64 keeps tiles aligned to it */
    int64_t cap;                    /* rows at most */
    int growth;                     /* enum bmc_growth */
    int r;                          /* rows added at a time; with segments of r rows rounded up to 16; MAX ignores it */
    double factor;                  /* GEOMETRIC; 0: 2 */
    bool small_pages;
    bool touch;                     /* new memory is touched at once, MAX's always is */
};

struct arena {
    struct arena_config config;     /* r as it is used */
    char **segments;                /* (n_segments,) */
    int64_t n_segments, n_slots;
    int64_t segment_tiles;          /* tiles of one head in each segment */
    int64_t rows_used;              /* rows that a copy has to keep */
    int64_t rows_reserved;
    int64_t allocations, bytes_allocated, bytes_copied;
    double grow_s, copy_s, touch_s; /* seconds in growth; of those in copies and in first touch */
    size_t segment_bytes;           /* mapped for each segment */
    char *space;                    /* RESERVE: the address space; REMAP: the mapping */
    size_t space_bytes, space_usable;
};

/* 0, BMC_EINVAL or BMC_ENOMEM, with the sentence recorded and the arena empty. */
int arena_init(struct arena *a, const struct arena_config *config);
void arena_free(struct arena *a);               /* twice is fine */

/* Room for `rows` rows in all. BMC_EFULL beyond the cap, BMC_ENOMEM: then the arena is as it was.
 * What lies beyond arena_set_rows() may be lost, and tiles may move: addresses are good until the next call. */
int arena_reserve(struct arena *a, int64_t rows);

/* How many rows hold something. Rewinding is a change of this number; the memory stays. */
static inline void arena_set_rows(struct arena *a, int64_t rows) {
    a->rows_used = rows;
}

/* The tile with rows [16 * tile, 16 * tile + 16) of a head; the rows have to be reserved. */
static inline void *arena_tile(const struct arena *a, int layer, int head, int64_t tile) {
    int64_t segment = 0;
    if (a->n_segments > 1) {
        segment = tile / a->segment_tiles;
        tile -= segment * a->segment_tiles;
    }
    int64_t run = (int64_t)layer * a->config.n_heads + head;
    return a->segments[segment] + (run * a->segment_tiles + tile) * a->config.tile_bytes;
}

void arena_stats(const struct arena *a, bmc_arena_stats *stats);

/* The r that `auto` stands for, by the bytes of a row over all layers.
 *
 * BMC's optimum r* = sqrt(2 tau (a + s (F + 1/B_c) n) / (u phi)) balances what a growth copies (n rows of s bytes)
 * with what attention computes on r/2 spare rows. Here neither exists: chunks are never copied, and attention visits
 * whole tiles only, so that at most 15 spare lanes are computed whatever r is. What is left is a, the cost of a
 * growth, and r/2 rows of memory that wait for their use: r s is the granularity of memory. Measured (Zen 5 in a
 * virtual machine): mapping and unmapping cost 17 us at 4 MB; first touch costs 0.022 ns a byte in huge pages and
 * 0.28 in small ones, whatever r is. So r s should be a few huge pages: at 4 MB the system calls are below a fifth
 * of the zeroing, 0.13 us a row. That is 128 rows of a 1B model with grouped heads, 16 of a 7B without. */
int arena_auto_rows(int64_t row_bytes);

/* For tests: the allocation that counts this down to 0 fails. */
extern int arena_fail_in;

#endif
