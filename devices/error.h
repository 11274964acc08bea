// Errors: one convention for the whole tree.
//
// A function that can fail returns int: 0 (or a useful number >= 0) on success, one of the negative
// codes below on failure. The message, one line that says what was wrong, where and what to do, is
// set by fail() in a buffer of the calling thread. TRY() passes a failure up. Only tools/ prints a
// message and exits; no library function does either.
#ifndef DITMOE_ERROR_H
#define DITMOE_ERROR_H

#define ERROR_LIST(X)                                                                              \
    X(NODEVICE, "no device") /* no such device, platform or driver */                              \
    X(NOMEM, "out of memory") /* host or device memory */                                          \
    X(DRIVER, "driver error") /* a driver call failed */                                           \
    X(LOST, "device lost") /* the device failed; nothing in this process can use it any more */    \
    X(INPUT, "bad input") /* a file, option or shape that cannot be used */                        \
    X(IO, "I/O error") /* reading or writing failed: disk full, missing file */                    \
    X(STOPPED, "stopped") /* asked to stop (signal) */

enum error {
    ERR_NONE = 0,
    ERROR_MINUS = -100, // so that the first code below is -99 and every code is negative
#define X(name, text) ERR_##name,
    ERROR_LIST(X)
#undef X
};

// Sets this thread's message (printf format) and returns `code`: `return fail(ERR_INPUT, "...")`.
int fail(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));

// Puts "context: " in front of the message already set and returns `code`.
int fail_in(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));

// The last message set in this thread; "" if none.
const char *error_message(void);

// A short name of a code ("bad input"); "unknown error" for a number that is no code.
const char *error_name(int code);

#define TRY(call)                                                                                  \
    do {                                                                                           \
        int try_code = (call);                                                                     \
        if (try_code < 0)                                                                          \
            return try_code;                                                                       \
    } while (0)

// For code with something to release: sets `code` and jumps to `out`.
#define TRY_OUT(call)                                                                              \
    do {                                                                                           \
        code = (call);                                                                             \
        if (code < 0)                                                                              \
            goto out;                                                                              \
    } while (0)

// A mistake of the programmer, never of the user: says where and aborts, in every build.
#define BUG_IF(condition)                                                                          \
    do {                                                                                           \
        if (condition)                                                                             \
            bug(__FILE__, __LINE__, #condition);                                                   \
    } while (0)

_Noreturn void bug(const char *file, int line, const char *condition);

#endif
