// How fast devices and the roads between them are: measured by `ditmoe calibrate` and kept as JSON,
// or, for devices that are not here, published peaks times the share of them that like devices
// reached when measured.
#ifndef DITMOE_RATES_H
#define DITMOE_RATES_H

#include <stdbool.h>
#include <stdint.h>

#include <jansson.h>

#include "devices/device.h"

// Products of few rows run at a fraction of the rate of large ones: rates are kept by the number of
// rows (of an expert, in a ragged product), and read off in between on a scale of logarithms.
enum { RATE_CLASSES = 6 };
extern const int rate_rows[RATE_CLASSES]; // 16, 64, 256, 1024, 4096, 16384

struct device_rates {
    char name[128], driver[96], pci[20]; // identity: what the rates are valid for
    char key[24];                        // as it was called then; no part of the identity
    bool bf16;                           // of activations; rates of f32 are another entry
    int sharing;                 // ranks that worked on these cores together: 1 but for CPUs
    int width;                   // of the model that was measured, D
    double dense[RATE_CLASSES];  // flop/s of a product by rows
    double ragged[RATE_CLASSES]; // flop/s of experts' products by rows of an expert
    double attention;            // flop/s
    double memory;               // bytes/s, read and written
    double launch;               // seconds that an operation costs beside its work
    double to_device, to_host;   // bytes/s of copies
    // A real step, measured, over what these figures say that it takes: what they leave out.
    double sample, train;
    bool measured; // or published
};

// A road for bytes from one rank to another: latency + bytes / bandwidth.
struct link_rate {
    double latency, bandwidth; // seconds, bytes/s
    bool staged;               // by way of the host's memory: both directions take turns
    // Seconds that real steps of two such ranks take beside all work that is counted, a layer and
    // beside the layers: starting operations, telling counts of rows, meeting. [sampling,
    // training]; 0: not measured. Of a device with itself: of it alone, while other ranks have
    // nothing to do.
    double layer[2], step[2];
};

// flop/s of a product of `rows` rows.
double rate_at(const double table[RATE_CLASSES], double rows);

// What data sheets say of a device by its name ("NVIDIA H200"), or NULL.
struct published {
    const char *name;      // found within the device's name
    double tensor, vector; // flop/s: bf16 matrix units as the CUDA backend uses them (0: none); f32
    double memory;         // bytes/s
    double nvlink;         // bytes/s one way, all links together; 0: none
    uint64_t bytes;        // memory
};
const struct published *rates_published(const char *name);
// Fills rates from it (of CPUs that are not in the table, from their cores). ERR_INPUT: the device
// is not in the table; --rates gives what is missing.
int rates_guess(const char *name, enum device_kind kind, int cores, bool bf16, double pcie,
                struct device_rates *out);

// ---- files --------------------------------------------------------------------------------------

// A set of rates: what calibrate writes to the cache ("rates.json") and --rates reads.
struct rates {
    int count;
    struct device_rates *list;
    struct link_rate
        staged; // between two ranks of one machine, by the host's memory; bandwidth 0: unknown
    int link_count;
    struct rates_link { // measured between two devices, by identity
        char from[160], to[160];
        struct link_rate rate;
    } * links;
};

void rates_free(struct rates *r); // also of a zeroed struct
json_t *rates_to_json(const struct rates *r);
int rates_from_json(const json_t *json, struct rates *out);
int rates_read(const char *path, struct rates *out); // errors name the file
// The user's own, from the cache; no file or one that cannot be read is an empty set.
void rates_load(struct rates *out);
bool rates_store(const struct rates *r); // false: cannot be written

// What a device is called in links: name, PCI id.
void rates_identity(const struct device_info *d, char out[160]);
// The entry of this device, driver and precision, or NULL: unknown, or measured with another
// driver.
const struct device_rates *rates_find(const struct rates *r, const struct device_info *d, bool bf16,
                                      int sharing);
// What is left of a CPU's rates for each of `sharing` ranks on it, where that was not measured.
struct device_rates rates_shared(const struct device_rates *alone, int sharing);
// An entry by name alone, for machines that are not here.
const struct device_rates *rates_like(const struct rates *r, const char *name, bool bf16);
// Puts the entry in the place of the same device's older one.
int rates_put(struct rates *r, const struct device_rates *d);
int rates_put_link(struct rates *r, const char *from, const char *to, struct link_rate rate);
const struct link_rate *rates_link(const struct rates *r, const char *from, const char *to);
// A road that was not measured: by the host's memory, with what is known of the ends and of copies
// between processes; or straight between devices of this name, by its published NVLink, else PCIe.
struct link_rate rates_staged_road(const struct rates *r, const struct device_rates *a,
                                   const struct device_rates *b);
struct link_rate rates_straight_road(const char *name);

#endif
