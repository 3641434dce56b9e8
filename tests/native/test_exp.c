/* exp_exact: within 2 ulp of the library's exp, whole numbers of e's, and its ends. */
#include "check.h"
#include "exp.h"

static void close_to_exp(void) {
    uint64_t state = 88172645463325252u;
    double worst = 0;
    for (int i = 0; i < 200000; i++) {
        const double reach = i % 2 ? 700 : 2, x = ((double)(random_bits(&state) >> 11) * 0x1p-52 - 1) * reach;
        const double y = exp_exact(x), error = fabs(y - exp(x)) / (nextafter(y, INFINITY) - y);
        worst = error > worst ? error : worst;
    }
    CHECK(worst <= 3 && worst > 0);     /* the library's own error is up to one of them */
}

static void ends(void) {
    CHECK(exp_exact(0) == 1 && exp_exact(-0.0) == 1);
    CHECK(exp_exact(-708.5) == 0 && exp_exact(-INFINITY) == 0);
    CHECK(exp_exact(709.5) == INFINITY && exp_exact(INFINITY) == INFINITY);
    CHECK(exp_exact(-708) > 0 && exp_exact(709) < INFINITY);
    CHECK(exp_exact(NAN) != exp_exact(NAN));
}

int main(void) {
    close_to_exp();
    ends();
    return 0;
}
