/* What the CPU's own code does with the arguments of a kernel: the same results in the same places. Rows in 8
 * bits are one tile of columns on the GPU and several on the CPU: they are copied from one to the other. */
#ifndef REFERENCE_H
#define REFERENCE_H

#include "cuda/args.h"

void reference_norm(const struct cuda_norm *a);
void reference_norm_rows(const struct cuda_norm_rows *a);
void reference_quantize(const struct cuda_quantize *a);
void reference_product(int type, const struct cuda_product *a);
void reference_place(const struct cuda_place *a);
void reference_attend(const struct cuda_attend *a, float alibi);
void reference_activate(const struct cuda_activate *a);
void reference_best(const struct cuda_best_of *a);
void reference_route(const struct cuda_route *a);
void reference_combine(const struct cuda_combine *a);
void reference_switch(const struct cuda_switch *a);
void reference_join(const struct cuda_join *a, int dim);
void reference_scale_rows(const struct cuda_scale_rows *a);
void reference_add_normed(const struct cuda_add_normed *a);
void reference_gate(const struct cuda_thin *thin, const struct cuda_activate *a);
void reference_altup(int kind, const struct cuda_altup *a);
void reference_place_compressed(const struct cuda_place_compressed *a);

/* Where the rows of a block with a state are in `work`, of a pass of up to pass_max tokens, filled in; the
 * floats of work, and of the states of a session. */
size_t reference_recur_layout(struct cuda_recur *a, int pass_max, float *work, size_t *state_floats);
void reference_recur(const struct cuda_recur *a, int pass_max, float *work);

/* n_rows x n_cols of a type's random weights, as panels; the caller frees what codes points to. */
struct packed { uint8_t *codes, *scales; size_t code_stride, scale_stride; };
struct packed random_panels(int type, int n_rows, int n_cols);
float noise(void);
uint64_t random_number(void);

#endif
