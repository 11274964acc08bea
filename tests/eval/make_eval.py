#!/usr/bin/env python3
"""Makes the files of tests/eval/ (torch, numpy, scipy, Pillow; Fashion-MNIST): .npz archives as numpy writes
them, a Frechet distance as scipy's matrix root gives it, and a narrow Inception with random weights, images,
and what comes of them. Run in tests/eval/."""
import gzip
import io
import warnings
import zipfile

import numpy as np
import torch
from scipy import linalg

from inception_reference import (Inception, frechet, inception_score, precision_recall, random_state,
                                 statistics)

rng = np.random.default_rng(4)


def archives():
    images = (np.arange(7 * 6 * 5 * 3) * 37 % 251).astype(np.uint8).reshape(7, 6, 5, 3)
    np.savez_compressed("deflated.npz", arr_0=images, arr_1=np.arange(7))
    np.savez("stored.npz", arr_0=images, half=np.float16([0.5, -2]), one=np.float64(7),
             columns=np.asfortranarray(np.arange(6.0).reshape(2, 3)))
    with zipfile.ZipFile("version2.npz", "w") as z:
        for version in ((2, 0), (3, 0)):
            with io.BytesIO() as f:
                np.lib.format.write_array(f, np.arange(5, dtype=np.float32), version=version)
                z.writestr(f"v{version[0]}.npy", f.getvalue())
    with zipfile.ZipFile("objects.npz", "w") as z:  # a pickle inside: refused, never loaded
        with io.BytesIO() as f:
            np.lib.format.write_array(f, np.array([{"a": 1}], dtype=object))
            z.writestr("arr_0.npy", f.getvalue())


def singular():
    """Of 60 and of 15 vectors of 20 features: the second covariance is singular."""
    a = rng.normal(size=(60, 20)) @ rng.normal(size=(20, 20)) + 1
    b = rng.normal(size=(15, 20)) @ rng.normal(size=(20, 20))
    m1, s1, m2, s2 = a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distance = frechet((m1, s1), (m2, s2))
    np.savez_compressed("frechet.npz", a=a, b=b, distance=np.float64([distance]),
                        mu=m1, sigma=s1.astype(np.float32), mu_s=m2, sigma_s=s2)


def fashion(count):
    with gzip.open("/usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz") as f:
        pixels = np.frombuffer(f.read()[16:16 + count * 784], np.uint8).reshape(count, 28, 28)
    images = np.repeat(pixels[:, 2:-2, ::-1, None], 3, 3)  # 24 x 28, with some colour
    for i, image in enumerate(images):
        image[:, :, i % 3] //= 2
    return images


def wide_image():
    """More than twice 299 pixels wide: the program brings only some of them to the device."""
    y, x, c = np.mgrid[0:40, 0:700, 0:3]
    return ((x * 3 + y * 5 + c * 70) % 256).astype(np.uint8)


def inception():
    state = {k: v.half() for k, v in random_state(2, lambda n: max(n // 32, 2), 10).items()
             if not k.endswith("tracked")}
    network = Inception({k: v.double() for k, v in state.items()})
    images = fashion(44)
    reference, samples = images[:26], images[26:]
    np.savez_compressed("reference.npz", arr_0=reference)
    np.savez_compressed("samples.npz", arr_0=samples)
    pool = network.features(samples, False, torch.float64)[0]
    classes = torch.randn(10, pool.shape[1], generator=torch.Generator().manual_seed(3)).double().numpy()
    classes -= np.outer(classes @ pool.mean(0) / (pool.mean(0) @ pool.mean(0)), pool.mean(0))
    classes *= 1.5 / (pool @ classes.T).std()  # such features hardly differ: so that classes do
    state["fc.weight"] = torch.from_numpy(classes).half()
    torch.save(state, "narrow.pth", _use_new_zipfile_serialization=False)
    expect = {}
    for way in ("pytorch", "adm"):
        ref, got = (network.features(x, way == "adm", torch.float64) for x in (reference, samples))
        wide = network.features(wide_image()[None], way == "adm", torch.float64)
        expect[f"pool_{way}"] = np.concatenate([got[0][:2], wide[0]])
        expect[f"spatial_{way}"] = np.concatenate([got[1][:2], wide[1]]).astype(np.float32)
        expect[f"figures_{way}"] = np.array([
            frechet(statistics(ref[0]), statistics(got[0])), frechet(statistics(ref[1]), statistics(got[1])),
            inception_score(got[0], state["fc.weight"].double().numpy()), *precision_recall(ref[0], got[0])])
        print(way, expect[f"figures_{way}"])
    np.savez_compressed("expect.npz", **expect)


archives()
singular()
inception()
