/* What decides on guesses, driven by numbers: costs that change, chances, and how much may be lost. */
#include "check.h"
#include "policy.h"

#include <math.h>

static double truth(double width, double speed) { return speed * fmax(1, 0.4 + 0.15 * width); }

static double noisy(uint64_t *state, double seconds) {
    return seconds * (0.95 + 0.1 * (double)random_below(state, 1000) / 1000);
}

static double off(const struct pass_cost *c, double width, double speed) {
    return fabs(log(cost_at(c, width) / truth(width, speed)));
}

/* Widths that are seen are known to a few percent, and widths between them too. */
static void costs_are_found(void) {
    struct pass_cost c;
    uint64_t state = 1;
    cost_init(&c, 0.02);
    CHECK(!c.known && cost_at(&c, 1) == 0.02);
    for (int i = 0; i < 60; i++)
        for (int width = 1; width <= 16; width += 3)
            cost_observe(&c, width, noisy(&state, truth(width, 0.1)));
    for (int width = 1; width <= 16; width++)
        CHECK(off(&c, width, 0.1) < 0.06);
    for (int width = 2; width <= 700; width++)
        CHECK(cost_at(&c, width) >= cost_at(&c, width - 1));
}

/* A slow minute of the machine slows all widths, although only one of them is seen. */
static void speed_is_shared(void) {
    struct pass_cost c;
    uint64_t state = 2;
    cost_init(&c, 0.1);
    for (int i = 0; i < 60; i++)
        for (int width = 1; width <= 16; width += 3)
            cost_observe(&c, width, noisy(&state, truth(width, 0.1)));
    for (int i = 0; i < 12; i++)
        cost_observe(&c, 4, noisy(&state, truth(4, 0.2)));
    CHECK(off(&c, 4, 0.2) < 0.1 && off(&c, 1, 0.2) < 0.2 && off(&c, 13, 0.2) < 0.2);
}

/* A single pass that takes twenty times as long moves nothing much. */
static void a_hiccup_is_forgotten(void) {
    struct pass_cost c;
    uint64_t state = 3;
    cost_init(&c, 0.1);
    for (int i = 0; i < 100; i++)
        cost_observe(&c, 1, noisy(&state, 0.1));
    cost_observe(&c, 1, 2.0);
    CHECK(cost_at(&c, 1) < 0.11);
}

static void chances_are_learned(void) {
    struct acceptance a;
    uint64_t state = 4;
    acceptance_init(&a, (const float[]){ 0.3f, 0.7f }, (const double[]){ 0.1, 0.5, 0.9 }, 3);
    CHECK(fabs(acceptance_at(&a, 0.5f) - 0.5) < 1e-9 && acceptance_at(&a, 0.9f) > 0.85);
    for (int i = 0; i < 400; i++)
        acceptance_learn(&a, 0.9f, random_below(&state, 100) < 40);
    CHECK(fabs(acceptance_at(&a, 0.9f) - 0.4) < 0.15);
    CHECK(acceptance_mean(&a) < 0.6);
}

/* A text where guesses come true half as often as elsewhere is known for that after a few,
 * and forgotten as soon. */
static void a_text_has_its_own_chances(void) {
    struct recent l = { 0 };
    CHECK(fabs(recent_adjust(&l, 0.8) - 0.8) < 1e-9 && recent_mean(&l, 0.8) == 0.8);
    for (int i = 0; i < 20; i++)
        recent_learn(&l, 0.8, i % 5 == 0);
    CHECK(recent_adjust(&l, 0.8) < 0.45 && recent_mean(&l, 0.8) < 0.45);
    for (int i = 0; i < 60; i++)
        recent_learn(&l, 0.8, i % 5 > 0);
    CHECK(fabs(recent_adjust(&l, 0.8) - 0.8) < 0.1);
}

/* Whatever is tried, what is lost in all stays within the grant and the share of the time. */
static void losses_are_bounded(void) {
    struct budget b = { 0 };
    uint64_t state = 5;
    double lost = 0;
    const double one = 0.03;
    for (int i = 0; i < 20000; i++) {
        double loss = one * (double)(1 + random_below(&state, 40)) / 10;
        budget_pass_time(&b, one, one);
        if (!budget_allows(&b, loss, random_below(&state, 2)))
            continue;
        budget_enter(&b, -loss, one, random_below(&state, 2));
        lost += loss;
    }
    CHECK(lost <= one * (4 + 0.0101 * 20000) && lost > 0.5 * one * 0.01 * 20000);
}

static void a_few_guesses_make_a_source_known(void) {
    const float edges[] = { 0.5f };
    const double priors[] = { 0.3, 0.8 };
    struct acceptance a;
    acceptance_init(&a, edges, priors, 2);
    CHECK(!acceptance_known(&a));
    acceptance_learn(&a, 0.9f, true);
    CHECK(!acceptance_known(&a));
    for (int i = 0; i < 5; i++)
        acceptance_learn(&a, 0.1f, false);
    CHECK(acceptance_known(&a));
    acceptance_recall(&a);
    CHECK(acceptance_known(&a));
}

int main(void) {
    costs_are_found();
    speed_is_shared();
    a_hiccup_is_forgotten();
    chances_are_learned();
    a_text_has_its_own_chances();
    losses_are_bounded();
    a_few_guesses_make_a_source_known();
    return 0;
}
