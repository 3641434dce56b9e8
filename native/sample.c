/* The order is llama.cpp's: bias, penalties, top-k, top-p, min-p, temperature, then a random choice among
 * what is left.
 *
 * SplitMix64 gives every id at every position a number x in (0, 1); E = -log(1 - x) is its exponential
 * noise, -log(E) its Gumbel noise, and the token is the id with the largest
 *
 *     logit / temperature - log(E)
 *
 * which is distributed as softmax(logits / temperature). The choice depends on the logits, the seed and the
 * position alone: no state is carried from token to token, and a filter does not change the noise of the
 * ids it keeps. So a draft model finds the target's choice wherever the two agree, and a verification finds
 * that of plain decoding. */
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
static bool before(struct candidate a, struct candidate b) {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

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

/* The k largest, in any order; of equals the lower ids. As many blocks have a largest one of `least` or more,
 * so that hardly anything below them is looked at twice. */
static int largest_k(const struct kernels *kernels, const float *logits, int n, int k,
                     struct candidate *heap) {
    int found = 0;
    if (k < 1 || k >= n) {
        for (int i = 0; i < n; i++)
            heap[i] = (struct candidate){ logits[i], i };
        return n;
    }
    for (int i = 0; i < n; i += BLOCK)
        found = take(heap, found, k,
                     (struct candidate){ kernels->largest(logits + i, n - i < BLOCK ? n - i : BLOCK), i });
    float least = found == k ? heap[0].logit : -INFINITY;
    found = 0;
    for (int i = 0; i < n; i += BLOCK)
        for (uint64_t left = kernels->reaching(logits + i, n - i < BLOCK ? n - i : BLOCK, least); left;
             left &= left - 1) {
            int id = i + __builtin_ctzll(left);
            found = take(heap, found, k, (struct candidate){ logits[id], id });
        }
    return found;
}

static double weight(struct candidate c, float top) { return (double)expf(c.logit - top); }

/* Moves the fewest candidates that weigh `target` together, the largest, to the front; how many they
 * are, at least one. Splits at a candidate and goes on in the part where the last of them is, until
 * that is worth sorting. */
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
static double least_of(const bmc_sampler *s, float top) {
    return s->min_p > 0 ? top + log(s->min_p) : -INFINITY;
}

/* What all filters leave where min-p decides alone, as it often does: no more than top-k are as likely as it
 * asks for, and top-p's share even of these takes in the least of them. 0: not so. */
static int by_min_p(const struct kernels *kernels, const bmc_sampler *s, const float *logits, int n, int k,
                    float top, struct candidate *c) {
    double least = least_of(s, top), total = 0, smallest = 1;
    int found = 0;
    if (s->min_p <= 0)
        return 0;
    k = k < 1 || k > n ? n : k;
    for (int i = 0; i < n; i += BLOCK)
        for (uint64_t left = kernels->reaching(logits + i, n - i < BLOCK ? n - i : BLOCK, (float)least); left;
             left &= left - 1) {
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

/* Colder is greedy but for exact ties. */
static double warmth(const bmc_sampler *s) { return s->temperature > 1e-6 ? s->temperature : 1e-6; }

/* E is more than x, so logit / temperature - log(x) is more than a score, and x's exponent bounds its
 * logarithm: of a whole vocabulary few ids are looked at closely. */
static int32_t draw(const bmc_sampler *s, const struct candidate *c, int n, float top, int position,
                    const int32_t *names, float *lead) {
    const double temperature = warmth(s);
    const double ln2 = 0.6931471805599453, loudest = 53 * ln2;
    const uint64_t start = splitmix64(s->seed, (uint64_t)position);
    double first = -INFINITY, second = -INFINITY;
    int32_t winner = c[0].id;
    for (int i = 0; i < n; i++) {
        double score = (double)(c[i].logit - top) / temperature;
        if (score + loudest < second)
            continue;
        double x = uniform(start, names ? names[c[i].id] : c[i].id);
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

/* ---- what changes logits before the filters */

int sampler_check(const bmc_sampler *s, int n_vocab) {
    if (!(s->temperature >= 0 && isfinite(s->temperature)))
        return fail(BMC_EINVAL, "temperature: expected 0 or more, found %g", s->temperature);
    if (s->top_k < 0)
        return fail(BMC_EINVAL, "top_k: expected 0 or more, found %d", (int)s->top_k);
    if (!(s->top_p >= 0 && s->top_p <= 1) || !(s->min_p >= 0 && s->min_p <= 1))
        return fail(BMC_EINVAL, "top_p and min_p: expected 0 to 1, found %g and %g", s->top_p, s->min_p);
    if (!(s->repeat_penalty > 0 && isfinite(s->repeat_penalty)))
        return fail(BMC_EINVAL, "repeat_penalty: expected more than 0, found %g", (double)s->repeat_penalty);
    if (!isfinite(s->presence_penalty) || !isfinite(s->frequency_penalty))
        return fail(BMC_EINVAL, "presence_penalty and frequency_penalty: expected numbers, found %g and %g",
                    (double)s->presence_penalty, (double)s->frequency_penalty);
    if (s->last_n < -1 || s->n_bias < 0 || (s->n_bias && (!s->bias_id || !s->bias)))
        return fail(BMC_EINVAL, "sampler: last_n is %d, n_bias %d", (int)s->last_n, (int)s->n_bias);
    for (int i = 0; i < s->n_bias; i++) {
        if (s->bias_id[i] < 0 || s->bias_id[i] >= n_vocab)
            return fail(BMC_EINVAL, "logit_bias names token %d, but the vocabulary has %d tokens",
                        (int)s->bias_id[i], n_vocab);
        if (isnan(s->bias[i]) || s->bias[i] == INFINITY)
            return fail(BMC_EINVAL, "logit_bias of token %d: expected a number or -inf, found %g",
                        (int)s->bias_id[i], (double)s->bias[i]);
    }
    return 0;
}

static bool penalizes(const bmc_sampler *s) {
    return s->last_n && (s->repeat_penalty != 1 || s->presence_penalty != 0 || s->frequency_penalty != 0);
}

bool sampler_alters(const bmc_sampler *s, const uint32_t *mask) {
    return mask || (s && (s->n_bias || penalizes(s)));
}

/* A positive logit is divided by the repeat penalty, a negative one multiplied; then the frequency
 * penalty is taken off for each time that the token occurs, and the presence penalty once. counts:
 * (n_vocab,), any values. */
static void penalize(const bmc_sampler *s, const int32_t *history, int n_history, float *logits, int n_vocab,
                     int32_t *counts) {
    int n = s->last_n >= 0 && s->last_n < n_history ? s->last_n : n_history;
    const int32_t *recent = history + n_history - n;
    memset(counts, 0, (size_t)n_vocab * sizeof *counts);
    for (int i = 0; i < n; i++)
        counts[recent[i]]++;
    for (int i = 0; i < n; i++) {
        int32_t *count = &counts[recent[i]];
        float *logit = &logits[recent[i]];
        if (!*count)
            continue;
        *logit = *logit > 0 ? *logit / s->repeat_penalty : *logit * s->repeat_penalty;
        *logit -= (float)*count * s->frequency_penalty;
        *logit -= s->presence_penalty;
        *count = 0;
    }
}

float sampler_alter(const struct kernels *kernels, const bmc_sampler *s, const uint32_t *mask,
                    const int32_t *history, int n_history, const float *logits, int n, float *altered,
                    struct candidate *room) {
    memcpy(altered, logits, (size_t)n * sizeof *altered);
    for (int i = 0; s && i < s->n_bias; i++)
        altered[s->bias_id[i]] += s->bias[i];
    if (s && penalizes(s))
        penalize(s, history, n_history, altered, n, (int32_t *)(void *)room);
    for (int i = 0; mask && i < n; i++)
        if (!(mask[i / 32] >> i % 32 & 1))
            altered[i] = -INFINITY;
    return kernels->largest(altered, n);
}

/* ---- the choice */

int32_t sample(const struct kernels *kernels, const bmc_sampler *s, const float *logits, int n, float top,
               int position, const int32_t *names, struct candidate *room, float *lead, int *n_left) {
    int k = s->temperature > 0 ? s->top_k : 1, left = by_min_p(kernels, s, logits, n, k, top, room);
    if (!left)
        left = likely(s, room, largest_k(kernels, logits, n, k, room), top);
    if (n_left)
        *n_left = left;
    return draw(s, room, left, top, position, names, lead);
}

void likeliest(const struct kernels *kernels, const float *logits, int n, int k, double log_sum, int32_t *ids,
               float *logprobs, struct candidate *room) {
    k = largest_k(kernels, logits, n, k, room);
    sort(room, k);
    for (int i = 0; i < k; i++) {
        ids[i] = room[i].id;
        logprobs[i] = (float)((double)room[i].logit - log_sum);
    }
}

/* Moves the k first in order to the front, sorted. */
static void first_k(struct candidate *c, int n, int k) {
    for (int i = k / 2 - 1; i >= 0; i--)
        sift(c, k, i);
    for (int i = k; i < n && k; i++)
        if (before(c[i], c[0])) {
            swap(&c[i], &c[0]);
            sift(c, k, 0);
        }
    sort(c, k);
}

float drawn_logprobs(const bmc_sampler *s, struct candidate *c, int n, int32_t id, int k, int32_t *ids,
                     float *logprobs) {
    const double temperature = warmth(s);
    double sum = 0, its = NAN;
    float top = -INFINITY;
    for (int i = 0; i < n; i++)
        top = c[i].logit > top ? c[i].logit : top;
    for (int i = 0; i < n; i++) {
        double score = (double)(c[i].logit - top) / temperature;
        sum += exp(score);
        its = c[i].id == id ? score : its;
    }
    int told = k < n ? k : n;
    first_k(c, n, told);
    for (int i = 0; i < k; i++) {
        ids[i] = i < told ? c[i].id : -1;
        logprobs[i] = i < told ? (float)((double)(c[i].logit - top) / temperature - log(sum)) : -INFINITY;
    }
    return (float)(its - log(sum));
}

int bmc_choose(const float *logits, int n, const bmc_sampler *s, int position, const int32_t *history,
               int n_history, int32_t *id) {
    if (!logits || n < 1 || !s || !id || position < 0 || n_history < 0 || (n_history && !history))
        return fail(BMC_EINVAL, "bmc_choose: needs logits, a sampler, a position and the tokens before");
    const struct kernels *kernels = kernels_find();
    if (!kernels || sampler_check(s, n))
        return BMC_EINVAL;
    for (int i = 0; i < n_history; i++)
        if (history[i] < 0 || history[i] >= n)
            return fail(BMC_EINVAL, "token ids are 0 to %d, found %d", n - 1, (int)history[i]);
    struct candidate *room = malloc((size_t)n * (sizeof *room + sizeof(float)));
    if (!room)
        return fail(BMC_ENOMEM, "no memory for %d candidates", n);
    float *altered = (float *)(void *)(room + n);
    float top = sampler_alter(kernels, s, NULL, history, n_history, logits, n, altered, room);
    for (int i = 0; i < n; i++)
        top = isnan(altered[i]) ? NAN : top;
    if (isfinite(top))
        *id = sample(kernels, s, altered, n, top, position, NULL, room, NULL, NULL);
    free(room);
    return isfinite(top) ? 0 : fail(BMC_EINVAL, "the largest logit is %g", (double)top);
}
