// The user's cache directory: $DITMOE_CACHE, else $XDG_CACHE_HOME/ditmoe, else ~/.cache/ditmoe.
//
// A cache only ever saves time: what cannot be read is made again, what cannot be written is not
// kept, and neither is an error. Files are written under a temporary name and renamed, so that a
// reader sees a whole file or none.
#ifndef DITMOE_CACHE_H
#define DITMOE_CACHE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// The whole file `name`, to be freed by the caller, with a 0 byte after it; NULL when there is
// none.
unsigned char *cache_read(const char *name, size_t *size);

// Stores a file; false when that is not possible.
bool cache_write(const char *name, const void *data, size_t size);

#endif
