/* The sampler against its definition: sort everything, drop what the filters drop, score the rest. */
#include "check.h"
#include "cpu.h"
#include "sample.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

static int by_size(const void *a, const void *b) {
    const struct candidate *one = a, *other = b;
    if (one->logit != other->logit)
        return one->logit > other->logit ? -1 : 1;
    return one->id - other->id;
}

static uint64_t splitmix64(uint64_t seed, uint64_t index) {
    uint64_t z = seed + (index + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static int32_t defined(const bmc_sampler *s, const float *logits, int n, int position, const int32_t *names,
                       float *lead) {
    struct candidate *all = malloc((size_t)n * sizeof *all);
    double total = 0, mass = 0, first = -INFINITY, second = -INFINITY;
    int kept = 0, k = s->top_k && s->top_k < n ? s->top_k : n;
    int32_t winner = -1;
    for (int i = 0; i < n; i++)
        all[i] = (struct candidate){ logits[i], i };
    qsort(all, (size_t)n, sizeof *all, by_size);
    for (int i = 0; i < k; i++)
        total += (double)expf(all[i].logit - all[0].logit);
    while (kept < k && (kept == 0 || s->top_p == 1 || mass < s->top_p * total)) {
        if (s->min_p > 0 && all[kept].logit < all[0].logit + log(s->min_p))
            break;
        mass += (double)expf(all[kept++].logit - all[0].logit);
    }
    for (int i = 0; i < kept; i++) {
        uint64_t start = splitmix64(s->seed, (uint64_t)position);
        uint64_t id = (uint64_t)(names ? names[all[i].id] : all[i].id);
        double x = ((double)(splitmix64(start, id) >> 12) + 0.5) * 0x1p-52;
        double score = (double)(all[i].logit - all[0].logit) / s->temperature - log(-log1p(-x));
        if (score > first || (score == first && all[i].id < winner)) {
            second = first;
            first = score;
            winner = all[i].id;
        } else if (score > second)
            second = score;
    }
    *lead = second > -INFINITY ? (float)(first - second) : INFINITY;
    free(all);
    return winner;
}

/* Logits with ties, now and then with ids that are banned; the largest of them. */
static float random_logits(uint64_t *state, float *logits, int n) {
    int coarse = 1 + (int)random_below(state, 40);
    float top = -INFINITY;
    for (int i = 0; i < n; i++) {
        bool banned = i > 0 && !random_below(state, 50);
        logits[i] = banned ? -INFINITY : (float)random_below(state, 8 * coarse) / (float)coarse;
        top = logits[i] > top ? logits[i] : top;
    }
    return top;
}

static int32_t *random_ids(uint64_t *state, int n, int limit) {
    int32_t *ids = malloc((size_t)(n ? n : 1) * sizeof *ids);
    for (int i = 0; i < n; i++)
        ids[i] = (int32_t)random_below(state, limit);
    return ids;
}

static const bmc_sampler PLAIN = { .temperature = 1, .top_p = 1, .repeat_penalty = 1 };

/* names: the same noise under other ids. */
static void choices_are_those_defined(const struct kernels *kernels) {
    static const double shares[] = { 0, 0.02, 0.3, 0.9, 1 };
    uint64_t state = 7;
    for (int round = 0; round < 2000; round++) {
        int n = 1 + (int)random_below(&state, round % 10 ? 300 : 3000);
        int position = (int)random_below(&state, 100000);
        float *logits = malloc((size_t)n * sizeof *logits), lead, right;
        float top = random_logits(&state, logits, n);
        bmc_sampler s = PLAIN;
        s.temperature = 0.05 + 0.1 * (double)random_below(&state, 40);
        s.top_p = shares[random_below(&state, 5)];
        s.min_p = shares[random_below(&state, 5)];
        s.seed = random_bits(&state);
        s.top_k = (int32_t)random_below(&state, 2) * (int32_t)random_below(&state, 400);
        size_t left = (size_t)(s.top_k && s.top_k < n ? s.top_k : n);
        struct candidate *room = malloc(left * sizeof *room);
        int32_t *names = random_ids(&state, n, n), id = -1, best = 0;
        for (int named = 0; named < 2; named++) {
            int32_t found = sample(kernels, &s, logits, n, top, position, named ? names : NULL, room, &lead,
                                   NULL);
            CHECK(found == defined(&s, logits, n, position, named ? names : NULL, &right) && lead == right);
        }
        CHECK(bmc_choose(logits, n, &s, position, NULL, 0, &id) == 0);
        CHECK(id == sample(kernels, &s, logits, n, top, position, NULL, room, NULL, NULL));
        while (logits[best] != top)
            best++;
        s.temperature = 0;
        CHECK(bmc_choose(logits, n, &s, position, NULL, 0, &id) == 0 && id == best);
        free(names);
        free(room);
        free(logits);
    }
}

/* The shares of a draw: they are those of the logits over the temperature, add up to 1, and
 * come in descending order. */
static void draws_are_told_as_they_are(const struct kernels *kernels) {
    uint64_t state = 5;
    for (int round = 0; round < 500; round++) {
        enum { MOST = 100 };
        int n = 1 + (int)random_below(&state, MOST), k = (int)random_below(&state, MOST + 3);
        int left = 0, told = 0;
        float logits[MOST], logprobs[MOST + 2] = { 0 };
        struct candidate room[MOST];
        int32_t ids[MOST + 2];
        bmc_sampler s = PLAIN;
        s.temperature = 0.05 + 0.1 * (double)random_below(&state, 40);
        s.top_k = (int32_t)random_below(&state, 2) * (int32_t)random_below(&state, 50);
        s.seed = random_bits(&state);
        float top = random_logits(&state, logits, n);
        int32_t id = sample(kernels, &s, logits, n, top, round, NULL, room, NULL, &left);
        CHECK(left == (s.top_k && s.top_k < n ? s.top_k : n));
        double its = (double)drawn_logprobs(&s, room, left, id, k, ids, logprobs), sum = 0;
        while (told < k && ids[told] >= 0)
            sum += exp((double)logprobs[told++]);
        CHECK(told == (k < left ? k : left) && (told < left ? sum < 1 + 1e-5 : fabs(sum - 1) < 1e-5));
        for (int i = 0; i < told; i++) {
            CHECK(!i || logits[ids[i - 1]] > logits[ids[i]]
                  || (logits[ids[i - 1]] == logits[ids[i]] && ids[i - 1] < ids[i]));
            CHECK(ids[i] != id || (double)logprobs[i] == its);
            double ahead = (double)(logits[ids[i]] - logits[id]) / s.temperature;
            if (isfinite(logits[ids[i]]) && isfinite(logits[id]))
                CHECK(fabs(ahead - ((double)logprobs[i] - its)) < 1e-4);
        }
        for (int i = told; i < k; i++)
            CHECK(ids[i] == -1 && logprobs[i] == -INFINITY);
    }
}

/* Bias, then penalties for each id of the history's end, then the mask. */
static float altered_by_definition(const bmc_sampler *s, const uint32_t *mask, const int32_t *history,
                                   int n_history, const float *logits, int n, float *altered) {
    int last = s->last_n < 0 || s->last_n > n_history ? n_history : s->last_n;
    float top = -INFINITY;
    for (int id = 0; id < n; id++) {
        float x = logits[id], count = 0;
        for (int i = 0; i < s->n_bias; i++)
            x += s->bias_id[i] == id ? s->bias[i] : 0;
        for (int i = n_history - last; i < n_history; i++)
            count += history[i] == id;
        if (count > 0) {
            x = x > 0 ? x / s->repeat_penalty : x * s->repeat_penalty;
            x -= count * s->frequency_penalty;
            x -= s->presence_penalty;
        }
        altered[id] = mask && !(mask[id / 32] >> id % 32 & 1) ? -INFINITY : x;
        top = altered[id] > top ? altered[id] : top;
    }
    return top;
}

static void logits_are_altered_as_defined(const struct kernels *kernels) {
    enum { N = 100, LONGEST = 80 };
    uint64_t state = 11;
    for (int round = 0; round < 1000; round++) {
        float logits[N], altered[N], right[N], bias[] = { 2, -INFINITY, -0.5f };
        struct candidate room[N];
        int32_t bias_id[] = { 3, 50, (int32_t)random_below(&state, 40) + 55 };
        uint32_t mask[(N + 31) / 32];
        int n = 97 + (int)random_below(&state, 4), n_history = (int)random_below(&state, LONGEST);
        int32_t *history = random_ids(&state, n_history, 30);
        bmc_sampler s = PLAIN;
        s.last_n = (int32_t)random_below(&state, 90) - 1;
        s.repeat_penalty = 0.5f + (float)random_below(&state, 10) / 5;
        s.frequency_penalty = (float)random_below(&state, 3) - 1;
        s.presence_penalty = (float)random_below(&state, 3) / 2;
        s.n_bias = (int32_t)random_below(&state, 4);
        s.bias_id = bias_id;
        s.bias = bias;
        for (size_t i = 0; i < sizeof mask / sizeof *mask; i++)
            mask[i] = (uint32_t)random_bits(&state);
        random_logits(&state, logits, n);
        const uint32_t *masked = random_below(&state, 2) ? mask : NULL;
        float top = sampler_alter(kernels, &s, masked, history, n_history, logits, n, altered, room);
        CHECK(top == altered_by_definition(&s, masked, history, n_history, logits, n, right));
        for (int i = 0; i < n; i++)
            CHECK(altered[i] == right[i]);
        free(history);
    }
    bmc_sampler s = PLAIN;
    CHECK(!sampler_alters(&s, NULL) && !sampler_alters(NULL, NULL));
    CHECK(sampler_alters(NULL, (const uint32_t[]){ 1 }));
    s.repeat_penalty = 2;
    CHECK(!sampler_alters(&s, NULL));           /* last_n 0: no token counts */
    s.last_n = 5;
    CHECK(sampler_alters(&s, NULL));
}

static void the_likeliest_are_in_order(const struct kernels *kernels) {
    uint64_t state = 5;
    for (int round = 0; round < 300; round++) {
        int n = 1 + (int)random_below(&state, 500), k = 1 + (int)random_below(&state, n < 20 ? n : 20);
        float *logits = malloc((size_t)n * sizeof *logits), logprobs[20];
        struct candidate *all = malloc((size_t)n * sizeof *all), room[20];
        int32_t ids[20];
        random_logits(&state, logits, n);
        for (int i = 0; i < n; i++)
            all[i] = (struct candidate){ logits[i], i };
        qsort(all, (size_t)n, sizeof *all, by_size);
        likeliest(kernels, logits, n, k, 3.5, ids, logprobs, room);
        for (int i = 0; i < k; i++)
            CHECK(ids[i] == all[i].id && logprobs[i] == (float)((double)all[i].logit - 3.5));
        free(all);
        free(logits);
    }
}

static void what_is_wrong_is_refused(void) {
    float logits[3] = { 0, NAN, 1 };
    int32_t id, nine = 9;
    bmc_sampler s = PLAIN;
    CHECK(bmc_choose(logits, 3, &s, 0, NULL, 0, &id) == BMC_EINVAL);
    CHECK(bmc_choose((const float[]){ 0, INFINITY }, 2, &s, 0, NULL, 0, &id) == BMC_EINVAL);
    CHECK(bmc_choose((const float[]){ -INFINITY, -INFINITY }, 2, &s, 0, NULL, 0, &id) == BMC_EINVAL);
    logits[1] = 0;
    CHECK(bmc_choose(logits, 3, &s, 0, NULL, 0, &id) == 0);
    CHECK(bmc_choose(logits, 0, &s, 0, NULL, 0, &id) == BMC_EINVAL);
    CHECK(bmc_choose(logits, 3, NULL, 0, NULL, 0, &id) == BMC_EINVAL);
    CHECK(bmc_choose(logits, 3, &s, -1, NULL, 0, &id) == BMC_EINVAL);
    CHECK(bmc_choose(logits, 3, &s, 0, NULL, 1, &id) == BMC_EINVAL);
    CHECK(bmc_choose(logits, 3, &s, 1, &nine, 1, &id) == BMC_EINVAL);
    const bmc_sampler wrong[] = {
        { .temperature = -1 }, { .temperature = NAN }, { .temperature = INFINITY }, { .top_p = 1.5 },
        { .top_p = NAN }, { .min_p = -0.5 }, { .top_k = -1 }, { .last_n = -2 }, { .repeat_penalty = -1 },
        { .repeat_penalty = INFINITY }, { .frequency_penalty = NAN }, { .presence_penalty = INFINITY },
        { .n_bias = 1 }, { .n_bias = -1 },
        { .n_bias = 1, .bias_id = &nine, .bias = logits },
        { .n_bias = 1, .bias_id = (const int32_t[]){ 1 }, .bias = (const float[]){ NAN } },
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        s = wrong[i];
        s.top_p = s.top_p == 0 ? 1 : s.top_p;
        s.repeat_penalty = s.repeat_penalty == 0 ? 1 : s.repeat_penalty;
        CHECK(bmc_choose(logits, 3, &s, 0, NULL, 0, &id) == BMC_EINVAL);
    }
    s = PLAIN;
    s.repeat_penalty = 0;
    CHECK(bmc_choose(logits, 3, &s, 0, NULL, 0, &id) == BMC_EINVAL);
}

int main(void) {
    struct kernels kernels;
    for (int level = 0; kernels_at(level, &kernels); level++) {
        choices_are_those_defined(&kernels);
        draws_are_told_as_they_are(&kernels);
        logits_are_altered_as_defined(&kernels);
        the_likeliest_are_in_order(&kernels);
    }
    what_is_wrong_is_refused();
    return 0;
}
