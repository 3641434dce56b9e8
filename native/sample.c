/* The order is llama.cpp's: top-k, top-p, min-p, temperature, then a random choice among what is left.
 *
 * SplitMix64 gives every id at every position a number x in (0, 1); E = -log(1 - x) is its exponential noise, -log(E) its
 * Gumbel noise, and the token is the id with the largest
 *
 *     logit / temperature - log(E)
 *
 * which is distributed as softmax(logits / temperature). No state goes from token to token and a filter does not change
 * the noise of the ids it keeps, so whoever looks at a position, in whatever order, finds the same token. */
#include "sample.h"

#include "cpu.h"
#include "error.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

/* ---- noise */

static const uint64_t GOLDEN = 0x9e3779b97f4a7c15u;

/* Output number `index` of SplitMix64 (Steele, Lea, Flood 2014) started at `seed`. */
static uint64_t splitmix64(uint64_t seed, uint64_t index) {
    uint64_t z = seed + (index + 1) * GOLDEN;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* x: 52 random bits and a half. */
static double uniform(uint64_t start, int32_t id) {
    return ((double)(splitmix64(start, (uint64_t)id) >> 12) + 0.5) * 0x1p-52;
}

/* The exponent of a positive number: at most its log2. */
static int exponent(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (int)(bits >> 52) - 1023;
}

/* ---- what filters leave */

/* Where candidates are sorted a stands before b: the larger logit, of equals the lower id. */
static bool before(struct candidate a, struct candidate b) { return a.logit > b.logit || (a.logit == b.logit && a.id < b.id); }

/* The few, in order. */
static void sort(struct candidate *c, int n) {
    for (int i = 1, at; i < n; i++) {
        struct candidate moved = c[i];
        for (at = i; at > 0 && before(moved, c[at - 1]); at--)
            c[at] = c[at - 1];
        c[at] = moved;
    }
}

static void swap(struct candidate *a, struct candidate *b) {
    struct candidate kept = *a;
    *a = *b;
    *b = kept;
}

/* A heap with its last in order on top. */
static void sift(struct candidate *heap, int n, int at) {
    for (int child; (child = 2 * at + 1) < n; at = child) {
        child += child + 1 < n && before(heap[child], heap[child + 1]);
        if (!before(heap[at], heap[child]))
            break;
        swap(&heap[at], &heap[child]);
    }
}

enum { BLOCK = 64 };

/* Takes c among the k largest, of which the heap has n; how many it has then. */
static int take(struct candidate *heap, int n, int k, struct candidate c) {
    if (n < k) {
        heap[n++] = c;
        for (int i = n < k ? -1 : k / 2 - 1; i >= 0; i--)
            sift(heap, k, i);
    } else if (c.logit > heap[0].logit) {
        heap[0] = c;
        sift(heap, k, 0);
    }
    return n;
}

/* The k largest, in any order; of equals the lower ids. As many blocks have a largest one of `least` or more, so that hardly
 * anything below them is looked at twice. */
static int largest_k(const struct kernels *kernels, const float *logits, int n, int k, struct candidate *heap) {
    int found = 0;
    if (k < 1 || k >= n) {
        for (int i = 0; i < n; i++)
            heap[i] = (struct candidate){ logits[i], i };
        return n;
    }
    for (int i = 0; i < n; i += BLOCK)
        found = take(heap, found, k, (struct candidate){ kernels->largest(logits + i, n - i < BLOCK ? n - i : BLOCK), i });
    float least = found == k ? heap[0].logit : -INFINITY;
    found = 0;
    for (int i = 0; i < n; i += BLOCK)
        for (uint64_t left = kernels->reaching(logits + i, n - i < BLOCK ? n - i : BLOCK, least); left; left &= left - 1) {
            int id = i + __builtin_ctzll(left);
            found = take(heap, found, k, (struct candidate){ logits[id], id });
        }
    return found;
}

static double weight(struct candidate c, float top) { return (double)expf(c.logit - top); }

/* Moves the fewest candidates that weigh `target` together, the largest, to the front; how many they are, at least one.
 * Splits at a candidate and goes on in the part where the last of them is, until that is worth sorting. */
static int nucleus(struct candidate *c, int n, double target, float top) {
    enum { FEW_LEFT = 64 };
    int low = 0, high = n;              /* the last one is among these; those before weigh `mass` */
    double mass = 0;
    while (high - low > FEW_LEFT) {
        int at = low;
        double above = 0;
        swap(&c[low + (high - low) / 2], &c[high - 1]);
        struct candidate middle = c[high - 1];
        for (int i = low; i < high - 1; i++)
            if (before(c[i], middle)) {
                above += weight(c[i], top);
                swap(&c[i], &c[at++]);
            }
        swap(&c[at], &c[high - 1]);
        if (at > low && mass + above >= target) {
            high = at;
            continue;
        }
        mass += above + weight(middle, top);
        low = at + 1;
        if (mass >= target)
            return low;
    }
    sort(c + low, high - low);
    while (low < high) {
        mass += weight(c[low++], top);
        if (mass >= target)
            break;
    }
    return low;
}

/* The least logit that min-p leaves. */
static double least_of(const bmc_sampler *s, float top) { return s->min_p > 0 ? top + log(s->min_p) : -INFINITY; }

/* What all filters leave where min-p decides alone, as it often does: no more than top-k are as likely as it asks for, and top-p's share
 * even of these takes in the least of them. 0: not so. */
static int by_min_p(const struct kernels *kernels, const bmc_sampler *s, const float *logits, int n, int k, float top,
                    struct candidate *c) {
    double least = least_of(s, top), total = 0, smallest = 1;
    int found = 0;
    if (s->min_p <= 0)
        return 0;
    k = k < 1 || k > n ? n : k;
    for (int i = 0; i < n; i += BLOCK)
        for (uint64_t left = kernels->reaching(logits + i, n - i < BLOCK ? n - i : BLOCK, (float)least); left; left &= left - 1) {
            struct candidate one = { logits[i + __builtin_ctzll(left)], i + __builtin_ctzll(left) };
            if (one.logit < least)
                continue;
            if (found == k)
                return 0;
            double its = weight(one, top);
            total += its;
            smallest = its < smallest ? its : smallest;
            c[found++] = one;
        }
    const double rounding = 1e-9;       /* more than sums of a vocabulary lose, n / 2^53 */
    return s->top_p >= 1 || total - smallest < s->top_p * total * (1 - rounding) ? found : 0;
}

/* What top-p and min-p leave, in front: either leaves the first of them by size. */
static int likely(const bmc_sampler *s, struct candidate *c, int n, float top) {
    double total = 0, least = least_of(s, top);
    int kept = 0;
    for (int i = 0; i < n && s->top_p < 1; i++)
        total += weight(c[i], top);
    for (int i = 0; i < n; i++)
        if (c[i].logit >= least)
            c[kept++] = c[i];
    return s->top_p < 1 ? nucleus(c, kept, s->top_p * total, top) : kept;
}

/* ---- the draw */

/* E is more than x, so logit / temperature - log(x) is more than a score, and x's exponent bounds its logarithm: of a whole
 * vocabulary few ids are looked at closely. */
static int32_t draw(const bmc_sampler *s, const struct candidate *c, int n, float top, int position, float *lead) {
    const double temperature = s->temperature > 1e-6 ? s->temperature : 1e-6;      /* colder is greedy but for exact ties */
    const double ln2 = 0.6931471805599453, loudest = 53 * ln2;
    const uint64_t start = splitmix64(s->seed, (uint64_t)position);
    double first = -INFINITY, second = -INFINITY;
    int32_t winner = c[0].id;
    for (int i = 0; i < n; i++) {
        double score = (double)(c[i].logit - top) / temperature;
        if (score + loudest < second)
            continue;
        double x = uniform(start, c[i].id);
        if (score - ln2 * exponent(x) < second)
            continue;
        score -= log(-log1p(-x));
        if (score > first || (score == first && c[i].id < winner)) {
            second = first;
            first = score;
            winner = c[i].id;
        } else if (score > second)
            second = score;
    }
    if (lead)
        *lead = second > -INFINITY ? (float)(first - second) : INFINITY;
    return winner;
}

int sampler_check(const bmc_sampler *s) {
    if (!(s->temperature >= 0 && isfinite(s->temperature)))
        return fail(BMC_EINVAL, "temperature: expected 0 or more, found %g", s->temperature);
    if (s->top_k < 0)
        return fail(BMC_EINVAL, "top_k: expected 0 or more, found %d", (int)s->top_k);
    if (!(s->top_p >= 0 && s->top_p <= 1) || !(s->min_p >= 0 && s->min_p <= 1))
        return fail(BMC_EINVAL, "top_p and min_p: expected 0 to 1, found %g and %g", s->top_p, s->min_p);
    return 0;
}

int32_t sample(const struct kernels *kernels, const bmc_sampler *s, const float *logits, int n, float top, int position,
               struct candidate *room, float *lead) {
    int k = s->temperature > 0 ? s->top_k : 1, left = by_min_p(kernels, s, logits, n, k, top, room);
    if (!left)
        left = likely(s, room, largest_k(kernels, logits, n, k, room), top);
    return draw(s, room, left, top, position, lead);
}

int bmc_choose(const float *logits, int n, const bmc_sampler *s, int position, int32_t *id) {
    if (!logits || n < 1 || !s || !id || position < 0)
        return fail(BMC_EINVAL, "bmc_choose: needs logits, a sampler and a position");
    const struct kernels *kernels = kernels_find();
    if (!kernels || sampler_check(s))
        return BMC_EINVAL;
    float top = logits[0];
    for (int i = 1; i < n && !isnan(top); i++)
        top = logits[i] <= top ? top : logits[i];           /* the first that is no number, if there is one */
    if (!isfinite(top))
        return fail(BMC_EINVAL, "the largest logit is %g", (double)top);
    size_t left = s->top_k && s->top_k < n ? (size_t)s->top_k : (size_t)n;
    struct candidate *room = malloc(left * sizeof *room);
    if (!room)
        return fail(BMC_ENOMEM, "no memory for %d candidates", (int)left);
    *id = sample(kernels, s, logits, n, top, position, room, NULL);
    free(room);
    return 0;
}
