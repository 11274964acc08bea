// What the commands share: their entry points, the device they run on, the options that describe a
// model, and how a failure is told.
#ifndef DITMOE_COMMAND_H
#define DITMOE_COMMAND_H

#include <signal.h>

#include "devices/device.h"
#include "model/checkpoint.h"
#include "model/config.h"
#include "tools/options.h"

#define COMMAND(name, summary) int cmd_##name(int argc, char **argv);
#include "tools/commands.def"
#undef COMMAND

// "ditmoe NAME: <error_message()>" on stderr; returns exit status 1.
int report_failure(const char *name);
// The status to leave with: 1 when stdout could not be written (a full disk, a closed pipe).
int finish_output(const char *name, int status);

// ---- device -------------------------------------------------------------------------------------

struct device_options {
    const char *device;
    int precision; // 0: f32, 1: bf16
    int portable;
};
extern const struct option_spec device_option_list[];

struct session {
    struct device *dev;
    struct stream *stream;
};
int session_open(const struct device_options *o, struct session *out);
void session_close(struct session *s); // also of a zeroed struct

// ---- model --------------------------------------------------------------------------------------

// Overrides of a preset; -1 (NAN for numbers with a point): the preset's.
struct model_options {
    int layers, hidden, heads, patch, experts, topk, shared, moe;
    int qk_norm, learn_sigma, renormalise, balance_per_sequence;
    float balance, class_dropout;
    int channels, size, classes;
    int diffusion; // enum diffusion; no option of model_option_list sets it
    int expert;    // enum expert_kind
};
extern const struct option_spec model_option_list[]; // without channels, size and classes
extern const struct option_spec image_option_list[]; // these

void model_options_init(struct model_options *o);
// preset + overrides, checked.
int model_config(const char *preset, const struct model_options *o, struct config *out);
int model_override(const struct model_options *o, struct config *out); // only that, of any model
// What to call a model: its preset, or, where options changed the preset's network, its sizes.
const char *model_title(const char *preset, const struct config *c, char out[160]);

// ---- checkpoints --------------------------------------------------------------------------------

// A file stays itself, and so does a directory without step-*.safetensors (others keep weights in
// directories too); for a run's directory its newest checkpoint. ERR_IO when there is neither.
int checkpoint_path(const char *path, char *out, size_t size);

// "ema", "model" or NULL as --weights has it.
extern const char *const weights_choices[]; // auto, ema, model: in the order of enum weights_choice

// ---- stopping -----------------------------------------------------------------------------------

// SIGINT, SIGTERM and SIGUSR1 set stop_wanted; a second one ends the program at once.
extern volatile sig_atomic_t stop_wanted;
void stop_on_signals(void);

double now_seconds(void); // monotonic

// Writes a whole file or leaves the old one.
int write_text_file(const char *path, const char *text, size_t bytes);
int write_json_file(const char *path, const json_t *json);

#endif
