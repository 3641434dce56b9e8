/* Matches in a text against a search through all of it. */
#include "check.h"
#include "ngram.h"

#include <stdbool.h>
#include <string.h>

enum { N = 400, K = 9 };

/* The latest of the longest earlier matches of the end: where it ended, and how long it is. */
static int search(const int32_t *text, int n, int *length) {
    int best = 0;
    *length = 1;
    for (int end = n - 1; end > 1; end--) {
        int l = 0;
        while (l < NGRAM_LONGEST && l < end && text[end - 1 - l] == text[n - 1 - l])
            l++;
        if (l > *length) {
            *length = l;
            best = end;
        }
    }
    return best;
}

/* Four tokens of a match at least, left up to four tokens ago, and the last one within four of where it would
 * be: the place behind it in the source. */
static int search_rejoined(const int32_t *text, int n, int *length) {
    for (int since = 1; since <= 4 && since < n; since++) {
        int left = search(text, n - since, length);
        for (int at = left; left && *length >= 4 && at < left + since + 4 && at < n - since; at++)
            if (text[at] == text[n - 1])
                return at + 1;
    }
    return 0;
}

static void matches_are_those_found_by_searching(void) {
    uint64_t state = 3;
    int n_back = 0;
    for (int round = 0; round < 60; round++) {
        struct ngrams *g = ngrams_new();
        int32_t *text = malloc(N * sizeof *text), ids[K];
        double lengths[K];
        int n = 0, symbols = 12 + (int)random_below(&state, 60);
        CHECK(g && ngrams_propose(g, K, ids, lengths) == 0);
        while (n < N) {                         /* runs that were there before, and others */
            int from = n ? (int)random_below(&state, n) : 0, more = 1 + (int)random_below(&state, 30);
            int copy = n && random_below(&state, 3);
            more = more < N - n ? more : N - n;
            more = copy && more > n - from ? n - from : more;
            for (int i = 0; i < more; i++)
                text[n + i] = copy ? text[from + i] : (int32_t)random_below(&state, symbols);
            CHECK(ngrams_add(g, text + n, more) == 0);
            n += more;
            int length, end = search(text, n, &length), found = ngrams_propose(g, K, ids, lengths);
            bool back = !end && (end = search_rejoined(text, n, &length));
            n_back += back;
            CHECK(found == (end ? K : 0));
            for (int i = 0; i < found; i++) {
                CHECK(ids[i] == (end + i < n ? text[end + i] : ids[end + i - n]));
                int told = length + i < NGRAM_LONGEST ? length + i : NGRAM_LONGEST;
                CHECK(lengths[i] == (back && !i ? 1 : told));
            }
        }
        ngrams_free(g);
        free(text);
    }
    CHECK(n_back > 20);
}

/* 1 .. 30, then as far as 12 and an edit: the guess goes on behind it. */
static void it_comes_back_to_an_edited_copy(void) {
    static const struct { int32_t tokens[4]; int n, next; } edits[] = {
        { { 14 }, 1, 15 }, { { 17 }, 1, 18 }, { { 18 }, 1, 0 },                            /* left out */
        { { 99, 13 }, 2, 14 }, { { 97, 98, 99, 13 }, 4, 14 },                               /* put in */
        { { 99, 14 }, 2, 15 }, { { 97, 98, 99, 16 }, 4, 17 }, { { 99 }, 1, 0 },             /* replaced */
    };
    for (size_t e = 0; e < sizeof edits / sizeof *edits; e++) {
        struct ngrams *g = ngrams_new();
        int32_t ids[3];
        double lengths[3];
        for (int32_t i = 1; i <= 42; i++)
            CHECK(ngrams_add(g, &(int32_t){ i > 30 ? i - 30 : i }, 1) == 0);
        CHECK(ngrams_add(g, edits[e].tokens, edits[e].n) == 0);
        int found = ngrams_propose(g, 3, ids, lengths);
        CHECK(found == (edits[e].next ? 3 : 0));
        if (found) {
            CHECK(ids[0] == edits[e].next && ids[1] == ids[0] + 1 && ids[2] == ids[1] + 1);
            CHECK(lengths[0] == 1 && lengths[1] == 13 && lengths[2] == 14);
        }
        ngrams_free(g);
    }
}

static void it_grows(void) {
    struct ngrams *g = ngrams_new();
    int32_t ids[4];
    double lengths[4];
    for (int32_t i = 0; i < 5000; i++)          /* beyond its first memory */
        CHECK(ngrams_add(g, &(int32_t){ i % 1700 }, 1) == 0);
    CHECK(ngrams_propose(g, 4, ids, lengths) == 4 && ids[0] == 5000 % 1700 && lengths[0] == NGRAM_LONGEST);
    ngrams_free(g);
    ngrams_free(NULL);
}

/* Whatever it knew before: the same text, a beginning of it, one that goes on, another one. A hint
 * stands before all of them. */
static void it_follows_any_text(int n_hint) {
    static const int32_t hint[] = { 3, 1, 2, 0, 3, 2, 1 };
    uint64_t state = 9;
    struct ngrams *g = ngrams_new();
    CHECK(ngrams_hint(g, hint, n_hint) == 0);
    int32_t text[N], ids[2][K];
    double lengths[2][K];
    int n = 0;
    for (int round = 0; round < 2000; round++) {
        n = random_below(&state, 4) ? n : (int)random_below(&state, n + 1);
        for (int more = (int)random_below(&state, 9); more && n < N - 1; more--)
            text[n++] = (int32_t)random_below(&state, 4);
        text[n] = (int32_t)random_below(&state, 4);
        struct ngrams *fresh = ngrams_new();
        CHECK(ngrams_add(fresh, hint, n_hint) == 0);
        CHECK(ngrams_follow(g, text, n, text[n]) == 0 && ngrams_add(fresh, text, n + 1) == 0);
        int found = ngrams_propose(g, K, ids[0], lengths[0]);
        CHECK(found == ngrams_propose(fresh, K, ids[1], lengths[1]));
        CHECK(!memcmp(ids[0], ids[1], (size_t)found * sizeof **ids));
        CHECK(!memcmp(lengths[0], lengths[1], (size_t)found * sizeof **lengths));
        ngrams_free(fresh);
        if (random_below(&state, 2) && n < N - 2)       /* the text goes on */
            CHECK(ngrams_add(g, text, 1) == 0);
    }
    ngrams_free(g);
}

int main(void) {
    matches_are_those_found_by_searching();
    it_comes_back_to_an_edited_copy();
    it_grows();
    it_follows_any_text(0);
    it_follows_any_text(7);
    return 0;
}
