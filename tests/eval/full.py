#!/usr/bin/env python3
"""Compares `ditmoe eval fid` with pytorch-fid and with ADM's formulas, end to end: random weights in the shapes
of FID's Inception network in the file format of its users, real images (Fashion-MNIST, resized, as PNG and .npz).

    python3 tests/eval/full.py BUILD/ditmoe [WORK] [IMAGES]

Needs torch, torchvision, scipy, pytorch-fid, and /usr/share/datasets/fashion-mnist."""
import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pytorch_fid.fid_score as fid_score
import pytorch_fid.inception as fid_inception
import torch
from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from inception_reference import (Inception, frechet, inception_score, precision_recall, random_state,  # noqa: E402
                                 statistics)

DATA = "/usr/share/datasets/fashion-mnist"


def fashion(split, count, side):
    with gzip.open(f"{DATA}/{split}-images-idx3-ubyte.gz") as f:
        pixels = np.frombuffer(f.read()[16:16 + count * 784], np.uint8).reshape(count, 28, 28)
    grown = [np.array(Image.fromarray(p).resize((side, side + 3), Image.BICUBIC).convert("RGB")) for p in pixels]
    for i, image in enumerate(grown):  # some colour, so that channels differ
        image[:, :, i % 3] //= 2
    return np.stack(grown)


def write(images, directory, name):
    os.makedirs(f"{directory}/{name}", exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(f"{directory}/{name}/{i:05d}.png")
    np.savez_compressed(f"{directory}/{name}.npz", arr_0=images)


def figures(state, reference, samples, adm):
    network = Inception(state)
    ref = [np.concatenate(x) for x in zip(*(network.features(reference[i:i + 16], adm)
                                            for i in range(0, len(reference), 16)))]
    got = [np.concatenate(x) for x in zip(*(network.features(samples[i:i + 16], adm)
                                            for i in range(0, len(samples), 16)))]
    out = {"fid": frechet(statistics(ref[0]), statistics(got[0])),
           "sfid": frechet(statistics(ref[1]), statistics(got[1])),
           "inception_score": inception_score(got[0], state["fc.weight"].numpy())}
    out["precision"], out["recall"] = precision_recall(ref[0], got[0])
    print("  in float16, as ADM's evaluator computes distances: precision %.4f recall %.4f"
          % precision_recall(ref[0], got[0], half=True))
    return out


def show(title, want, got):
    print(title)
    worst = 0
    for key in want:
        relative = abs(got[key] - want[key]) / max(abs(want[key]), 1e-30)
        worst = max(worst, relative if key not in ("precision", "recall") else 0)
        print(f"  {key:16} {want[key]:14.8g} {got[key]:14.8g}   relative {relative:.1e}")
    return worst


def main():
    ditmoe, work = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "/tmp/fid"
    count = int(sys.argv[3]) if len(sys.argv) > 3 else 48
    os.makedirs(work, exist_ok=True)
    state = random_state(1)
    weights = f"{work}/inception.pth"
    torch.save(state, weights, _use_new_zipfile_serialization=False)
    reference, samples = fashion("train", count, 61), fashion("t10k", count * 3 // 4, 61)
    samples = np.clip(samples.astype(int) + 20, 0, 255).astype(np.uint8)
    write(reference, work, "reference")
    write(samples, work, "samples")

    def run(*args):
        out = subprocess.run([ditmoe, "eval", "fid", "--inception", weights, "--json", *args], check=True,
                             stdout=subprocess.PIPE, text=True)
        return json.loads(out.stdout) if out.stdout.startswith("{") else None

    fid_inception.load_state_dict_from_url = lambda *a, **k: state
    theirs = fid_score.calculate_fid_given_paths([f"{work}/reference", f"{work}/samples"], 16, "cpu", 2048, 1)
    ours = run("--reference", f"{work}/reference", "--samples", f"{work}/samples")
    worst = show("pytorch-fid (its own program) | ditmoe", {"fid": theirs}, ours)
    worst = max(worst, show("pytorch-fid's preprocessing, ADM's formulas | ditmoe",
                            figures(state, reference, samples, False), ours))
    ours = run("--as", "adm", "--reference", f"{work}/reference.npz", "--samples", f"{work}/samples.npz")
    worst = max(worst, show("ADM's preprocessing and formulas | ditmoe, from .npz",
                            figures(state, reference, samples, True), ours))
    run("--reference", f"{work}/reference", "--save-stats", f"{work}/stats.npz")
    again = run("--reference", f"{work}/stats.npz", "--samples", f"{work}/samples")
    with np.load(f"{work}/stats.npz") as f:
        print("statistics that numpy reads:", {k: f[k].shape for k in f})
    theirs = fid_score.calculate_fid_given_paths([f"{work}/stats.npz", f"{work}/samples"], 16, "cpu", 2048, 1)
    worst = max(worst, show("pytorch-fid with our statistics | ditmoe with them", {"fid": theirs}, again))
    print(f"worst relative difference {worst:.1e}:", "good" if worst < 1e-3 else "BAD")
    sys.exit(worst >= 1e-3)


main()
