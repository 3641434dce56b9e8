/* Tensors and their places: which ones a block has, of which shape. */
#include "error.h"
#include "pack.h"
#include "pass.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define IN_MODEL(field) offsetof(bmc_model, field)

static const struct role model_roles[] = {
    { "token_embd", IN_MODEL(token_embd), MATRIX, VOCAB, DIM, true, 0 },
    { "position_embd", IN_MODEL(position_embd), MATRIX, CTX, DIM, false, 0 },
    { "token_types", IN_MODEL(token_types), MATRIX, ONE, DIM, false, 0 },
    { "per_layer_token_embd", IN_MODEL(per_layer_embd), MATRIX, VOCAB, PER_LAYERS, false, 0 },
    { "per_layer_model_proj", IN_MODEL(per_layer_proj), MATRIX, PER_LAYERS, DIM, false, 0 },
    { "per_layer_proj_norm", IN_MODEL(per_layer_norm), VECTOR, ONE, PER_LAYER_DIM, false, 0 },
    { "token_embd_norm", IN_MODEL(embd_norm), VECTOR, ONE, DIM, false, 0 },
    { "token_embd_norm.bias", IN_MODEL(embd_norm_bias), VECTOR, ONE, DIM, false, 0 },
    { "output_norm", IN_MODEL(output_norm), VECTOR, ONE, DIM, false, 0 },
    { "output_norm.bias", IN_MODEL(output_norm_bias), VECTOR, ONE, DIM, false, 0 },
    { "output", IN_MODEL(output), MATRIX, VOCAB, DIM, false, 0 },
    { "nextn.eh_proj", IN_MODEL(eh_proj), MATRIX, DIM, TWO_DIM, false, 0 },
    { "nextn.enorm", IN_MODEL(enorm), VECTOR, ONE, DIM, false, 0 },
    { "nextn.hnorm", IN_MODEL(hnorm), VECTOR, ONE, DIM, false, 0 },
    { 0 },
};

/* Of every block; Python says which of the file's norms they are. */
static const struct role common_roles[] = {
    { "norm", IN_BLOCK(norm), VECTOR, ONE, DIM, false, 0 },
    { "norm.bias", IN_BLOCK(norm_bias), VECTOR, ONE, DIM, false, 0 },
    { "post_norm", IN_BLOCK(post_norm), VECTOR, ONE, DIM, false, 0 },
    { "post_norm.bias", IN_BLOCK(post_norm_bias), VECTOR, ONE, DIM, false, 0 },
    { "sum_norm", IN_BLOCK(sum_norm), VECTOR, ONE, DIM, false, 0 },
    { "out_norm", IN_BLOCK(out_norm), VECTOR, ONE, DIM, false, 0 },
    { "out_norm.bias", IN_BLOCK(out_norm_bias), VECTOR, ONE, DIM, false, 0 },
    { "layer_output_scale", IN_BLOCK(out_scale), VECTOR, ONE, ONE, false, 0 },
    { 0 },
};

const struct kind *kind_find(int kind) {
    static const struct kind *const kinds[BMC_KINDS] = {
        [BMC_ATTENTION] = &attention_kind,
        [BMC_MLA] = &mla_kind,
        [BMC_DELTA_NET] = &delta_net_kind,
        [BMC_MAMBA2] = &mamba2_kind,
        [BMC_SHORT_CONV] = &short_conv_kind,
        [BMC_DENSE] = &dense_kind,
        [BMC_EXPERTS] = &experts_kind,
        [BMC_PER_LAYER] = &per_layer_kind,
        [BMC_LAUREL] = &laurel_kind,
        [BMC_ALTUP_BEGIN] = &altup_begin_kind,
        [BMC_ALTUP_PREDICT] = &altup_predict_kind,
        [BMC_ALTUP_CORRECT] = &altup_correct_kind,
        [BMC_ALTUP_END] = &altup_end_kind,
    };
    return kind >= 0 && kind < BMC_KINDS ? kinds[kind] : NULL;
}

const char *bmc_role(int kind, int i) {
    const struct kind *k = kind_find(kind);
    const struct role *roles = kind == -1 ? model_roles : k ? k->roles : NULL;
    for (; roles && roles->name && i > 0; i--)
        roles++;
    return roles && i >= 0 ? roles->name : NULL;
}

void model_extents(bmc_model *m) {
    const bmc_config *c = &m->c;
    int64_t *e = m->extent;
    e[ONE] = 1;
    e[DIM] = c->dim;
    e[TWO_DIM] = 2 * (int64_t)c->dim;
    e[VOCAB] = c->vocab_size;
    e[CTX] = c->n_ctx;
    e[PER_LAYER_DIM] = c->per_layer_dim;
    e[PER_LAYERS] = (int64_t)c->per_layer_dim * c->n_layers;
    for (struct block *b = m->blocks; b < m->blocks + c->n_blocks; b++) {
        memcpy(b->extent, m->extent, sizeof b->extent);
        b->kind->measure(m, &b->c, b->extent);
    }
}

/* The file's name for it, nearly always. */
static const char *full_name(const bmc_model *m, const bmc_tensor *t, char text[96]) {
    const char *end = strchr(t->role, '.') ? "" : ".weight";
    if (t->name) {
        snprintf(text, 96, "%s", t->name);
        return text;
    }
    if (t->block >= 0 && t->block < m->c.n_blocks)
        snprintf(text, 96, "blk.%d.%s%s", (int)m->blocks[t->block].c.layer, t->role, end);
    else
        snprintf(text, 96, "%s%s", t->role, end);
    return text;
}

/* Where a tensor goes: its role and the part of it: the values themselves, or the bias
 * or factors of a matrix. */
enum part { VALUES, BIAS, FACTORS };
struct slot { const struct role *role; enum part part; int64_t n_rows, n_cols; };

static int64_t copies(const struct block *b, const struct role *r) {
    return r->form == MATRICES ? b->extent[r->count ? r->count : EXPERTS] : 1;
}

static struct slot slot_of(const int64_t *e, const struct block *b, const struct role *r, enum part part,
                           const bmc_tensor *t) {
    int64_t n = t->expert >= 0 ? 1 : copies(b, r);
    if (part == BIAS)
        return (struct slot){ r, part, r->form == MATRICES ? n : 1, e[r->rows] };
    if (part == FACTORS)
        return (struct slot){ r, part, 1, n };
    return (struct slot){ r, part, n * e[r->rows], e[r->cols] };
}

/* Whether a tensor's name is a role's, or that of its bias or factors. */
static bool names(const struct role *r, const char *name, enum part *part) {
    size_t n = strlen(r->name);
    if (strncmp(r->name, name, n))
        return false;
    *part = !strcmp(name + n, ".bias") ? BIAS : !strcmp(name + n, ".scale") ? FACTORS : VALUES;
    return !name[n] || (*part != VALUES && (r->form == MATRIX || r->form == MATRICES));
}

/* The slot of a tensor: the one whose shape it has, else the first of that name. */
static struct slot find_slot(const int64_t *e, const struct block *b, const struct role *const *lists,
                             const bmc_tensor *t) {
    struct slot found = { 0 };
    /* A role of that name goes before a matrix's bias. */
    for (int exact = 1; exact >= 0; exact--)
        for (const struct role *const *list = lists; *list; list++)
            for (const struct role *r = *list; r->name; r++) {
                enum part part;
                if (!names(r, t->role, &part) || (part == VALUES) != exact)
                    continue;
                const struct slot s = slot_of(e, b, r, part, t);
                if (s.n_rows == t->n_rows && s.n_cols == t->n_cols)
                    return s;
                if (!found.role)
                    found = s;
            }
    return found;
}

static int check_tensor(const bmc_model *m, const bmc_tensor *t, const struct slot *s) {
    char name[96];
    const struct type *type = type_find(t->type);
    const bool matrix = s->part == VALUES && (s->role->form == MATRIX || s->role->form == MATRICES);
    full_name(m, t, name);
    if (!type || !type->dequantize || (matrix && !panel_runs(t->type)))
        return fail(BMC_EFORMAT, "%s: pybmc does not compute with type %s", name,
                    type ? type->name : "unknown");
    if (t->n_cols != s->n_cols || t->n_rows != s->n_rows)
        return fail(BMC_EFORMAT, "%s: expected %lld rows of %lld values, found %lld of %lld (%s)", name,
                    (long long)s->n_rows, (long long)s->n_cols, (long long)t->n_rows, (long long)t->n_cols,
                    type->name);
    if (t->n_cols < 1 || t->n_cols % type->block_size)
        return fail(BMC_EFORMAT, "%s: rows of %lld are not whole blocks of %s (%d)", name,
                    (long long)t->n_cols, type->name, type->block_size);
    return t->data ? 0 : fail(BMC_EINVAL, "%s: data is NULL", name);
}

void *model_own(bmc_model *m, size_t bytes) {
    void **items = realloc(m->owned.items, ((size_t)m->owned.n + 1) * sizeof *items);
    if (!items)
        return NULL;
    m->owned.items = items;
    void *item = aligned_alloc(64, (bytes + 64) / 64 * 64);
    if (item) {
        memset(item, 0, (bytes + 64) / 64 * 64);
        items[m->owned.n++] = item;
    }
    return item;
}

/* All values of a tensor as floats; columns first where `transposed`, each column's rows padded. */
static float *floats(bmc_model *m, const bmc_tensor *t, bool transposed) {
    const struct type *type = type_find(t->type);
    const size_t rows = (size_t)t->n_rows, cols = (size_t)t->n_cols;
    const size_t row_bytes = cols / (size_t)type->block_size * (size_t)type->type_size;
    const size_t n = padded(t->n_cols) + cols * padded(t->n_rows) + rows * cols;
    float *values = model_own(m, n * sizeof *values), *all = values;
    if (!values) {
        fail(BMC_ENOMEM, "no memory for %s", t->role);
        return NULL;
    }
    if (transposed)
        all = values + cols * padded(t->n_rows);
    for (size_t r = 0; r < rows; r++)
        type->dequantize((const uint8_t *)t->data + r * row_bytes, t->n_cols, all + r * cols);
    for (size_t r = 0; transposed && r < rows; r++)
        for (size_t c = 0; c < cols; c++)
            values[c * padded(t->n_rows) + r] = all[r * cols + c];
    return values;
}

static void bind_matrix(const bmc_tensor *t, struct matrix *place, int64_t n_rows, int64_t first_row) {
    place->type = t->type;
    place->mapped = t->mapped;
    place->n_rows = n_rows;
    place->n_cols = t->n_cols;
    place->data = (const uint8_t *)t->data + (size_t)first_row * file_row_bytes(place);
}

/* The matrices of a slot: one, or those of all experts. */
static struct matrix *matrices(bmc_model *m, struct block *b, const struct role *r, void *place) {
    struct matrices *list = place;
    if (r->form == MATRIX)
        return place;
    if (!list->of)
        list->of = model_own(m, (size_t)copies(b, r) * sizeof *list->of);
    if (!list->of)
        fail(BMC_ENOMEM, "no memory for %lld matrices", (long long)copies(b, r));
    return list->of;
}

static int bind_slot(bmc_model *m, struct block *b, const bmc_tensor *t, const struct slot *s, char *base) {
    void *place = base + s->role->offset;
    float *values = NULL;
    const int64_t n = copies(b, s->role), rows = (b ? b->extent : m->extent)[s->role->rows];
    if (s->part != VALUES || s->role->form == VECTOR || s->role->form == TRANSPOSED) {
        values = floats(m, t, s->role->form == TRANSPOSED);
        if (!values)
            return BMC_ENOMEM;
    }
    if (s->part == VALUES && values) {
        *(struct vector *)place = (struct vector){ values, (int)t->n_rows, (int)t->n_cols };
        return 0;
    }
    struct matrix *list = matrices(m, b, s->role, place);
    if (!list)
        return BMC_ENOMEM;
    for (int64_t i = 0; i < n; i++) {
        if (t->expert >= 0 && i != t->expert)
            continue;
        const int64_t at = t->expert >= 0 ? 0 : i;
        if (s->part == BIAS)
            list[i].bias = values + at * rows;
        else if (s->part == FACTORS)
            list[i].factor = values[at];
        else
            bind_matrix(t, &list[i], rows, at * rows);
    }
    return 0;
}

int model_bind(bmc_model *m, const bmc_tensor *t) {
    char name[96];
    if (t->block < -1 || t->block >= m->c.n_blocks)
        return fail(BMC_EFORMAT, "%s: the model has %d blocks, not %d", t->role, (int)m->c.n_blocks,
                    (int)t->block + 1);
    struct block *b = t->block >= 0 ? &m->blocks[t->block] : NULL;
    const struct role *const lists[] = { b ? b->kind->roles : model_roles, b ? common_roles : NULL, NULL };
    const struct slot s = find_slot(b ? b->extent : m->extent, b, lists, t);
    if (!s.role)
        return fail(BMC_EFORMAT, "%s: pybmc does not know this tensor", full_name(m, t, name));
    if (t->expert < -1 || t->expert >= copies(b, s.role))
        return fail(BMC_EFORMAT, "%s: there is no expert %d", full_name(m, t, name), (int)t->expert);
    int status = check_tensor(m, t, &s);
    return status ? status : bind_slot(m, b, t, &s, b ? (char *)b : (char *)m);
}

static bool is_bound(const char *base, const struct block *b, const struct role *r) {
    const void *place = base + r->offset;
    if (r->form == MATRIX)
        return ((const struct matrix *)place)->data;
    if (r->form != MATRICES)
        return ((const struct vector *)place)->v;
    const struct matrix *list = ((const struct matrices *)place)->of;
    for (int64_t i = 0; list && i < copies(b, r); i++)
        if (!list[i].data)
            return false;
    return list;
}

static int check_roles(const bmc_model *m, const char *base, const struct block *b,
                       const struct role *roles) {
    char name[96];
    for (; roles->name; roles++) {
        const bool bound = is_bound(base, b, roles);
        const struct bmc_tensor shown = { .role = roles->name, .block = b ? b->number : -1 };
        if (!bound && roles->form == MATRICES
            && ((const struct matrices *)(const void *)(base + roles->offset))->of)
            return fail(BMC_EFORMAT, "%s: not all experts are there", full_name(m, &shown, name));
        if (!bound && roles->required)
            return fail(BMC_EFORMAT, "%s is missing", full_name(m, &shown, name));
    }
    return 0;
}

/* A model with inputs of each layer's own has all that they are made of. */
static int check_per_layer(const bmc_model *m) {
    const char *missing = !m->per_layer_embd.data   ? "per_layer_token_embd"
                          : !m->per_layer_proj.data ? "per_layer_model_proj"
                          : !m->per_layer_norm.v    ? "per_layer_proj_norm"
                                                    : NULL;
    return m->c.per_layer_dim && missing ? fail(BMC_EFORMAT, "%s.weight is missing", missing) : 0;
}

int model_check_bound(const bmc_model *m) {
    int status = check_roles(m, (const char *)m, NULL, model_roles);
    if (!status)
        status = check_per_layer(m);
    for (int i = 0; !status && i < m->c.n_blocks; i++)
        status = check_roles(m, (const char *)&m->blocks[i], &m->blocks[i], m->blocks[i].kind->roles);
    for (int i = 0; !status && i < m->c.n_blocks; i++) {
        const struct block *b = &m->blocks[i];
        char name[96];
        const char *role = b->kind->missing ? b->kind->missing(b) : NULL;
        if (role)
            status = fail(BMC_EFORMAT, "%s is missing",
                          full_name(m, &(bmc_tensor){ .role = role, .block = i }, name));
    }
    return status;
}

void model_each_matrix(bmc_model *m, void (*fn)(struct matrix *, void *), void *arg) {
    struct matrix *own[] = { &m->per_layer_proj, &m->eh_proj, &m->output };
    for (int i = 0; i < m->c.n_blocks; i++)
        for (const struct role *r = m->blocks[i].kind->roles, *before = NULL; r->name; before = r++) {
            void *place = (char *)&m->blocks[i] + r->offset;
            if ((before && before->offset == r->offset) || r->form == VECTOR || r->form == TRANSPOSED)
                continue;                   /* another shape of the same */
            struct matrix *list = r->form == MATRIX ? place : ((struct matrices *)place)->of;
            for (int64_t e = 0; list && e < copies(&m->blocks[i], r); e++)
                if (list[e].data)
                    fn(&list[e], arg);
        }
    for (size_t i = 0; i < sizeof own / sizeof *own; i++)
        if (own[i]->data)
            fn(own[i], arg);
}
