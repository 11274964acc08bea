"""Writes the .pt files that tests/torch_test.c reads: python3 make_torch.py

small.pt (zip form) and small_old.pth (the form before 1.6): every type, views, shared storages, and beside the
tensors what training scripts put there. s_qkv.pt and xl_wqkv_old.pth: the golden models in float16 and in both forms,
the first as published (ema, model, args), the second as the bare dict. evil.pt: what a hostile file would call.
small64.pt: small.pt with the 64-bit zip records that files over 4 GB have. expanded.pt: 4 TB of elements, one stored.
"""
import argparse
import collections
import os
import zipfile

import numpy as np
import torch
from safetensors.torch import load_file

HERE = os.path.dirname(os.path.abspath(__file__))


def at(name):
    return os.path.join(HERE, name)


def small():
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6) * 0.5 - 3
    sd = collections.OrderedDict()
    sd["f32"] = base
    sd["transposed"] = base.t()
    sd["part"] = base[1:3, 1::2]
    sd["f16"] = base.half()
    sd["bf16"] = base.bfloat16()
    sd["f64"] = base.double()
    sd["i64"] = torch.arange(-2, 3) * 5000000000
    sd["i32"] = torch.arange(4, dtype=torch.int32)
    sd["bool"] = torch.tensor([True, False])
    sd["empty"] = torch.zeros(0, 4)
    sd["one"] = torch.tensor(7.0)
    sd["parameter"] = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    sd._metadata = collections.OrderedDict([("", {"version": 1})])
    args = argparse.Namespace(lr=1e-4, model="x", ema=None, sizes=[1, 2], big=2**90, flag=True)
    return {"model": {"f32": base + 1}, "ema": sd, "args": args, "loss": np.float64(1.5), "step": np.int64(7),
            "opt": {"state": {0: {"step": torch.tensor(1.0)}}, "betas": (0.9, 0.999), "shape": torch.Size([2, 3])}}


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def golden(name):
    tensors = load_file(at(f"../golden/{name}/model.safetensors"))
    return collections.OrderedDict((k, v.half()) for k, v in tensors.items())


torch.save(small(), at("small.pt"))
torch.save(small(), at("small_old.pth"), _use_new_zipfile_serialization=False)
weights = golden("s_qkv")
torch.save({"model": weights, "ema": weights, "args": argparse.Namespace(image_size=32)}, at("s_qkv.pt"))
torch.save(golden("xl_wqkv"), at("xl_wqkv_old.pth"), _use_new_zipfile_serialization=False)
torch.save({"ema": Evil()}, at("evil.pt"))
torch.save({"model": {"wide": torch.zeros(1).expand(1 << 40)}}, at("expanded.pt"))

zipfile.ZIP64_LIMIT = 0
with zipfile.ZipFile(at("small.pt")) as old, zipfile.ZipFile(at("small64.pt"), "w") as new:
    for entry in old.infolist():
        with new.open(entry.filename, "w", force_zip64=True) as f:
            f.write(old.read(entry))
