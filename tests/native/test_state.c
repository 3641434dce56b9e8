/* States of a sequence, whatever way they were reached, are those of its tokens one after the other. */
#include "check.h"
#include "cpu.h"
#include "layers/recurrent.h"

#include <string.h>

enum { X = 16, N_KEYS = 5, TAPS = 4, LONGEST = 400 };

/* A row of the log: inputs of the convolution, decay, k and d of a head with one slice. */
enum { AT_DECAY = X, AT_K = 2 * X, AT_D = 3 * X, ROW = 4 * X };

static struct kernels kernels;
static const struct state_size SIZES[] = {
    { .floats = N_KEYS * 16, .row = ROW, .n_before = TAPS - 1 },
    { .row = ROW, .n_before = 1 },              /* a convolution alone */
    { .floats = N_KEYS * 16, .row = ROW },        /* and a state without one */
};
enum { STREAMS = sizeof SIZES / sizeof *SIZES };

struct sequence {
    struct state_size sizes[STREAMS];
    struct states states;
    int position, tokens[LONGEST];
    float made[STREAMS][LONGEST][16];           /* what each token gave */
};

static void input(int token, float *x) {
    uint64_t state = 0x9e3779b97f4a7c15u * (uint64_t)(token + 1);
    for (int i = 0; i < X; i++)
        x[i] = (float)(int64_t)(random_bits(&state) % 2001) / 1000 - 1;
}

/* k, q, v, decay and beta from the convolution's result: some numbers. */
static void make(const float *const *rows, int conv, float *row, float *q, float *v, float *beta) {
    static float weight[TAPS * X];
    float y[X];
    for (int i = 0; i < TAPS * X; i++)
        weight[i] = (float)(i % 7 - 3) / 4;
    kernels.conv(y, rows, weight, X, NULL, conv, X);
    memcpy(row + AT_K, y, N_KEYS * sizeof *y);
    memcpy(q, y + N_KEYS, N_KEYS * sizeof *y);
    memcpy(v, y, sizeof y);
    row[AT_DECAY] = 0.5f + 0.25f * row[0];
    *beta = 0.5f + 0.5f * row[1];
}

/* What every token of a text gives, from the first one on. */
static void plain(const struct sequence *s, int stream, float (*made)[16]) {
    static float rows[LONGEST][ROW];
    static const float none[ROW];
    float state[N_KEYS * 16] = { 0 }, q[N_KEYS], v[16], beta;
    const int conv = SIZES[stream].n_before + 1;
    for (int t = 0; t < s->position; t++) {
        const float *before[TAPS];
        input(s->tokens[t], rows[t]);
        for (int i = 0; i < conv; i++)
            before[i] = t - conv + 1 + i >= 0 ? rows[t - conv + 1 + i] : none;
        make(before, conv, rows[t], q, v, &beta);
        const struct recur_job job = {
            .s = state, .n_keys = N_KEYS, .n_tok = 1, .decay = &rows[t][AT_DECAY], .k = rows[t] + AT_K,
            .q = q, .v = v,
            .beta = &beta, .d = rows[t] + AT_D, .o = made[t],
        };
        memcpy(made[t], v, sizeof v);
        if (SIZES[stream].floats)
            kernels.recur(&job);
    }
}

/* A pass over n tokens, as blocks do it. */
static void pass(struct sequence *s, int n) {
    static float rows[LONGEST][ROW], q[LONGEST][N_KEYS], v[LONGEST][16], beta[LONGEST];
    const int start = s->position;
    CHECK(states_reserve(&s->states) == 0);
    const struct state_run run = states_plan(&s->states, start, n);
    CHECK(run.next_base >= run.base && start + n - run.next_base <= LOG_MAX && run.base <= start);
    CHECK(run.next_base == run.base
          || (n > 1 ? run.next_base >= start : start + 1 - run.next_base >= LOG_KEPT));
    for (int stream = 0; stream < STREAMS; stream++) {
        const int conv = SIZES[stream].n_before + 1;
        for (int t = 0; t < n; t++)
            input(s->tokens[start + t], rows[t]);
        for (int t = 0; t < n; t++) {
            const float *before[TAPS];
            for (int i = 0; i < conv; i++) {
                const int from = t - conv + 1 + i;
                before[i] = from >= 0 ? rows[from] : state_row(&s->states, stream, start + from);
            }
            make(before, conv, rows[t], q[t], v[t], &beta[t]);
            memcpy(s->made[stream][start + t], v[t], sizeof v[t]);
        }
        const struct walk walk = {
            .kernels = &kernels, .states = &s->states, .run = &run, .stream = stream,
            .decay = AT_DECAY, .k = AT_K, .d = AT_D,
            .job = {
                .n_keys = N_KEYS, .decay = &rows[0][AT_DECAY], .k = rows[0] + AT_K, .d = rows[0] + AT_D,
                .q = q[0],
                .v = v[0], .beta = beta, .o = s->made[stream][start], .decay_stride = ROW, .k_stride = ROW,
                .d_stride = ROW, .q_stride = N_KEYS, .v_stride = 16, .beta_stride = 1, .o_stride = 16,
            },
        };
        if (SIZES[stream].floats)
            walk_slice(&walk);
        for (int pos = state_first_kept(&s->states, stream, &run); pos < start + n; pos++)
            memcpy(state_row(&s->states, stream, pos), rows[pos - start], ROW * sizeof(float));
    }
    states_done(&s->states, &run);
    s->position += n;
}

static void go_back(struct sequence *s, int position) {
    const int nearest = states_nearest(&s->states, position), reached = states_rewind(&s->states, position);
    CHECK(nearest == reached);
    CHECK(reached >= 0 && reached <= position);
    s->position = reached;
    if (reached < position)
        pass(s, position - reached);
}

static void write_on(struct sequence *s, uint64_t *state, int n) {
    for (int i = 0; i < n; i++)
        s->tokens[s->position + i] = (int)random_below(state, 50);
    pass(s, n);
}

static void check(const struct sequence *s) {
    static float right[LONGEST][16];
    for (int stream = 0; stream < STREAMS; stream++) {
        plain(s, stream, right);
        CHECK(!memcmp(right, s->made[stream], (size_t)s->position * sizeof *right));
    }
}

static struct sequence *begin(void) {
    struct sequence *s = calloc(1, sizeof *s);
    memcpy(s->sizes, SIZES, sizeof SIZES);
    const size_t floats = states_measure(s->sizes, STREAMS);
    states_init(&s->states, s->sizes, STREAMS);
    CHECK(s->states.floats == floats && s->sizes[1].at > 2 * SIZES[0].floats
          && states_bytes(&s->states) == 0);
    return s;
}

static void end(struct sequence *s) {
    states_free(&s->states);
    free(s);
}

static void test_any_order_of_passes_and_rewinds(void) {
    for (uint64_t seed = 1; seed <= 60; seed++) {
        uint64_t state = seed * 77777;
        struct sequence *s = begin();
        for (int step = 0; step < 60; step++) {
            const int left = LONGEST - s->position, kind = (int)random_below(&state, 8);
            const int most = kind < 4 ? 1 : kind == 4 ? 33 : kind == 5 ? 100 : 0;
            const int near = s->position < LOG_MAX ? s->position + 1 : LOG_MAX;
            if (most && left > most)
                for (int i = kind < 2 ? (int)random_below(&state, 60) : 1; i > 0 && s->position < LONGEST;
                     i--)
                    write_on(s, &state, 1 + (int)random_below(&state, most));
            else if (kind == 6)
                CHECK(states_snapshot(&s->states) == 0);
            else
                go_back(s, random_below(&state, 3) ? s->position - (int)random_below(&state, near)
                                                   : (int)random_below(&state, s->position + 1));
            check(s);
        }
        end(s);
    }
}

/* Guesses one by one, all of them taken back, need no token again, however full the log is. */
static void test_guesses_are_taken_back_within_the_log(void) {
    uint64_t state = 5;
    struct sequence *s = begin();
    for (int round = 0; round < 120; round++) {
        const int text = s->position, guesses = (int)random_below(&state, LOG_KEPT + 1);
        for (int i = 0; i < guesses; i++)
            write_on(s, &state, 1);
        CHECK(states_rewind(&s->states, text) == text);
        s->position = text;
        write_on(s, &state, 1 + (int)random_below(&state, 2));
        check(s);
    }
    end(s);
}

static void test_a_snapshot_brings_its_anchor_back(void) {
    uint64_t state = 9;
    struct sequence *s = begin();
    write_on(s, &state, 100);
    CHECK(states_snapshot(&s->states) == 0 && states_snapshot(&s->states) == 0);
    const int64_t bytes = states_bytes(&s->states);
    write_on(s, &state, 100);
    CHECK(states_snapshot(&s->states) == 0 && states_bytes(&s->states) > bytes);
    write_on(s, &state, 100);
    CHECK(states_rewind(&s->states, 120) == 100 - LOG_MAX);
    s->position = 100 - LOG_MAX;
    CHECK(states_bytes(&s->states) == bytes);                       /* that of tokens that are gone is too */
    pass(s, 20);
    check(s);
    /* And before all snapshots, from nothing. */
    CHECK(states_rewind(&s->states, 30) == 0);
    s->position = 0;
    write_on(s, &state, 3);
    check(s);
    end(s);
}

static void test_a_snapshot_dies_with_its_tokens(void) {
    uint64_t state = 4;
    struct sequence *s = begin();
    write_on(s, &state, 60);
    write_on(s, &state, 2);
    CHECK(states_snapshot(&s->states) == 0);                        /* at 60 */
    CHECK(states_rewind(&s->states, 59) == 0);
    s->position = 0;
    write_on(s, &state, 80);
    write_on(s, &state, 80);
    CHECK(states_rewind(&s->states, 70) == 0);
    end(s);
}

/* Of more snapshots than there is room for those stay whose loss would cost the most tokens. */
static void test_many_snapshots(void) {
    static const int PIECES[SNAPSHOTS + 2] = { 30, 20, 25, 2, 22, 29, 24, 23, 21, 28 };
    /* Without 83 and 52. */
    static const int LEFT[SNAPSHOTS + 1] = { 242, 212, 189, 164, 138, 107, 79, 30, 0 };
    uint64_t state = 3;
    struct sequence *s = begin();
    for (int i = 0; i < SNAPSHOTS + 2; i++) {
        write_on(s, &state, PIECES[i]);
        write_on(s, &state, 2);                 /* sets the anchor before it */
        CHECK(states_snapshot(&s->states) == 0);
    }
    for (int i = 0; i < SNAPSHOTS; i++)
        CHECK(states_rewind(&s->states, LEFT[i] - 1) == LEFT[i + 1]);
    end(s);
}

/* A fork has the text and the snapshots of its parent, whose later tokens are nothing to it,
 * and the other way round. */
static void test_a_fork_goes_its_own_way(void) {
    uint64_t state = 6;
    struct sequence *s = begin(), *fork = begin();
    /* Of one without tokens. */
    CHECK(states_copy(&fork->states, &s->states) == 0 && !fork->states.memory);
    write_on(s, &state, 60);
    write_on(s, &state, 2);
    CHECK(states_snapshot(&s->states) == 0);
    const int64_t alone = states_bytes(&s->states);
    write_on(s, &state, 70);
    CHECK(states_copy(&fork->states, &s->states) == 0);
    CHECK(states_bytes(&s->states) < alone && states_bytes(&fork->states) < alone);
    memcpy(fork->tokens, s->tokens, sizeof s->tokens);
    memcpy(fork->made, s->made, sizeof s->made);
    fork->position = s->position;
    write_on(s, &state, 1);
    write_on(fork, &state, 3);
    for (int i = 0; i < 2; i++) {
        CHECK(states_rewind(&(i ? fork : s)->states, 65) == 60);
        (i ? fork : s)->position = 60;
        pass(i ? fork : s, 5);
        write_on(i ? fork : s, &state, 30);
        check(i ? fork : s);
    }
    end(s);
    go_back(fork, 61);
    check(fork);
    CHECK(states_bytes(&fork->states) == alone);
    end(fork);
}

/* A sequence with the states of another and its snapshots, by way of plain numbers. */
static struct sequence *copied(const struct sequence *s, const int *snapshots, int n) {
    static float values[1 << 16];
    struct sequence *copy = begin();
    const int n_log = s->position - s->states.base;
    CHECK(states_floats(&s->states, n_log) <= sizeof values / sizeof *values
          && states_reserve(&copy->states) == 0);
    for (int i = 0; i < n; i++) {
        CHECK(states_export(&s->states, snapshots[i], 0, values) == 0
              && states_has_snapshot(&s->states, snapshots[i]));
        CHECK(states_import(&copy->states, snapshots[i], 0, true, values) == 0);
    }
    CHECK(states_export(&s->states, s->states.base, n_log, values) == 0);
    CHECK(states_import(&copy->states, s->states.base, n_log, false, values) == 0);
    memcpy(copy->tokens, s->tokens, sizeof s->tokens);
    memcpy(copy->made, s->made, sizeof s->made);
    copy->position = s->position;
    return copy;
}

static void test_states_move_as_numbers(void) {
    uint64_t state = 8;
    for (int ones = 0; ones < 60; ones += 3) {
        struct sequence *s = begin();
        write_on(s, &state, 70);
        CHECK(states_snapshot(&s->states) == 0);
        const int snapshot = s->states.base;
        write_on(s, &state, 90);
        for (int i = 0; i < ones; i++)
            write_on(s, &state, 1);
        if (ones % 2)
            go_back(s, s->position - 2);
        struct sequence *copy = copied(s, &snapshot, 1), *again = copied(copy, &snapshot, 1);
        CHECK(states_export(&s->states, snapshot + 1, 0, NULL) == BMC_EINVAL
                  && states_export(&s->states, s->states.base, LOG_MAX + 1, NULL) == BMC_EINVAL);
        end(s);
        write_on(copy, &state, 1 + ones % 4);
        check(copy);
        end(copy);
        go_back(again, 75);
        write_on(again, &state, 20);
        check(again);
        CHECK(states_nearest(&again->states, snapshot) == snapshot);
        states_forget(&again->states, snapshot - 1);
        CHECK(!states_has_snapshot(&again->states, snapshot));
        end(again);
    }
}

static void test_without_states_there_is_nothing_to_do(void) {
    struct states s;
    states_init(&s, NULL, 0);
    CHECK(states_reserve(&s) == 0 && !s.memory && states_bytes(&s) == 0);
    CHECK(states_rewind(&s, 7) == 7 && states_snapshot(&s) == 0);
    states_free(&s);
    struct sequence *unused = begin();          /* freed before its first token */
    CHECK(states_rewind(&unused->states, 0) == 0 && states_snapshot(&unused->states) == 0);
    end(unused);
}

int main(void) {
    CHECK(kernels_at(0, &kernels));
    test_any_order_of_passes_and_rewinds();
    test_guesses_are_taken_back_within_the_log();
    test_a_snapshot_brings_its_anchor_back();
    test_a_snapshot_dies_with_its_tokens();
    test_many_snapshots();
    test_a_fork_goes_its_own_way();
    test_states_move_as_numbers();
    test_without_states_there_is_nothing_to_do();
    return 0;
}
