// FNV-1a, 64 bits: tells apart what is not meant to deceive (names of cached files, identities of
// data and autoencoders, the options of ranks). Not for security.
#ifndef DITMOE_HASH_H
#define DITMOE_HASH_H

#include <stddef.h>
#include <stdint.h>

#define HASH_START 0xcbf29ce484222325u

// Continues from `hash` (HASH_START to begin) with `size` bytes.
static inline uint64_t hash_bytes(uint64_t hash, const void *data, size_t size)
{
    const unsigned char *bytes = (const unsigned char *)data;
    for (size_t i = 0; i < size; i++)
        hash = (hash ^ bytes[i]) * 0x100000001b3u;
    return hash;
}

#endif
