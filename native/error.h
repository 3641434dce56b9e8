/* The sentence behind a status, one per thread. */
#ifndef ERROR_H
#define ERROR_H

/* Keeps the sentence for bmc_error() and returns status, so that a check reads `return
 * fail(BMC_EINVAL, ...)`. */
int fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));

const char *error_message(void);    /* this thread's last failure, "" before the first */

#endif
