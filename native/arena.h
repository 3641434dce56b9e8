/* The KV arena: rows of keys and values for every stream (an attention block's) and KV head, which grow by
 * segments of r rows. Nothing ever moves.
 *
 * A tile holds 16 rows of one (stream, head): first their keys, then their values; the arena only knows its
 * size. A segment holds tiles [first, first + segment_tiles) of every stream and head:
 *
 *   | stream 0: head 0: tile tile .. tile | head 1: tile .. tile | .. | stream 1: .. |
 *
 * and the arena is a list of segments. New memory is zero. On the host it comes from mmap, in huge pages from
 * 2 MB up: with 4 KB pages attention would wait for the TLB; a GPU has a table of its own (cuda/driver.c).
 * native/lab/grow.c fills the same list in other ways, to measure what they cost. */
#ifndef ARENA_H
#define ARENA_H

#include "bmc.h"
#include "memory.h"

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

enum { TILE_ROWS = 16, MAX_ROWS = 1 << 30 };

struct arena_stream {
    int n_heads;                    /* KV heads */
    int64_t tile_bytes;             /* K and V of 16 rows of one head;
                                       a multiple of 64 keeps tiles aligned to it */
    int64_t before;                 /* bytes of one tile of every head of the streams before it:
                                       arena_streams counts them */
};

struct arena_config {
    const struct memory *memory;            /* NULL: the host's; readable as long as the arena lives */
    const struct arena_stream *streams;     /* (n_streams,) readable as long as the arena lives */
    int n_streams;                  /* 0: there is nothing to keep */
    int64_t cap;                    /* rows at most */
    int r;                          /* rows of a segment, rounded up to whole tiles */
};

struct arena {
    struct arena_config config;     /* r as it is used */
    char **segments;                /* (n_segments,) */
    atomic_int **users;             /* (n_segments,) how many arenas share the segment; NULL:
                                       it is this one's alone */
    int64_t n_segments, n_slots;
    int64_t n_dropped;              /* the first ones, whose rows nobody will read:
                                       only their places are left */
    int64_t first;                  /* rows before it are gone */
    int64_t segment_tiles;          /* tiles of one head in each segment */
    size_t segment_bytes;           /* mapped for each segment */
    int64_t rows_reserved;
};

/* Fills in `before`; returns the bytes of one tile of every head of all streams, -1 if that
 * overflows or a stream is empty. */
int64_t arena_streams(struct arena_stream *streams, int n);

/* 0, BMC_EINVAL or BMC_ENOMEM, with the sentence recorded and the arena empty. */
int arena_init(struct arena *a, const struct arena_config *config);
void arena_free(struct arena *a);               /* twice is fine */

/* Room for `rows` rows in all. BMC_EFULL beyond the cap, BMC_ENOMEM: then the arena is as it was. */
int arena_reserve(struct arena *a, int64_t rows);

/* An arena with the first `rows` rows of another, which has the same configuration: whole segments are
 * shared, the rest is copied. A shared segment is never written: arena_own has to come before rows are. 0, or
 * BMC_ENOMEM and the child is empty. */
int arena_fork(struct arena *child, struct arena *parent, int64_t rows);

/* Makes rows [from, to) this arena's own. 0 or BMC_ENOMEM. */
int arena_own(struct arena *a, int64_t from, int64_t to);

/* Gives back whole segments of rows below `rows`: nobody will read them. */
void arena_drop(struct arena *a, int64_t rows);
void arena_clear(struct arena *a);              /* no rows any more */

/* Tiles [from, to), which are reserved and not dropped, as bytes: each of all streams and heads, `stride`
 * bytes after the one before. 0, or the failure of a GPU. */
int arena_export(const struct arena *a, int64_t from, int64_t to, char *bytes, int64_t stride);
int arena_import(struct arena *a, int64_t from, int64_t to, const char *bytes, int64_t stride);
int64_t arena_mapped(const struct arena *a);    /* bytes, a shared segment divided among its users */

/* The tile with rows [16 * tile, 16 * tile + 16) of a head; the rows have to be reserved. */
static inline void *arena_tile(const struct arena *a, int stream, int head, int64_t tile) {
    const struct arena_stream *s = &a->config.streams[stream];
    int64_t segment = 0;
    if (a->n_segments > 1) {
        segment = tile / a->segment_tiles;
        tile -= segment * a->segment_tiles;
    }
    return a->segments[segment] + s->before * a->segment_tiles
         + (head * a->segment_tiles + tile) * s->tile_bytes;
}

/* The r that suits a model, by the bytes of a row over all layers.
 *
 * Chunks are never copied and attention stops at the last tile, so r costs no time but that of a growth's
 * system calls, and r / 2 rows of memory on average that are not used yet. Measured (Zen 5 in a virtual
 * machine): mapping and unmapping cost 17 us at 4 MB; first touch costs 0.022 ns a byte in huge pages and
 * 0.28 in small ones, whatever r is. So a segment should be a few huge pages: at 4 MB the system calls are
 * below a fifth of the zeroing, 0.13 us a row. That is 128 rows of a 1B model with grouped heads, 16 of a
 * 7B without. docs/bmc.md derives what r has to balance where rows are copied. */
int arena_auto_rows(int64_t row_bytes);

int64_t arena_row_bytes(const struct arena *a);     /* K and V of one token, all streams */
int64_t arena_tile_bytes(const struct arena *a);    /* .. of 16 tokens */

/* What native/lab/grow.c needs to make segments in its own way. */
size_t arena_bytes(const struct arena_config *config, int64_t tiles);   /* 0: more than memory can be */
int arena_slots(struct arena *a, int64_t n);        /* room in the list; 0, or -1 without memory */
int arena_no_memory(const struct arena *a, int64_t rows);               /* BMC_ENOMEM, with the sentence */

extern int arena_fail_in;           /* for tests: the allocation that counts this down to 0 fails */

#endif
