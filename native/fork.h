/* Locks and threads across a fork. The child has only the thread that forked: what other threads of the parent held stays
 * locked there, and what they were in the middle of is never finished. Whoever has such things adds itself to a list, and is
 * told in every forked process before anything else runs there. */
#ifndef FORK_H
#define FORK_H

struct forkable {
    void (*renew)(struct forkable *self);   /* runs in the child, alone */
    struct forkable *next;
};

/* No fork happens between these two. */
void fork_hold(void);
void fork_release(void);

/* Between these two only. */
void fork_add(struct forkable *f);
void fork_remove(struct forkable *f);

#endif
