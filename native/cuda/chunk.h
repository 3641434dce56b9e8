/* Whole chunks of prompts by cuBLAS: chunk.c. */
#ifndef CUDA_CHUNK_H
#define CUDA_CHUNK_H

#include "cuda.h"

/* Lays its buffers out from `memory` on, of a model whose prompts are by cuBLAS; the bytes they take. */
size_t chunk_lay_out(const bmc_model *m, struct cuda *c, char *memory);

int chunk_open(const bmc_model *m, struct cuda *c);         /* after the buffers; 0, or a failure */
void chunk_close(struct cuda *c);

/* Queues product i of a list, if the pass is a chunk and the product one of those that cuBLAS does. */
bool chunk_multiply(struct pass *p, const struct product *list, int i);

#endif
