"""Writes small good files for the fuzzers to start from: python3 make_corpus.py

Beside them in corpus/NAME lie cases that were found (their names say what they did).
"""
import argparse
import collections
import gzip
import io
import json
import os
import pickle
import struct

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

HERE = os.path.dirname(os.path.abspath(__file__))


def put(target, name, data):
    path = os.path.join(HERE, "corpus", target, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as f:
        f.write(data)


def torch_bytes(value, zipped=True):
    f = io.BytesIO()
    torch.save(value, f, _use_new_zipfile_serialization=zipped)
    return f.getvalue()


base = torch.arange(6, dtype=torch.float32).reshape(2, 3)
weights = collections.OrderedDict(a=base, t=base.t(), h=base.half(), i=torch.arange(3), e=torch.zeros(0, 2))
value = {"model": weights, "ema": {"a": base}, "args": argparse.Namespace(lr=1e-4, sizes=[1, 2]),
         "step": np.int64(3), "ditmoe.config": "{}"}
put("torch", "zip", torch_bytes(value))
put("torch", "old", torch_bytes(value, False))
put("torch", "bare", torch_bytes({"w": torch.ones(2, dtype=torch.bfloat16)}))
for protocol in (2, 4):
    plain = {"a": [1, 2.5, None, True, "text", b"bytes", 2**70, (1, 2), {}], "model": {"b": -3}, "self": collections.OrderedDict(x=1)}
    put("pickle", f"plain{protocol}", pickle.dumps(plain, protocol))
import zipfile  # noqa: E402
archive = zipfile.ZipFile(io.BytesIO(torch_bytes(value)))
put("pickle", "tensors", archive.read([n for n in archive.namelist() if n.endswith("data.pkl")][0]))

put("safetensors", "types", save({"f": base, "b": base.bfloat16(), "i": torch.arange(3), "e": torch.zeros(0, 2)}, {"k": "v"}))
put("safetensors", "none", save({}))
put("index", "missing", json.dumps({"metadata": {}, "weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}).encode())
put("index", "itself", json.dumps({"weight_map": {"a": "file.index.json"}}).encode())
put("index", "up", json.dumps({"weight_map": {"a": "../x"}}).encode())
config = dict(layers=1, hidden=8, heads=2, patch=2, channels=1, size=4, classes=3, experts=2, topk=1, shared=0, moe="all",
              qk_norm=False, learn_sigma=True, renormalise=False, balance_per_sequence=False, balance=0.01,
              class_dropout=0.1, diffusion="rf", expert="gelu")
put("checkpoint", "config", json.dumps(config).encode())
put("checkpoint", "run", json.dumps(dict(step=3, applied=3, skipped=0, seed="1", cursor="12", batch=4, accumulate=1)).encode())
for name, save_as in (("stored", np.savez), ("deflated", np.savez_compressed)):
    f = io.BytesIO()
    save_as(f, np.arange(6).reshape(2, 3), mu=np.ones(4), sigma=np.eye(3, dtype=np.float32), a=np.zeros((2, 2, 1), np.uint8))
    put("npz", name, f.getvalue())

rng = np.random.default_rng(1)
pixels = rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)
rgb, grey = Image.fromarray(pixels), Image.fromarray(pixels[..., 0])
for name, image, options in (("rgb", rgb, {}), ("grey", grey, {}), ("palette", rgb.quantize(5), {}), ("bit", grey.convert("1"), {}),
                             ("alpha", rgb.convert("RGBA"), {}), ("deep", Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), {})):
    f = io.BytesIO()
    image.save(f, "PNG", **options)
    put("png", name, f.getvalue())
for name, image, options in (("rgb", rgb, {}), ("grey", grey, {}), ("progressive", rgb, dict(progressive=True)),
                             ("cmyk", rgb.convert("CMYK"), {}), ("restart", rgb, dict(subsampling=2, restart_marker_blocks=1))):
    f = io.BytesIO()
    image.save(f, "JPEG", quality=60, **options)
    put("jpeg", name, f.getvalue())
images = struct.pack(">IIII", 0x803, 2, 3, 4) + bytes(range(24))
labels = struct.pack(">II", 0x801, 2) + bytes([1, 9])
put("idx", "plain", struct.pack(">H", len(images)) + images + labels)
packed = gzip.compress(images, mtime=0)
put("idx", "gzip", struct.pack(">H", len(packed)) + packed + gzip.compress(labels, mtime=0))
