/* What the files on sessions share. */
#ifndef SESSION_H
#define SESSION_H

#include "model.h"

int claim(bmc_session *s);                      /* 0 or BMC_EBUSY */
void release(bmc_session *s);
int reserve(bmc_session *s, int rows);          /* room for more rows and their tokens; 0, or a failure */

#endif
