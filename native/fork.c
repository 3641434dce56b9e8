#include "fork.h"

#include <pthread.h>

static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static struct forkable *first;

static void before(void) { pthread_mutex_lock(&gate); }

static void in_parent(void) { pthread_mutex_unlock(&gate); }

static void in_child(void) {
    for (struct forkable *f = first; f; f = f->next)
        f->renew(f);
    pthread_mutex_init(&gate, NULL);
}

static void install(void) { pthread_atfork(before, in_parent, in_child); }

void fork_hold(void) {
    pthread_once(&once, install);
    pthread_mutex_lock(&gate);
}

void fork_release(void) { pthread_mutex_unlock(&gate); }

void fork_add(struct forkable *f) {
    f->next = first;
    first = f;
}

void fork_remove(struct forkable *f) {
    struct forkable **link = &first;
    while (*link && *link != f)
        link = &(*link)->next;
    if (*link)
        *link = f->next;
}
