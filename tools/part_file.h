// A file of equal items that are made one by one, in any order and over several runs: items, and
// beside them which of them are there. It belongs to one process at a time, and to one description
// of what is made: another one is refused.
#ifndef DITMOE_PART_FILE_H
#define DITMOE_PART_FILE_H

#include <stddef.h>
#include <stdint.h>

#include "devices/error.h"

struct part_file {
    char *path;
    int fd;
    int64_t count;
    size_t item;   // bytes of one
    uint8_t *done; // [count] 1: is there
    int64_t left;  // items that are not
};

// Opens the file, or makes it. ERR_INPUT: made for another description (a line of text).
int part_file_open(const char *path, const char *description, int64_t count, size_t item,
                   struct part_file *out);
// Of a process that follows another's: what is there is noted, nothing is kept.
int part_file_follow(int64_t count, size_t item, struct part_file *out);
// Items [first, first+count) are there from here on, even after a power cut.
int part_file_put(struct part_file *f, int64_t first, int64_t count, const void *items);
int part_file_get(const struct part_file *f, int64_t first, int64_t count, void *items);
int part_file_remove(struct part_file *f); // when what it was for is there
void part_file_close(struct part_file *f); // also of a zeroed struct

#endif
