// ditmoe train: the options of a training run. The run itself is train_run.c.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tools/train_run.h"

static const char *const diffusion_choices[] = {"rf", "ddpm", NULL}; // in the order of enum diffusion
static const char *const time_choices[] = {"logit-normal", "uniform", "stratified", NULL};

#define AT(member) offsetof(struct train_settings, member)
static const struct option_spec run_options[] = {
    {"model", 'm', OPTION_STRING, "PRESET", "S/4-8E2A",
     "size (S, B, L, XL, G), patch, experts and active experts", AT(model), 0, 0, NULL},
    {"init", 0, OPTION_STRING, "FILE", NULL,
     "begin with the weights and the model of FILE (whatever --ckpt of 'ditmoe sample' opens, such as "
     "what 'ditmoe upcycle' writes) instead of a preset's",
     AT(init), 0, 0, NULL},
    {"data", 0, OPTION_STRING, "PATH", NULL,
     "directory with MNIST-like files (Fashion-MNIST), folder of class folders of PNG or JPEG images, "
     "or latents that 'ditmoe encode' made",
     AT(data), 0, 0, NULL},
    {"diffusion", 0, OPTION_CHOICE, "WHICH", "rf",
     "what is learned: rf, rectified flow; ddpm, noise and variance in 1000 steps; with --init as FILE, "
     "unless given", AT(diffusion), 0,
     0, diffusion_choices},
    {"out", 'o', OPTION_STRING, "RUN_DIR", NULL, "where the run's files go", AT(out), 0, 0, NULL},
    {"steps", 'n', OPTION_INT64, "N", "10000",
     "optimiser steps in all, those before --resume counted", AT(steps), 1, 1e12, NULL},
    {"resume", 0, OPTION_FLAG, NULL, "no",
     "go on from RUN_DIR's newest checkpoint, with the options it was started with unless given "
     "anew; start from the beginning where there is none",
     AT(resume), 0, 0, NULL},
    {"dry-run", 0, OPTION_FLAG, NULL, "no", "print the memory plan and stop; needs no --out",
     AT(dry_run), 0, 0, NULL},
    {"seed", 's', OPTION_UINT64, "N", "0", "of everything random", AT(seed), 0, 0, NULL},
    {0},
};

static const struct option_spec data_options[] = {
    {"image-size", 0, OPTION_INT, "N", "0",
     "side of the images; 0: 32 for MNIST-like files, a set of latents' own (a folder needs it)", AT(image_size), 0, 4096,
     NULL},
    {"channels", 0, OPTION_INT, "N", "0",
     "1 grey, 3 colour; 0: 1 for MNIST-like files, 3 for a folder", AT(channels), 0, 3, NULL},
    {"flip", 0, OPTION_FLAG, NULL, "no", "mirror half of the images left to right", AT(flip), 0, 0,
     NULL},
    {"threads", 0, OPTION_INT, "N", "0", "that read images in the background; 0: chosen",
     AT(threads), 0, 256, NULL},
    {0},
};

static const struct option_spec optimiser_options[] = {
    {"batch", 'b', OPTION_INT, "N", "64", "images at a time", AT(batch), 1, 65536, NULL},
    {"accumulate", 0, OPTION_INT, "N", "1", "batches whose gradients make one step", AT(accumulate),
     1, 65536, NULL},
    {"lr", 0, OPTION_FLOAT, "X", "1e-4", "learning rate of AdamW", AT(rate), 0, 10, NULL},
    {"warmup", 0, OPTION_INT, "N", "0", "steps in which the rate grows to its value", AT(warmup), 0,
     1e9, NULL},
    {"weight-decay", 0, OPTION_FLOAT, "X", "0", "of AdamW", AT(decay), 0, 10, NULL},
    {"beta1", 0, OPTION_FLOAT, "X", "0.9", "of AdamW", AT(beta1), 0, 1, NULL},
    {"beta2", 0, OPTION_FLOAT, "X", "0.999", "of AdamW", AT(beta2), 0, 1, NULL},
    {"clip", 0, OPTION_FLOAT, "X", "0", "norm to clip gradients to; 0: none", AT(clip), 0, 1e6,
     NULL},
    {"ema", 0, OPTION_FLOAT, "X", "0.9999", "decay of the averaged weights, warmed up", AT(ema), 0,
     1, NULL},
    {"time", 0, OPTION_CHOICE, "HOW", "logit-normal",
     "how rectified flow draws t: logit-normal, uniform, stratified", AT(time), 0, 0, time_choices},
    {"recompute", 0, OPTION_FLAG, NULL, "no",
     "keep only each block's input and compute the rest again: less memory, more time",
     AT(recompute), 0, 0, NULL},
    {"early-update", 0, OPTION_FLAG, NULL, "no",
     "update each block as soon as its gradients are there: less memory, but no clipping and no "
     "accumulation",
     AT(early), 0, 0, NULL},
    {0},
};

static const struct option_spec output_options[] = {
    {"checkpoint-every", 0, OPTION_INT64, "N", "1000", "steps; 0: only at the end",
     AT(checkpoint_every), 0, 1e12, NULL},
    {"keep", 0, OPTION_INT, "N", "2", "checkpoints to keep; 0: all", AT(keep), 0, 1000000, NULL},
    {"sample-every", 0, OPTION_INT64, "N", "1000", "steps between sample grids; 0: none",
     AT(sample_every), 0, 1e12, NULL},
    {"sample-steps", 0, OPTION_INT, "N", "20",
     "steps of a sample: Euler, or DDPM of a DDPM model; at most 1000", AT(sample_steps), 1,
     10000, NULL},
    {"sample-cfg", 0, OPTION_FLOAT, "S", "2", "guidance scale of samples", AT(sample_cfg), 0, 100,
     NULL},
    {"replan", 0, OPTION_INT64, "N", "0",
     "on several devices: every N steps, move experts between ranks if that evens the load out; "
     "changes no result; 0: never",
     AT(replan), 0, 1e12, NULL},
    {"log-every", 0, OPTION_INT64, "N", "0",
     "steps between progress lines where stderr is no terminal; 0: one every five seconds",
     AT(log_every), 0, 1e12, NULL},
    {0},
};
#undef AT

// Takes the options of the run that is resumed; what is on the command line goes before.
static bool restore_options(const struct train_settings *o, const struct command *command)
{
    char path[4200];
    json_error_t wrong;
    snprintf(path, sizeof path, "%s/run.json", o->out);
    if (!run_directory_has_checkpoint(o->out))
        return true;
    json_t *run = json_load_file(path, 0, &wrong);
    bool good = options_restore(command, json_object_get(run, "options"));
    json_decref(run);
    return good;
}

int cmd_train(int argc, char **argv)
{
    struct train_settings o = {0};
    model_options_init(&o.overrides);
    const struct option_group groups[] = {
        {"run", run_options, &o},
        {"changes to the preset", model_option_list, &o.overrides},
        {"data", data_options, &o},
        {"optimiser", optimiser_options, &o},
        {"what is written", output_options, &o},
        {"the autoencoder that shows samples of latents", vae_option_list, &o.vae},
        {"device", device_option_list, &o.device},
        {"memory", memory_option_list, &o.memory},
        {RANK_OPTIONS_TITLE, rank_option_list, &o.ranks},
        {0},
    };
    const struct command command = {
        .name = "train",
        .summary = "Trains a model by rectified flow or DDPM.",
        .about = "Trains a DiT-MoE by rectified flow or DDPM and writes RUN_DIR/log.csv (a row a step), "
                 "checkpoints, sample grids, loss.png and run.json. Ctrl-C finishes the step and "
                 "writes a checkpoint; --resume then continues bit for bit.",
        .example =
            "ditmoe train --model S/4-8E2A --data /usr/share/datasets/fashion-mnist --out run",
        .groups = groups,
    };
    int status;
    if (!options_parse(&command, argc, argv, NULL, &status))
        return status;
    if (!o.out && !o.dry_run)
        return usage_error("train", "--out RUN_DIR is needed");
    const bool time = options_given("time"); // now, not of the run that is resumed
    if (o.init && options_given("model"))
        return usage_error("train", "--model and --init both say which model: give one");
    status = vae_check("train", &o.vae);
    if (status)
        return status;
    if (o.resume && o.out && !restore_options(&o, &command))
        return 2;
    if (!o.data && !o.dry_run)
        return usage_error("train", "--data PATH is needed");
    if (o.beta1 >= 1 || o.beta2 >= 1)
        return usage_error("train", "--beta1 and --beta2 must be below 1");
    if (o.channels == 2)
        return usage_error("train", "--channels 2: must be 1 or 3");
    if (o.diffusion == DIFFUSION_DDPM && time)
        return usage_error("train", "--time: with --diffusion ddpm t is uniform");
    status = ranks_launch(o.device.device, "train", argc, argv);
    if (status)
        return status;
    struct config config; // sizes that do not go together are told before any file is opened
    struct model_options guess = o.overrides;
    guess.size = o.image_size ? o.image_size : -1;
    if (!o.init && model_config(o.model, &guess, &config) < 0)
        return usage_error("train", "%s", error_message());
    char *data = o.data ? realpath(o.data, NULL) : NULL; // a resumed run may start elsewhere
    char *vae = o.vae.vae ? realpath(o.vae.vae, NULL) : NULL;
    if (data)
        o.data = data;
    if (vae)
        o.vae.vae = vae;
    status = train_run(&o, &command) < 0 ? report_failure("train") : 0;
    free(data), free(vae);
    return status;
}
