// Reading a file of JSON.
#ifndef DITMOE_JSON_FILE_H
#define DITMOE_JSON_FILE_H

#include <jansson.h>

// ERR_IO: it cannot be read; ERR_INPUT: it is not JSON, and in which line. A key that stands twice
// is refused.
int json_read(const char *path, json_t **out);

#endif
