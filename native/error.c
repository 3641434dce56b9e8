#include "error.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char message[512];

int fail(int status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    return status;
}

const char *error_message(void) {
    return message;
}
