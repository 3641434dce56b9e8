/* What is kept, against a list that is searched. */
#include "check.h"

#include "slots.h"

#include <string.h>

enum { MOST = 12, THINGS = 40 };

/* Things from the newest on, each with the turn of its last use. */
struct plain { int n, thing[MOST]; int64_t used[MOST]; };

static int position(const struct plain *p, int thing) {
    for (int i = 0; i < p->n; i++)
        if (p->thing[i] == thing)
            return i;
    return -1;
}

static void to_front(struct plain *p, int at, int thing, int64_t now) {
    memmove(p->thing + 1, p->thing, (size_t)at * sizeof *p->thing);
    memmove(p->used + 1, p->used, (size_t)at * sizeof *p->used);
    p->thing[0] = thing;
    p->used[0] = now;
}

/* Every thing of the list has a slot of its own, and nothing else has one. */
static void check_equal(const struct slots *s, const struct plain *p) {
    unsigned seen = 0;
    CHECK(s->n_kept == p->n);
    for (int thing = 0; thing < THINGS; thing++) {
        int slot = s->slot_of[thing];
        CHECK((slot >= 0) == (position(p, thing) >= 0));
        if (slot >= 0) {
            CHECK(slot < s->n && s->slot[slot].thing == thing && !(seen >> slot & 1));
            seen |= 1u << slot;
        }
    }
}

static void any_turns(int n) {
    struct slots s;
    struct plain p = { 0 };
    uint64_t state = (uint64_t)n;
    int refused = 0, left = 0;
    CHECK(slots_init(&s, n, THINGS) == 0);
    for (int64_t turn = 1; turn <= 500; turn++) {
        slots_turn(&s);
        for (int i = 0; i < 1 + (int)random_below(&state, 6); i++) {
            int thing = (int)random_below(&state, THINGS), gone, at = position(&p, thing);
            if (at >= 0) {
                CHECK(slots_use(&s, thing) == s.slot_of[thing]);
                to_front(&p, at, thing, turn);
                continue;
            }
            CHECK(slots_use(&s, thing) == -1);
            int slot = slots_take(&s, thing, &gone);
            if (p.n == n && p.used[n - 1] == turn) {
                CHECK(slot == -1 && gone == -1);
                refused++;
                continue;
            }
            CHECK(slot >= 0 && gone == (p.n == n ? p.thing[n - 1] : -1));
            left += gone >= 0;
            if (p.n < n)
                p.n++;
            to_front(&p, p.n - 1, thing, turn);
            check_equal(&s, &p);
        }
        if (random_below(&state, 100) == 0) {
            slots_clear(&s);
            p.n = 0;
        }
        check_equal(&s, &p);
    }
    CHECK(left > 100 && (n > 3 || refused > 10));
    slots_free(&s);
    slots_free(&s);
}

int main(void) {
    for (int n = 1; n <= MOST; n++)
        any_turns(n);
    return 0;
}
