#!/usr/bin/env python3
"""Makes the files of tests/eval/ (numpy, scipy): .npz archives as numpy writes them, and a Frechet
distance as scipy's matrix root gives it. Run in tests/eval/."""
import io
import warnings
import zipfile

import numpy as np
from scipy import linalg

rng = np.random.default_rng(4)


def frechet(m1, s1, m2, s2):
    root = linalg.sqrtm(s1 @ s2)
    return float(((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.trace(root).real)


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


def statistics():
    """Of 60 and of 15 vectors of 20 features: the second covariance is singular."""
    a = rng.normal(size=(60, 20)) @ rng.normal(size=(20, 20)) + 1
    b = rng.normal(size=(15, 20)) @ rng.normal(size=(20, 20))
    m1, s1, m2, s2 = a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distance = frechet(m1, s1, m2, s2)
    np.savez_compressed("frechet.npz", a=a, b=b, distance=np.float64([distance]),
                        mu=m1, sigma=s1.astype(np.float32), mu_s=m2, sigma_s=s2)


archives()
statistics()
