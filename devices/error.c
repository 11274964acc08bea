#include "devices/error.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static _Thread_local char message[1024];

int fail(int code, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    return code;
}

int fail_in(int code, const char *format, ...)
{
    char inner[sizeof message];
    memcpy(inner, message, sizeof message);
    va_list args;
    va_start(args, format);
    int n = vsnprintf(message, sizeof message, format, args);
    va_end(args);
    // what does not fit of the inner message is cut (said by hand: gcc warns of snprintf and
    // strncat)
    if (n >= 0 && (size_t)n + 3 < sizeof message) {
        size_t room = sizeof message - (size_t)n - 3, length = strlen(inner);
        length = length < room ? length : room;
        memcpy(message + n, ": ", 2);
        memcpy(message + n + 2, inner, length);
        message[(size_t)n + 2 + length] = '\0';
    }
    return code;
}

const char *error_message(void)
{
    return message;
}

const char *error_name(int code)
{
    switch (code) {
#define X(name, text)                                                                              \
    case ERR_##name:                                                                               \
        return text;
        ERROR_LIST(X)
#undef X
    default:
        return "unknown error";
    }
}

void bug(const char *file, int line, const char *condition)
{
    fprintf(stderr, "ditmoe: %s:%d: bug: %s\n", file, line, condition);
    abort();
}
