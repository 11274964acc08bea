"""FID's Inception v3 as a function of a state dict (torch), with any widths, and the figures that
pytorch-fid and ADM's evaluator make of its features (numpy, scipy). Used to make fixtures and to check
the program; full.py proves it against pytorch-fid itself."""
import warnings

import numpy as np
import torch
import torch.nn.functional as F

SIDE = 299

# name: kernel, stride, padding (height, width)
PAD = {(1, 1): (0, 0), (1, 7): (0, 3), (7, 1): (3, 0), (1, 3): (0, 1), (3, 1): (1, 0), (5, 5): (2, 2)}


class Inception:
    def __init__(self, state):
        self.state = state

    def conv(self, name, x, stride=1, padding=None):
        s = {k: self.state[f"{name}.{k}"].to(x.dtype) for k in (
            "conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")}
        w = s["conv.weight"]
        padding = PAD[tuple(w.shape[2:])] if padding is None else padding
        x = F.conv2d(x, w, None, stride, padding)
        return F.relu(F.batch_norm(x, s["bn.running_mean"], s["bn.running_var"], s["bn.weight"], s["bn.bias"],
                                   False, 0, 0.001))

    def chain(self, block, names, x, **last):
        for i, name in enumerate(names):
            square = self.state[f"{block}.{name}.conv.weight"].shape[2:] == (3, 3)
            x = self.conv(f"{block}.{name}", x, **(last if last and i == len(names) - 1
                                                   else {"padding": 1} if square else {}))
        return x

    def average(self, x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def a(self, b, x):
        return torch.cat([self.chain(b, ["branch1x1"], x),
                          self.chain(b, ["branch5x5_1", "branch5x5_2"], x),
                          self.chain(b, ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"], x),
                          self.chain(b, ["branch_pool"], self.average(x))], 1)

    def b(self, b, x):
        halve = {"stride": 2, "padding": 0}
        return torch.cat([self.chain(b, ["branch3x3"], x, **halve),
                          self.chain(b, ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"], x, **halve),
                          F.max_pool2d(x, 3, 2)], 1)

    def c(self, b, x):
        return torch.cat([self.chain(b, ["branch1x1"], x),
                          self.chain(b, [f"branch7x7_{i}" for i in (1, 2, 3)], x),
                          self.chain(b, [f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)], x),
                          self.chain(b, ["branch_pool"], self.average(x))], 1)

    def d(self, b, x):
        halve = {"stride": 2, "padding": 0}
        return torch.cat([self.chain(b, ["branch3x3_1", "branch3x3_2"], x, **halve),
                          self.chain(b, [f"branch7x7x3_{i}" for i in (1, 2, 3, 4)], x, **halve),
                          F.max_pool2d(x, 3, 2)], 1)

    def e(self, b, x, maximum):
        three = self.chain(b, ["branch3x3_1"], x)
        double = self.chain(b, ["branch3x3dbl_1", "branch3x3dbl_2"], x)
        pooled = F.max_pool2d(x, 3, 1, 1) if maximum else self.average(x)
        return torch.cat([self.chain(b, ["branch1x1"], x),
                          self.chain(b, ["branch3x3_2a"], three), self.chain(b, ["branch3x3_2b"], three),
                          self.chain(b, ["branch3x3dbl_3a"], double), self.chain(b, ["branch3x3dbl_3b"], double),
                          self.chain(b, ["branch_pool"], pooled)], 1)

    @torch.no_grad()
    def features(self, images, adm=False, dtype=torch.float32):
        """images: uint8 [N,H,W,3]. Returns pool [N,D] and spatial [N,17*17*7] as ADM orders them."""
        x = prepare(images, adm).to(dtype)
        x = self.conv("Conv2d_1a_3x3", x, stride=2, padding=0)
        x = self.conv("Conv2d_2a_3x3", x, padding=0)
        x = F.max_pool2d(self.conv("Conv2d_2b_3x3", x, padding=1), 3, 2)
        x = self.conv("Conv2d_3b_1x1", x)
        x = F.max_pool2d(self.conv("Conv2d_4a_3x3", x, padding=0), 3, 2)
        for name in ("5b", "5c", "5d"):
            x = self.a(f"Mixed_{name}", x)
        x = self.b("Mixed_6a", x)
        for name in ("6b", "6c", "6d", "6e"):
            x = self.c(f"Mixed_{name}", x)
            if name == "6d":
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        x = self.d("Mixed_7a", x)
        x = self.e("Mixed_7b", x, False)
        x = self.e("Mixed_7c", x, True)
        return x.mean((2, 3)).numpy(), spatial.numpy()


def prepare(images, adm):
    if not adm:
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        return 2 * F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", align_corners=False) - 1
    x = images.astype(np.float32)  # TensorFlow 1: corners correspond
    for axis in (1, 2):
        length = x.shape[axis]
        at = np.arange(SIDE, dtype=np.float32) * np.float32(length / SIDE)
        first = at.astype(int)
        second = np.minimum(first + 1, length - 1)
        w = (at - first).reshape([-1 if i == axis else 1 for i in range(4)]).astype(np.float32)
        x = x.take(first, axis) * (1 - w) + x.take(second, axis) * w
    return torch.from_numpy((x - 128) / 128).permute(0, 3, 1, 2)


def widths(divide, least):
    return lambda full: max(full // divide, least)


# output channels by name, as published
SHAPES = {"Conv2d_1a_3x3": (32, 3, 3), "Conv2d_2a_3x3": (32, 3, 3), "Conv2d_2b_3x3": (64, 3, 3),
          "Conv2d_3b_1x1": (80, 1, 1), "Conv2d_4a_3x3": (192, 3, 3)}
for _b, _pool in (("5b", 32), ("5c", 64), ("5d", 64)):
    SHAPES |= {f"Mixed_{_b}.{k}": v for k, v in {
        "branch1x1": (64, 1, 1), "branch5x5_1": (48, 1, 1), "branch5x5_2": (64, 5, 5),
        "branch3x3dbl_1": (64, 1, 1), "branch3x3dbl_2": (96, 3, 3), "branch3x3dbl_3": (96, 3, 3),
        "branch_pool": (_pool, 1, 1)}.items()}
SHAPES |= {f"Mixed_6a.{k}": v for k, v in {
    "branch3x3": (384, 3, 3), "branch3x3dbl_1": (64, 1, 1), "branch3x3dbl_2": (96, 3, 3),
    "branch3x3dbl_3": (96, 3, 3)}.items()}
for _b, _w in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
    SHAPES |= {f"Mixed_{_b}.{k}": v for k, v in {
        "branch1x1": (192, 1, 1), "branch7x7_1": (_w, 1, 1), "branch7x7_2": (_w, 1, 7),
        "branch7x7_3": (192, 7, 1), "branch7x7dbl_1": (_w, 1, 1), "branch7x7dbl_2": (_w, 7, 1),
        "branch7x7dbl_3": (_w, 1, 7), "branch7x7dbl_4": (_w, 7, 1), "branch7x7dbl_5": (192, 1, 7),
        "branch_pool": (192, 1, 1)}.items()}
SHAPES |= {f"Mixed_7a.{k}": v for k, v in {
    "branch3x3_1": (192, 1, 1), "branch3x3_2": (320, 3, 3), "branch7x7x3_1": (192, 1, 1),
    "branch7x7x3_2": (192, 1, 7), "branch7x7x3_3": (192, 7, 1), "branch7x7x3_4": (192, 3, 3)}.items()}
for _b in ("7b", "7c"):
    SHAPES |= {f"Mixed_{_b}.{k}": v for k, v in {
        "branch1x1": (320, 1, 1), "branch3x3_1": (384, 1, 1), "branch3x3_2a": (384, 1, 3),
        "branch3x3_2b": (384, 3, 1), "branch3x3dbl_1": (448, 1, 1), "branch3x3dbl_2": (384, 3, 3),
        "branch3x3dbl_3a": (384, 1, 3), "branch3x3dbl_3b": (384, 3, 1), "branch_pool": (192, 1, 1)}.items()}

INPUT_OF_CHAIN = {"1x1": 0, "pool": 0}


def random_state(seed, narrow=lambda n: n, classes=1008):
    """Weights that keep activations in range and features spread, of any widths."""
    g = torch.Generator().manual_seed(seed)
    state, width, block, inside, out = {}, 3, "", 3, 0
    for name, (channels, kh, kw) in SHAPES.items():
        b, _, branch = name.rpartition(".")
        if b != block:  # the output of the block before
            if b and not block:
                inside = width
            elif block:
                inside = out + (inside if block in ("Mixed_6a", "Mixed_7a") else 0)
            block, out = b, 0
        first = branch.endswith("_1") or branch in ("branch1x1", "branch_pool", "branch3x3")
        given = width if not b else inside if first else split if branch.endswith("b") else width
        channels = narrow(channels)
        fan = given * kh * kw
        state[f"{name}.conv.weight"] = torch.randn(channels, given, kh, kw, generator=g) * (2 / fan) ** 0.5
        state[f"{name}.bn.weight"] = 0.8 + 0.4 * torch.rand(channels, generator=g)
        state[f"{name}.bn.bias"] = 0.4 * torch.randn(channels, generator=g)
        state[f"{name}.bn.running_mean"] = 0.2 * torch.randn(channels, generator=g)
        state[f"{name}.bn.running_var"] = 0.6 + 0.8 * torch.rand(channels, generator=g)
        state[f"{name}.bn.num_batches_tracked"] = torch.tensor(1)
        if branch.endswith("a"):
            split = given  # the sibling reads the same
        width = channels
        last = branch in ("branch1x1", "branch_pool", "branch5x5_2", "branch3x3dbl_3", "branch7x7_3",
                          "branch7x7dbl_5", "branch3x3", "branch3x3_2", "branch7x7x3_4") or branch[-1] in "ab"
        out += channels if b and last else 0
    state["fc.weight"] = torch.randn(classes, out, generator=g) * 2 / out ** 0.5
    state["fc.bias"] = torch.randn(classes, generator=g)
    return state


# ---- figures -------------------------------------------------------------------------------------------------------

def statistics(features):
    return features.mean(0), np.cov(features, rowvar=False)


def frechet(one, two, eps=1e-6):
    """As pytorch-fid and ADM do it."""
    from scipy import linalg

    (m1, s1), (m2, s2) = one, two
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = linalg.sqrtm(s1 @ s2)
        if not np.isfinite(root).all():
            offset = np.eye(len(s1)) * eps
            root = linalg.sqrtm((s1 + offset) @ (s2 + offset))
    return float(((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.trace(root.real))


def inception_score(pool, class_weight, split=5000):
    logits = pool.astype(np.float64) @ class_weight.astype(np.float64).T
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    scores = []
    for i in range(0, len(p), split):
        part = p[i:i + split]
        with np.errstate(divide="ignore", invalid="ignore"):
            kl = np.nan_to_num(part * (np.log(part) - np.log(part.mean(0, keepdims=True))))
        scores.append(np.exp(kl.sum(1).mean()))
    return float(np.mean(scores))


def distances(a, b, half=False):
    """Squared. half: in float16, as ADM's evaluator does where nothing overflows."""
    t = np.float16 if half else np.float64
    a, b = a.astype(t), b.astype(t)
    d = (a * a).sum(1)[:, None] - 2 * (a.astype(np.float32) @ b.astype(np.float32).T if half else a @ b.T).astype(t)
    return np.maximum(d + (b * b).sum(1)[None], 0)


def precision_recall(reference, samples, half=False, k=3):
    def radii(x):
        return np.partition(distances(x, x, half), k, 1)[:, k]
    d = distances(reference, samples, half)
    precision = (d <= radii(reference)[:, None]).any(0).mean()
    recall = (d <= radii(samples)[None]).any(1).mean()
    return float(precision), float(recall)
