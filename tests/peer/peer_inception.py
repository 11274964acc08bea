"""Times FID's Inception v3 in PyTorch on a GPU, for `ditmoe bench inception --compare OUT.json`.

    peer_inception.py OUT.json [--eager] [--f32] [BATCH ...]        default: bf16, 32 128

The fastest of: torchvision's module where it is installed (eager), the same layers with normalisation folded into the
convolutions (eager, in PyTorch's usual memory order and in channels_last), and that compiled (torch.compile,
max-autotune-no-cudagraphs; not with `--eager`). Random weights; input of 299 x 299 on the device. timing.py says how. `--check` compares the folded network with pytorch-fid's formulas on the CPU.
"""
import os
import sys

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "eval"))
import inception_reference  # noqa: E402
import timing  # noqa: E402


class Folded(nn.Module):
    """The network of inception_reference.py as users who care for speed would have it."""

    def __init__(self, state):
        super().__init__()
        for name in inception_reference.SHAPES:
            s = {k: state[f"{name}.{k}"] for k in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean",
                                                  "bn.running_var")}
            scale = s["bn.weight"] / (s["bn.running_var"] + 0.001).sqrt()
            key = name.replace(".", "_")
            self.register_buffer(f"{key}_w", s["conv.weight"] * scale[:, None, None, None])
            self.register_buffer(f"{key}_b", s["bn.bias"] - s["bn.running_mean"] * scale)

    def conv(self, name, x, stride=1, padding=None):
        key = name.replace(".", "_")
        w = getattr(self, f"{key}_w")
        padding = inception_reference.PAD[tuple(w.shape[2:])] if padding is None else padding
        return F.relu_(F.conv2d(x, w, getattr(self, f"{key}_b"), stride, padding))

    def chain(self, block, names, x, **last):
        for i, name in enumerate(names):
            square = getattr(self, f"{block}_{name}_w").shape[2:] == (3, 3)
            x = self.conv(f"{block}.{name}", x, **(last if last and i == len(names) - 1
                                                   else {"padding": 1} if square else {}))
        return x

    average = inception_reference.Inception.average
    a, b, c = (getattr(inception_reference.Inception, k) for k in "abc")
    d, e = inception_reference.Inception.d, inception_reference.Inception.e

    def forward(self, x):
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
        x = self.d("Mixed_7a", x)
        x = self.e("Mixed_7b", x, False)
        return self.e("Mixed_7c", x, True).mean((2, 3))


def check():
    state = inception_reference.random_state(1)
    import numpy as np
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    want = inception_reference.Inception(state).features(images)[0]
    with torch.no_grad():
        got = Folded(state)(inception_reference.prepare(images, False)).numpy()
    print("largest difference", abs(want - got).max(), "of", abs(want).max())


def ways(dtype, compiled):
    """For timing.py; the slow one to make last."""
    try:
        import torchvision
        model = torchvision.models.inception_v3(weights=None, init_weights=False, aux_logits=False)
        model.fc = nn.Identity()
        yield "torchvision, eager", model.cuda().to(dtype).eval(), torch.contiguous_format
    except ImportError:
        pass
    model = Folded(inception_reference.random_state(1)).cuda().to(dtype).eval()
    yield "plain torch, folded, eager", model, torch.contiguous_format
    model = model.to(memory_format=torch.channels_last)
    yield "plain torch, folded, eager, channels_last", model, torch.channels_last
    if compiled:
        yield ("plain torch, folded, compiled, channels_last", torch.compile(model, mode="max-autotune-no-cudagraphs"),
               torch.channels_last)


def main():
    f32 = "--f32" in sys.argv
    out, *batches = [a for a in sys.argv[1:] if not a.startswith("--")]
    dtype = torch.float32 if f32 else torch.bfloat16
    cases = {}
    for batch in map(int, batches or ("32", "128")):
        cases[batch] = (torch.randn(batch, 3, 299, 299, device="cuda", dtype=dtype),
                        {"bench": "inception", "name": "Inception v3, FID's", "type": "f32" if f32 else "bf16", "batch": batch})
    timing.time_ways(out, ways(dtype, "--eager" not in sys.argv), cases)


if __name__ == "__main__":
    check() if sys.argv[1:] == ["--check"] else main()
