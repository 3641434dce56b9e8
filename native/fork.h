/* Locks and threads across a fork. The child has only the thread that forked: a lock that another thread
 * of the parent held stays locked there, and what that thread was doing is never finished. An object
 * with locks or threads is added to a list; its renew() makes them new in every forked process before
 * anything else runs there. */
#ifndef FORK_H
#define FORK_H

struct forkable {
    void (*renew)(struct forkable *self);   /* in the child, while it has one thread */
    struct forkable *next;
};

/* No fork happens between these two. */
void fork_hold(void);
void fork_release(void);

/* Between these two only. */
void fork_add(struct forkable *f);
void fork_remove(struct forkable *f);

#endif
