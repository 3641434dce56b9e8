/* Pieces of a session's memory to the host and from it. All go through one buffer of pinned memory, with
 * which a copy is as fast as the bus; pieces that lie side by side on the GPU are one copy. */
#include "driver.h"

#include "../error.h"

#include <string.h>

static int check(const struct gpu *g, int code) { return cuda_status(g->index, "copying a session", code); }

/* Queues the copy that was begun. */
static void queue(struct gpu_segments *s) {
    struct gpu_stage *t = &s->stage;
    const struct gpu *g = s->gpu;
    char *from = t->bytes + t->begun;
    const size_t n = t->used - t->begun;
    t->begun = t->used;
    if (n && !t->status)
        t->status = gpu_enter(g);
    if (n && !t->status)
        t->status = check(g, t->up ? g->cu->cuMemcpyHtoDAsync_v2(t->there, from, n, s->stream)
                                   : g->cu->cuMemcpyDtoHAsync_v2(from, t->there, n, s->stream));
}

/* What is in the buffer arrives. After a failure it waits too: the buffer is used again. */
static void flush(struct gpu_segments *s) {
    struct gpu_stage *t = &s->stage;
    queue(s);
    int status = t->used ? gpu_enter(s->gpu) : 0;
    if (t->used && !status)
        status = check(s->gpu, s->gpu->cu->cuStreamSynchronize(s->stream));
    if (!t->status)
        t->status = status;
    for (int i = 0; i < t->n_pieces && !t->status; i++)
        memcpy(t->pieces[i].to, t->bytes + t->pieces[i].at, t->pieces[i].bytes);
    t->used = t->begun = 0;
    t->n_pieces = 0;
}

static void make_stage(struct gpu_segments *s) {
    struct gpu_stage *t = &s->stage;
    void *memory = NULL;
    t->status = gpu_enter(s->gpu);
    if (!t->status)
        t->status = cuda_status(s->gpu->index, "pinned memory",
                                s->gpu->cu->cuMemHostAlloc(&memory, STAGE_BYTES, 0));
    t->bytes = t->status ? NULL : memory;
}

/* At most n bytes of a piece; how many. */
static size_t take(struct gpu_segments *s, uint64_t there, char *here, size_t n, bool up) {
    struct gpu_stage *t = &s->stage;
    if (t->there + (t->used - t->begun) != there || t->up != up) {
        queue(s);
        t->there = there;
        t->up = up;
    }
    if (n > STAGE_BYTES - t->used)
        n = STAGE_BYTES - t->used;
    if (up)
        memcpy(t->bytes + t->used, here, n);
    else {
        t->pieces[t->n_pieces].to = here;
        t->pieces[t->n_pieces].at = t->used;
        t->pieces[t->n_pieces++].bytes = n;
    }
    t->used += n;
    return n;
}

static int move(struct gpu_segments *s, const void *there, char *here, size_t bytes, bool up) {
    struct gpu_stage *t = &s->stage;
    if (!t->status && !t->bytes)
        make_stage(s);
    for (size_t done = 0; done < bytes && !t->status;) {
        if (t->used == STAGE_BYTES || t->n_pieces == STAGE_PIECES)
            flush(s);
        if (!t->status)
            done += take(s, cuda_address(there) + done, here + done, bytes - done, up);
    }
    return t->status;
}

int gpu_fetch(void *of, void *to, const void *from, size_t bytes) {
    return move(of, from, to, bytes, false);
}

int gpu_send(void *of, void *to, const void *from, size_t bytes) {
    return move(of, to, (char *)(uintptr_t)from, bytes, true);
}

int gpu_wait(void *of) {
    struct gpu_segments *s = of;
    flush(s);
    const int status = s->stage.status;
    s->stage.status = 0;
    return status;
}
