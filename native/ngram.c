/* An index of pairs: where each pair of tokens ended last, and for every position where its pair had ended
 * before. Following these places back finds matches, the latest first; a token costs nanoseconds to add.
 *
 * An edited copy leaves its source and comes back to it: a token that is close by there is enough, without a
 * pair. The guess after it goes on a match of one, those behind it the copy. */
#include "ngram.h"

#include "bmc.h"
#include "error.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum {
    TRIES = 64,                     /* places that one look at a match takes */
    COPY = 4,                       /* tokens of a match that is taken for a copy */
    EDITED = 4,                     /* tokens that an edit puts in or leaves out, at most */
};

struct slot { int32_t first, second, end; };        /* end 0: empty */

struct ngrams {
    int32_t *text, *before;         /* before[i]: where the pair that ends at i (tokens before
                                       it: i) ended before, or 0 */
    int n, room;
    int hint;                       /* tokens at its beginning that are not the text's */
    struct slot *slots;             /* open addressing; n_slots is a power of two, at least twice room */
    size_t n_slots;
};

static struct slot *find(const struct ngrams *g, int32_t first, int32_t second) {
    uint64_t key = ((uint64_t)(uint32_t)first << 32 | (uint32_t)second) * 0x9e3779b97f4a7c15u;
    size_t at = (size_t)(key >> 32) & (g->n_slots - 1);
    while (g->slots[at].end && (g->slots[at].first != first || g->slots[at].second != second))
        at = (at + 1) & (g->n_slots - 1);
    return &g->slots[at];
}

static void index_pair(struct ngrams *g, int end) {
    struct slot *slot = find(g, g->text[end - 2], g->text[end - 1]);
    g->before[end] = slot->end;
    *slot = (struct slot){ g->text[end - 2], g->text[end - 1], end };
}

/* Room for n tokens; nothing has changed where there is no memory for it. */
static int grow(struct ngrams *g, int n) {
    if (n <= g->room)
        return 0;
    int room = g->room ? g->room : 1024;
    while (room < n)
        room *= 2;
    size_t n_slots = 4 * (size_t)room;
    int32_t *text = malloc((size_t)room * sizeof *text);
    int32_t *before = malloc(((size_t)room + 1) * sizeof *before);
    struct slot *slots = calloc(n_slots, sizeof *slots);
    if (!text || !before || !slots) {
        free(text);
        free(before);
        free(slots);
        return fail(BMC_ENOMEM, "no memory for an index of %d tokens", room);
    }
    if (g->n)
        memcpy(text, g->text, (size_t)g->n * sizeof *text);
    free(g->text);
    free(g->before);
    free(g->slots);
    *g = (struct ngrams){ text, before, g->n, room, g->hint, slots, n_slots };
    before[0] = 0;
    if (g->n)
        before[1] = 0;
    for (int end = 2; end <= g->n; end++)
        index_pair(g, end);
    return 0;
}

struct ngrams *ngrams_new(void) {
    struct ngrams *g = calloc(1, sizeof *g);
    if (!g)
        fail(BMC_ENOMEM, "no memory for an index");
    return g;
}

void ngrams_free(struct ngrams *g) {
    if (!g)
        return;
    free(g->text);
    free(g->before);
    free(g->slots);
    free(g);
}

/* Back to the hint. */
static void clear(struct ngrams *g) {
    g->n = g->hint;
    if (g->slots)
        memset(g->slots, 0, g->n_slots * sizeof *g->slots);
    for (int end = 2; end <= g->n; end++)
        index_pair(g, end);
}

int ngrams_add(struct ngrams *g, const int32_t *tokens, int n) {
    if (grow(g, g->n + n))
        return BMC_ENOMEM;
    for (int i = 0; i < n; i++) {
        g->text[g->n++] = tokens[i];
        g->before[g->n] = 0;
        if (g->n > 1)
            index_pair(g, g->n);
    }
    return 0;
}

int ngrams_hint(struct ngrams *g, const int32_t *tokens, int n) {
    int status = ngrams_add(g, tokens, n);
    g->hint = g->n;
    return status;
}

int ngrams_follow(struct ngrams *g, const int32_t *tokens, int n, int32_t last) {
    int held = g->n - g->hint, known = held < n ? held : n;
    bool begins = !known || !memcmp(g->text + g->hint, tokens, (size_t)known * sizeof *tokens);
    if (begins && held == n + 1 && g->text[g->hint + n] == last)
        return 0;
    if (!begins || held > n) {
        clear(g);
        held = 0;
    }
    int status = held < n ? ngrams_add(g, tokens + held, n - held) : 0;
    return status ? status : ngrams_add(g, &last, 1);
}

/* How many tokens before `place` are those before `end`, of which two are known to be. */
static int match_length(const struct ngrams *g, int place, int end) {
    int length = 2;
    while (length < NGRAM_LONGEST && length < place
           && g->text[place - length - 1] == g->text[end - length - 1])
        length++;
    return length;
}

/* Where the tokens before `end` were before, and how many of them: the latest of the longest matches;
 * 0 where there is none. */
static int match(const struct ngrams *g, int end, int *length) {
    int best = 0;
    *length = 0;
    for (int place = end > 0 ? g->before[end] : 0, tries = TRIES; place && tries;
         place = g->before[place], tries--) {
        int found = match_length(g, place, end);
        if (found > *length) {
            *length = found;
            best = place;
        }
    }
    return best;
}

/* Where a copy that was left a few tokens ago goes on, as after an edit: behind the last token, where it
 * stands close to the place; 0 where it does not. length: the copy's. */
static int rejoined(const struct ngrams *g, int *length) {
    for (int since = 1; since <= EDITED && since < g->n; since++) {
        int left = match(g, g->n - since, length);
        for (int at = left; *length >= COPY && at < left + since + EDITED && at < g->n - since; at++)
            if (g->text[at] == g->text[g->n - 1])
                return at + 1;
    }
    return 0;
}

int ngrams_propose(const struct ngrams *g, int k, int32_t *ids, double *lengths) {
    int length, from = match(g, g->n, &length);
    bool back = !from && (from = rejoined(g, &length));
    /* A match that reaches the end goes on into the proposal itself. */
    for (int i = 0; from && i < k; i++) {
        ids[i] = from + i < g->n ? g->text[from + i] : ids[from + i - g->n];
        lengths[i] = length + i < NGRAM_LONGEST ? length + i : NGRAM_LONGEST;
    }
    if (back && k > 0)
        lengths[0] = 1;
    return from ? k : 0;
}
