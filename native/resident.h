/* Experts' panels where not all of them have room: they are made when a token first takes the expert, and
 * those of the expert used longest ago make way. An expert that no token takes is not read from the file. */
#ifndef RESIDENT_H
#define RESIDENT_H

#include "pass.h"

/* Marks the matrices of experts as those whose panels are made late; returns the bytes of a slot, the largest
 * expert's panels, or 0: there are no experts. */
size_t residents_mark(bmc_model *m);
/* As many slots as fit; 0 or BMC_ENOMEM. */
int residents_open(bmc_model *m, size_t slot_bytes, size_t bytes);
void residents_close(bmc_model *m);
void residents_forget(bmc_model *m);        /* in a forked process: nothing is there */

/* Panels of the experts that have tokens: those of expert e are first[e] .. first[e + 1]. Experts without a
 * slot stay without panels in this pass, which makes them part by part. Every thread calls it, behind a
 * barrier. */
void residents_want(struct pass *p, const struct block *b, const int32_t *first, int thread);

#endif
