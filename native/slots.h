/* Which of many things are kept where there is room for a few: those that were used last. */
#ifndef SLOTS_H
#define SLOTS_H

#include <stdint.h>

struct slots {
    int n, n_things;
    int n_kept;
    int32_t *slot_of;               /* (n_things,) -1: not kept */
    struct slot { int32_t thing, newer, older; int64_t used; } *slot;      /* (n,) */
    int32_t newest, oldest;         /* of those in use; -1: none is */
    int64_t now;
};

int slots_init(struct slots *s, int n, int n_things);       /* 0, or -1 without memory */
void slots_free(struct slots *s);                           /* zeroed is fine */
void slots_clear(struct slots *s);                          /* nothing is kept any more */

void slots_turn(struct slots *s);                           /* from now on, what was used before may go */
int slots_use(struct slots *s, int thing);                  /* its slot; -1: it is not kept */
/* A slot for a thing that is not kept: an empty one, or that of the thing used longest ago, *gone (-1: none).
 * -1: every slot's thing was used in this turn. */
int slots_take(struct slots *s, int thing, int *gone);

#endif
