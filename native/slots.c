#include "slots.h"

#include <stdlib.h>
#include <string.h>

void slots_clear(struct slots *s) {
    memset(s->slot_of, 0xff, (size_t)s->n_things * sizeof *s->slot_of);
    s->n_kept = 0;
    s->newest = s->oldest = -1;
}

int slots_init(struct slots *s, int n, int n_things) {
    *s = (struct slots){ .n = n, .n_things = n_things };
    s->slot_of = malloc((size_t)n_things * sizeof *s->slot_of);
    s->slot = malloc((size_t)n * sizeof *s->slot);
    if (!s->slot_of || !s->slot) {
        slots_free(s);
        return -1;
    }
    slots_clear(s);
    return 0;
}

void slots_free(struct slots *s) {
    free(s->slot_of);
    free(s->slot);
    *s = (struct slots){ 0 };
}

void slots_turn(struct slots *s) { s->now++; }

static void unlink_slot(struct slots *s, int i) {
    const struct slot *slot = &s->slot[i];
    *(slot->newer < 0 ? &s->newest : &s->slot[slot->newer].older) = slot->older;
    *(slot->older < 0 ? &s->oldest : &s->slot[slot->older].newer) = slot->newer;
}

static void make_newest(struct slots *s, int i) {
    struct slot *slot = &s->slot[i];
    slot->newer = -1;
    slot->older = s->newest;
    slot->used = s->now;
    *(s->newest < 0 ? &s->oldest : &s->slot[s->newest].newer) = i;
    s->newest = i;
}

int slots_use(struct slots *s, int thing) {
    const int i = s->slot_of[thing];
    if (i < 0)
        return -1;
    unlink_slot(s, i);
    make_newest(s, i);
    return i;
}

int slots_take(struct slots *s, int thing, int *gone) {
    int i = s->n_kept;
    *gone = -1;
    if (i < s->n)
        s->n_kept++;
    else {
        i = s->oldest;
        if (s->slot[i].used == s->now)
            return -1;
        *gone = s->slot[i].thing;
        s->slot_of[*gone] = -1;
        unlink_slot(s, i);
    }
    s->slot[i].thing = thing;
    s->slot_of[thing] = i;
    make_newest(s, i);
    return i;
}
