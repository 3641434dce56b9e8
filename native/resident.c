#include "resident.h"

#include "error.h"
#include "memory.h"
#include "pack.h"
#include "slots.h"

#include <stdlib.h>

enum { PARTS = 3 };

/* The experts of all blocks are numbered one after the other. */
struct residents {
    struct slots slots;
    struct expert { struct experts *of; int e; } *experts;      /* (n_experts,) */
    int n_experts;
    int32_t *missing;               /* (n_missing,) experts whose panels are being made */
    int n_missing;
    char *memory;
    size_t slot_bytes, bytes;
    int64_t made;
};

/* An expert's matrices: gate (or none), up, down. */
static struct matrix *part_of(const struct expert *x, int i) {
    const struct matrices *parts[PARTS] = { &x->of->gate, &x->of->up, &x->of->down };
    return parts[i]->of ? &parts[i]->of[x->e] : NULL;
}

static int64_t panels_of(const struct matrix *w) { return w ? matrix_panels(w) : 0; }

static size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

static size_t codes_of(const struct matrix *w) { return (size_t)matrix_panels(w) * w->code_stride; }

static size_t bytes_of(const struct matrix *w) {
    return whole_lines(codes_of(w) + (size_t)matrix_panels(w) * w->scale_stride);
}

/* Where an expert's panels are; NULL: nowhere. */
static void set_place(const struct expert *x, char *place) {
    for (int i = 0; i < PARTS; i++) {
        struct matrix *w = part_of(x, i);
        if (!w)
            continue;
        w->codes = (uint8_t *)place;
        w->scales = place ? w->codes + codes_of(w) : NULL;
        place = place ? place + bytes_of(w) : NULL;
    }
}

/* How many of a block's experts can be late: those on a GPU are there from the beginning. */
static int late_experts(const struct block *b) {
    return b->c.kind == BMC_EXPERTS && !b->experts.up.of->on_gpu ? b->c.n_experts : 0;
}

size_t residents_mark(bmc_model *m) {
    size_t largest = 0;
    for (struct block *b = m->blocks; b < m->blocks + m->c.n_blocks; b++)
        for (int e = 0; e < late_experts(b); e++) {
            const struct expert x = { &b->experts, e };
            size_t bytes = 0;
            for (int i = 0; i < PARTS; i++)
                if (part_of(&x, i)) {
                    part_of(&x, i)->late = true;
                    bytes += bytes_of(part_of(&x, i));
                }
            largest = bytes > largest ? bytes : largest;
        }
    return largest;
}

static int number_experts(bmc_model *m, struct residents *r) {
    int n = 0, most = 0;
    for (const struct block *b = m->blocks; b < m->blocks + m->c.n_blocks; b++) {
        n += late_experts(b);
        most = larger(most, late_experts(b));
    }
    r->experts = malloc((size_t)n * sizeof *r->experts);
    r->missing = malloc((size_t)most * sizeof *r->missing);
    for (struct block *b = m->blocks; r->experts && b < m->blocks + m->c.n_blocks; b++)
        if (late_experts(b)) {
            b->experts.number = r->n_experts;
            for (int e = 0; e < late_experts(b); e++)
                r->experts[r->n_experts++] = (struct expert){ &b->experts, e };
        }
    return r->experts && r->missing ? 0 : -1;
}

int residents_open(bmc_model *m, size_t slot_bytes, size_t bytes) {
    struct residents *r = m->residents = calloc(1, sizeof *r);
    if (!r || number_experts(m, r))
        return fail(BMC_ENOMEM, "no memory for a model");
    const size_t fits = bytes / slot_bytes;
    const int n = fits < (size_t)r->n_experts ? (int)fits : r->n_experts;
    r->slot_bytes = slot_bytes;
    r->bytes = (size_t)n * slot_bytes;
    r->memory = memory_map(r->bytes);
    if (!r->memory || slots_init(&r->slots, n, r->n_experts))
        return fail(BMC_ENOMEM, "no memory for %.0f MB of experts", (double)r->bytes / 1e6);
    return 0;
}

void residents_close(bmc_model *m) {
    struct residents *r = m->residents;
    if (!r)
        return;
    memory_unmap(r->memory, r->bytes);
    slots_free(&r->slots);
    free(r->experts);
    free(r->missing);
    free(r);
}

void residents_forget(bmc_model *m) {
    struct residents *r = m->residents;
    for (int i = 0; r && i < r->n_experts; i++)
        set_place(&r->experts[i], NULL);
    if (r)
        slots_clear(&r->slots);
}

int bmc_model_experts(bmc_model *m, bmc_experts *experts) {
    const struct residents *r = m->residents;
    *experts = (bmc_experts){ 0 };
    if (!r)
        return 0;
    pthread_mutex_lock(&m->lock);
    *experts = (bmc_experts){
        .n = r->n_experts, .room = r->slots.n, .kept = r->slots.n_kept, .made = r->made,
    };
    pthread_mutex_unlock(&m->lock);
    return 1;
}

/* The disk reads all that is missing at once, and not page by page as threads come to it. */
static void expect(const struct expert *x) {
    for (int i = 0; i < PARTS; i++) {
        const struct matrix *w = part_of(x, i);
        if (w && w->mapped)
            memory_expect(w->data, (size_t)w->n_rows * file_row_bytes(w));
    }
}

/* Slots for those that are wanted: first for those that have one, so that no other takes it. */
static void find_slots(struct residents *r, const struct block *b, const int32_t *first) {
    int gone;
    r->n_missing = 0;
    slots_turn(&r->slots);
    for (int e = 0; e < b->c.n_experts; e++)
        if (first[e + 1] > first[e])
            slots_use(&r->slots, b->experts.number + e);
    for (int e = 0; e < b->c.n_experts; e++) {
        const int x = b->experts.number + e;
        const bool missing = first[e + 1] > first[e] && r->slots.slot_of[x] < 0;
        const int slot = missing ? slots_take(&r->slots, x, &gone) : -1;
        if (slot < 0)
            continue;
        if (gone >= 0)
            set_place(&r->experts[gone], NULL);
        set_place(&r->experts[x], r->memory + (size_t)slot * r->slot_bytes);
        expect(&r->experts[x]);
        r->missing[r->n_missing++] = x;
    }
    r->made += r->n_missing;
}

/* This thread's share of the panels of all that are missing; the experts of a block are alike. */
static void make_panels(struct pass *p, const struct residents *r, int thread) {
    int64_t each = 0, from, to, begin = 0;
    for (int i = 0; i < PARTS; i++)
        each += panels_of(part_of(&r->experts[r->missing[0]], i));
    share(p, thread, each * r->n_missing, &from, &to);
    for (int i = 0; i < PARTS * r->n_missing; i++) {
        const struct matrix *w = part_of(&r->experts[r->missing[i / PARTS]], i % PARTS);
        const int64_t n = panels_of(w);
        const int64_t low = from > begin ? from - begin : 0, high = to - begin < n ? to - begin : n;
        if (low < high)
            model_make_panels(w, low, high);
        begin += n;
    }
}

void residents_want(struct pass *p, const struct block *b, const int32_t *first, int thread) {
    struct residents *r = p->model->residents;
    if (!r)
        return;
    if (thread == 0)
        find_slots(r, b, first);
    barrier(p, thread, BMC_STEP_GATE_UP);
    if (!r->n_missing)
        return;
    make_panels(p, r, thread);
    barrier(p, thread, BMC_STEP_GATE_UP);
}
