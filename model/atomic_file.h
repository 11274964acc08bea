// A file that appears whole or not at all: written under PATH.tmp.PID, fsynced, renamed over PATH,
// and its directory fsynced. Until the rename the previous PATH is untouched, whatever happens:
// a full disk, a limit, a kill. The temporary is locked while it is written, so that the next
// writer of the same PATH can tell the leftovers of a killed process (which it removes) from a live
// one.
//
// Errors are ERR_IO and name PATH. A program that wants a file-size limit reported as an error and
// not as a signal ignores SIGXFSZ.
#ifndef DITMOE_ATOMIC_FILE_H
#define DITMOE_ATOMIC_FILE_H

#include <stddef.h>
#include <stdint.h>

#include "devices/error.h"

struct atomic_file;

int atomic_file_create(const char *path, struct atomic_file **out);
int atomic_file_write(struct atomic_file *f, const void *data, size_t bytes);
// Over what was written before, `bytes` from `offset` on.
int atomic_file_write_at(struct atomic_file *f, uint64_t offset, const void *data, size_t bytes);

// Makes the file appear under its name, or fails and leaves the previous one. Releases `f` either
// way.
int atomic_file_commit(struct atomic_file *f);

// Gives up: removes the temporary and releases `f` (NULL is allowed). Keeps the error message.
void atomic_file_abort(struct atomic_file *f);

#endif
