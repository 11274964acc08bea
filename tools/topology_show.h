// A topology for people and programs: a tree of text, JSON, a figure.
#ifndef DITMOE_TOPOLOGY_SHOW_H
#define DITMOE_TOPOLOGY_SHOW_H

#include <stdio.h>

#include <jansson.h>

#include "runtime/topology.h"

void topology_print(const struct topology *t, FILE *out);
json_t *topology_json(const struct topology *t);
int topology_draw(const char *path, const struct topology *t); // PNG (topology_figure.c)

// "GPU", "CPU"; "80 GiB", "503.5 GiB"; "15.8 GB/s".
const char *object_title(const struct topology_object *o);
const char *format_memory(uint64_t bytes, char out[32]);
const char *format_link(double bytes_per_second, char out[32]);

#endif
