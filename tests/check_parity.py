"""Compares a ditmoe program with PyTorch on random models. A developer's tool; needs torch and safetensors.

    check_parity.py build/ditmoe [--device KEY] [--random 20] [--seed 1] [--only WORD] [--tolerance 2e-4]
    check_parity.py build/ditmoe --trained RUN_DIR/checkpoint.safetensors

The first form writes models and inputs, runs `ditmoe forward` with and without `--loss rf` and `--loss ddpm`, and
compares the output, the chosen experts, the loss, DDPM's terms and every gradient with the float64 reference; and runs
`ditmoe sample` with every kind of sampler that a DDPM model has, by a random respacing. The second reads a checkpoint that
`ditmoe train` wrote: all names and shapes of weights, EMA and moments, and the outputs of weights and EMA.
Each difference is the largest absolute one over the root mean square of what is expected (reference.distance).
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden"))
import ddpm  # noqa: E402
import reference as ref  # noqa: E402

GAP = 2e-5  # between a token's K-th and next expert; below it rounding may rightly choose another
PREFIXES = ("ema.", "adam.m.", "adam.v.")

# (images, configuration): the odd corners, each for a reason that its name tells
CORNERS = {
    "published small": (2, dict(hidden=48, heads=6, experts=8)),
    "published large": (2, dict(hidden=144, heads=2, experts=8, qk_norm=True)),
    "head size 18": (3, dict(hidden=36, heads=2, experts=5, qk_norm=True)),
    "head size 20, one head": (2, dict(hidden=20, heads=1, experts=3, topk=1)),
    "head size 1": (2, dict(hidden=8, heads=8, experts=3, topk=1)),
    "head size 128": (2, dict(layers=1, hidden=128, heads=1, experts=3, topk=1)),
    "smallest": (1, dict(layers=1, hidden=4, heads=1, patch=1, channels=1, size=1, classes=1, experts=1, topk=1)),
    "one token": (5, dict(hidden=24, patch=8, size=8, channels=3)),
    "patch 1, 8 channels, 16 experts": (2, dict(hidden=28, patch=1, channels=8, size=7, experts=16, topk=4)),
    "patch 8, shallow": (3, dict(layers=3, hidden=40, patch=8, channels=3, size=32, experts=3, topk=1, moe="shallow")),
    "patch 4, deep": (3, dict(layers=3, hidden=44, patch=4, channels=1, size=20, experts=6, topk=3, moe="deep")),
    "all experts active": (2, dict(hidden=32, experts=3, topk=3, renormalise=True)),
    "one expert": (2, dict(hidden=32, experts=1, topk=1, renormalise=True)),
    "more experts than tokens": (1, dict(hidden=32, experts=40, topk=2, patch=4, size=8)),
    "alternate, no shared": (3, dict(layers=4, hidden=32, experts=5, shared=0, moe="alternate")),
    "dense": (3, dict(layers=2, hidden=52, heads=4, moe="none")),
    "dense, q/k norm": (3, dict(layers=2, hidden=52, heads=4, moe="none", qk_norm=True, learn_sigma=False)),
    "four shared": (2, dict(hidden=32, shared=4, topk=1)),
    "GELU experts": (3, dict(hidden=36, heads=3, experts=7, topk=3, expert="gelu", renormalise=True)),
    "GELU experts, shared": (2, dict(hidden=32, experts=4, expert="gelu", shared=2, moe="alternate")),
    "no null class": (3, dict(hidden=32, class_dropout=0.0)),
    "no balance loss": (2, dict(hidden=32, balance=0.0)),
    "strong balance loss": (4, dict(hidden=32, balance=3.0)),
    "strong balance loss per image": (4, dict(hidden=32, balance=3.0, balance_per_sequence=True)),
    "many images": (37, dict(hidden=32, patch=4, size=8, experts=8)),
    "deep network": (2, dict(layers=8, hidden=32, experts=4, topk=2)),
}


def random_case(r):
    heads, patch = r.choice([1, 2, 3, 4]), r.choice([1, 2, 4, 8])
    experts = r.randint(3, 16)
    sizes = [h for h in range(1, 41) if h * heads % 4 == 0]
    return r.randint(1, 5), dict(
        layers=r.randint(1, 4), heads=heads, hidden=heads * r.choice(sizes), patch=patch, size=patch * r.randint(1, 5),
        channels=r.randint(1, 8), classes=r.randint(1, 20), experts=experts, topk=r.randint(1, min(4, experts)),
        shared=r.choice([0, 1, 2, 4]), moe=r.choice(["all", "all", "alternate", "shallow", "deep", "none"]),
        qk_norm=r.random() < 0.5, learn_sigma=r.random() < 0.5, renormalise=r.random() < 0.5,
        expert=r.choice(["swiglu", "swiglu", "gelu"]),
        balance=r.choice([0.0, 0.01, 0.2]), balance_per_sequence=r.random() < 0.5)


def make_case(images, changes, seed):
    """Parameters, inputs and expectation, from the first seed that leaves a gap in every token's choice."""
    cfg = ref.make_config(**changes)
    best = None
    for attempt in range(40):
        params = ref.random_params(cfg, seed + attempt)
        inputs = ref.random_inputs(cfg, images, seed + attempt + 1000)
        inputs["t"][0] = float(seed % 2)  # the ends of the time interval, exactly
        expect, gap = ref.evaluate(params, cfg, inputs, torch.float64)
        if best is None or gap > best[0]:
            best = gap, params, inputs, expect
        if gap > GAP:
            break
    return cfg, *best


def random_way(r, cfg):
    """A sampler of DDPM models with its options: what ddpm.trajectory() takes."""
    sampler = r.choice(["ddpm", "ddpm", "ddim", "euler", "heun", "dpm++"])
    null = ref.label_rows(cfg) > cfg["classes"]
    return dict(sampler=sampler, respacing=r.choice(["5", "6", "ddim5", "ddim4", "3,2", "1,4", "2,0,3"]),
                cfg=r.choice([1.0, 1.5, 4.0]) if null else 1.0, channels=r.choice([3, None]),
                eta=r.choice([0.0, 0.5, 1.0]) if sampler == "ddim" else 0.0,
                clip=sampler in ("ddpm", "ddim") and r.random() < 0.3)


def make_ddpm_case(images, changes, seed, ways=3):
    """The same for DDPM, and trajectories: (cfg, gap, params, inputs, expect, [(way, latents, gap)])."""
    cfg, best, r = ref.make_config(**changes, diffusion="ddpm"), None, random.Random(seed)
    for attempt in range(40):
        params = ref.random_params(cfg, seed + attempt)
        inputs = ddpm.random_inputs(cfg, images, seed + attempt + 2000, steps=6)
        loss_inputs = {n: inputs[n] for n in ("x", "t", "y", "noise")}
        expect, gap = ddpm.evaluate(params, cfg, loss_inputs, torch.float64)
        if best is None or gap > best[0]:
            best = gap, params, inputs, expect
        if gap > GAP:
            break
    found = []
    for _ in range(ways):
        way = random_way(r, cfg)
        kept = len(ddpm.respace(way["respacing"]))
        start = {n: best[2][n] for n in ("z", "label")} | {"step_noise": best[2]["step_noise"][:kept].contiguous()}
        found.append((way, start, *ddpm.trajectory(best[1], cfg, start, torch.float64, way)))
    return cfg, *best, found


class Program:
    def __init__(self, path, device, folder):
        self.path, self.folder = path, folder
        self.device = ["--device", device] if device else []

    def run(self, name, checkpoint, inputs, source_option, target_option, options):
        source, target = self.folder + "/input.safetensors", self.folder + "/output.safetensors"
        save_file(inputs, source)
        if os.path.exists(target):
            os.remove(target)
        command = [self.path, name, "--ckpt", checkpoint, source_option, source, target_option, target]
        done = subprocess.run(command + list(options) + self.device, capture_output=True, text=True)
        return load_file(target) if done.returncode == 0 else f"exit {done.returncode}: {done.stderr.strip()[-300:]}"

    def sample(self, checkpoint, start, way):
        """The latents that `ditmoe sample` writes, or a message."""
        options = ["--classes", str(start["label"][0].item()), "--sampler", way["sampler"], "--weights", "model",
                   "--respacing", way["respacing"], "--cfg", str(way["cfg"]), "--eta", str(way["eta"]),
                   "--cfg-channels", "3" if way["channels"] else "all"] + ["--clip"] * way["clip"]
        noise = {n: start[n] for n in ("z", "step_noise")}
        return self.run("sample", checkpoint, noise, "--noise", "--latents", options)

    def forward(self, checkpoint, inputs, *options):
        """What `ditmoe forward` writes, or a message."""
        result = self.run("forward", checkpoint, inputs, "--input", "--output", options)
        if isinstance(result, str):
            return result
        if "balance" in result:  # the reference's name for the sum of the balance losses
            result["aux"] = result.pop("balance")
        return result


def compare(got, expect, names, tolerance):
    """(worst distance and its name, list of complaints)"""
    if isinstance(got, str):
        return (0.0, "-"), [got]
    complaints = [f"{n} is missing" for n in names if n not in got]
    complaints += [f"{n} was not expected" for n in got if n not in expect and n != "grad.pos_embed"]
    floor, worst = ref.gradient_floor(expect), (0.0, "-")
    for n in names:
        if n not in got:
            continue
        if n.startswith("experts."):
            if not torch.equal(got[n].long().sort(-1).values, expect[n]):
                complaints.append(f"{n} differs")
            continue
        # k_norm's bias has no gradient but for rounding: PyTorch in float32 is off by 1.7e-4 of the floor there
        zero = expect[n].numel() > 0 and expect[n].double().square().mean().sqrt().item() < 1e-9 * floor
        d = ref.distance(got[n], expect[n], (10 * floor if zero else floor) if n.startswith("grad.") else 0)
        worst = max(worst, (d, n))
        if not d <= tolerance:
            complaints.append(f"{n} is off by {d:.1e}")
    return worst, complaints


def check_case(program, name, case, tolerance):
    cfg, gap, params, inputs, expect = case
    checkpoint = program.folder + "/model.safetensors"
    save_file(params, checkpoint, {"ditmoe.config": json.dumps(cfg)})
    plain = [n for n in expect if n == "out" or n.startswith("experts.")]
    train = [n for n in expect if n == "loss" or n.startswith("grad.")]
    (out, _), wrong = compare(program.forward(checkpoint, inputs), expect, plain, tolerance)
    (far, where), wrong_train = compare(program.forward(checkpoint, inputs, "--loss", "rf", "--weights", "model"),
                                        expect, train, tolerance)
    wrong += wrong_train
    note = "" if gap > GAP else f", a choice is only {gap:.0e} wide"
    print(f"{'FAILED' if wrong else 'ok':7}{name}: out {out:.1e}, gradients {far:.1e} ({where}){note}")
    for complaint in wrong[:8]:
        print("       " + complaint)
    return not wrong


def check_ddpm(program, name, case, tolerance):
    """The loss and its terms, gradients, and latents (to five times the tolerance: rounding of several steps)."""
    cfg, gap, params, inputs, expect, found = case
    checkpoint = program.folder + "/model.safetensors"
    save_file(params, checkpoint, {"ditmoe.config": json.dumps(cfg)})
    names = [n for n in expect if n in ("loss", "mse", "vb") or n.startswith("grad.")]
    inputs = {n: inputs[n] for n in ("x", "t", "y", "noise")}
    got = program.forward(checkpoint, inputs, "--loss", "ddpm", "--weights", "model")
    (far, where), wrong = compare(got, expect, names, tolerance)
    worst = 0.0
    for way, start, latents, _ in found:
        got = program.sample(checkpoint, start, way)
        d = got if isinstance(got, str) else ref.distance(got["latents"], latents)
        worst = max(worst, 0.0 if isinstance(d, str) else d)
        if isinstance(d, str) or not d <= 5 * tolerance:
            wrong.append(f"{way}: {d}")
    gap = min([gap] + [g for _, _, _, g in found])
    note = "" if gap > GAP else f", a choice is only {gap:.0e} wide"
    print(f"{'FAILED' if wrong else 'ok':7}ddpm, {name}: loss and gradients {far:.1e} ({where}), latents {worst:.1e}{note}")
    for complaint in wrong[:8]:
        print("       " + complaint)
    return not wrong


def check_trained(program, path, tolerance):
    """A checkpoint of `ditmoe train`: its names, shapes and values, and that PyTorch computes the same from it."""
    with safe_open(path, "pt") as f:
        meta = f.metadata() or {}
    stored = json.loads(meta["ditmoe.config"])
    cfg = ref.make_config(**{k: v for k, v in stored.items() if k in ref.DEFAULTS})
    tensors, shapes = load_file(path), ref.shapes(cfg)
    trained = [n for n in shapes if n != "pos_embed"]
    wanted = {n: shapes[n] for n in shapes} | {p + n: shapes[n] for p in PREFIXES for n in trained}
    wrong = [f"{n} is missing" for n in wanted if n not in tensors]
    wrong += [f"{n} has shape {list(tensors[n].shape)}, not {list(s)}" for n, s in wanted.items()
              if n in tensors and tuple(tensors[n].shape) != s]
    wrong += [f"{n} is not a parameter" for n in tensors
              if n not in wanted and n not in [p + "pos_embed" for p in PREFIXES]]
    wrong += [f"{n} is not finite" for n, v in tensors.items() if not torch.isfinite(v).all()]
    wrong += [f"{n} is negative" for n, v in tensors.items() if n.startswith("adam.v.") and (v < 0).any()]
    weights = {n: tensors[n] for n in shapes if n in tensors}
    table = ref.position_table(cfg["hidden"], cfg["size"] // cfg["patch"])
    if "pos_embed" in weights and ref.distance(weights["pos_embed"], table) > 1e-5:
        wrong.append("pos_embed is not the sine-cosine table")
    if not wrong:
        inputs = ref.random_inputs(cfg, 2, 7)
        for which, params in (("model", weights), ("ema", {n: tensors.get("ema." + n, weights[n]) for n in shapes})):
            expect, gap = ref.evaluate(params, cfg, inputs, torch.float64)
            names = ["out"] + [n for n in expect if n.startswith("experts.") and gap > GAP]
            (out, _), complaints = compare(program.forward(path, inputs, "--weights", which), expect, names, tolerance)
            print(f"{which}: out is off by {out:.1e}, smallest gap {gap:.0e}")
            wrong += complaints
    for complaint in wrong[:20]:
        print("       " + complaint)
    print(f"{'FAILED' if wrong else 'ok':7}{path}: {len(tensors)} tensors")
    return not wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ditmoe")
    parser.add_argument("--device")
    parser.add_argument("--trained", metavar="CHECKPOINT")
    parser.add_argument("--random", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="")
    parser.add_argument("--tolerance", type=float, default=2e-4)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ditmoe-parity-") as folder:
        program = Program(a.ditmoe, a.device, folder)
        if a.trained:
            return 0 if check_trained(program, a.trained, a.tolerance) else 1
        cases = dict(CORNERS)
        r = random.Random(a.seed)
        for i in range(a.random):
            images, changes = random_case(r)
            short = " ".join(f"{k}={v}" for k, v in changes.items())
            cases[f"random {i}: {images} images {short}"] = images, changes
        results = [check_case(program, name, make_case(*case, a.seed + i), a.tolerance)
                   for i, (name, case) in enumerate(cases.items()) if a.only in name]
        results += [check_ddpm(program, name, make_ddpm_case(*case, a.seed + i), a.tolerance)
                    for i, (name, case) in enumerate(cases.items()) if a.only in name]
    print(f"{sum(results)} of {len(results)} agree")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
