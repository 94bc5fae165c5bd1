# SPDX-License-Identifier: Apache-2.0
"""Runs the emulated kernels and compares them with NumPy; imports nothing else, so it also runs under a sanitizer.

python tests/simt/drive.py FOLDER CHECK [CHECK ...]     FOLDER holds simt_kernels.so; prints what was compared
"""

import importlib
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def load(folder):
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("simt_kernels")
    finally:
        sys.path.pop(0)


def planted(kernels, plant: str, threads: int = 64, n: int = 1000):
    """The largest error of the planted kernel over a few rows; NaN where a result is missing."""
    x = np.random.default_rng(0).standard_normal((3, n)).astype(np.float32)
    total, largest = np.full(3, np.nan), np.full(3, np.nan, np.float32)
    kernels.planted(plant, x, total, largest, threads)
    return max(np.abs(total - x.sum(1, dtype=np.float64)).max(), np.abs(largest - x.max(1)).max())


@check
def clean(kernels):
    for threads in (32, 48, 128):
        assert planted(kernels, "none", threads) < 1e-10


@check
def no_barrier(kernels):
    planted(kernels, "no_barrier")


@check
def out_of_bounds(kernels):
    planted(kernels, "out_of_bounds")


@check
def primitives(kernels, early: int = 0):
    """Votes, shuffles, reductions and atomics of two warps, the last `early` threads gone before."""
    rng = np.random.default_rng(early)
    x = rng.integers(-3, 9, 64).astype(np.int32)
    out = np.zeros((21, 64), np.int64)
    kernels.primitives(x, out, early)
    live = 64 - early
    total = int(x[:live].sum())
    bits = int(np.bitwise_or.reduce(np.uint32(1) << (x[:live] & 31).astype(np.uint32)))
    for t in range(live):
        lane, first = t % 32, t - t % 32
        v = x[first : min(first + 32, live)]
        half = first + lane // 16 * 16
        turned = int(x[half]) + (0 if lane < 16 else 0 + 1 + 2)
        expected = [
            sum(int(u > 0) << i for i, u in enumerate(v)),
            int((v == 7).any()),
            int((v >= 0).all()),
            int(v.sum()),
            int(v.max()),
            int(v.min()),
            sum(int(u == x[t]) << i for i, u in enumerate(v)),
            turned,
            2 * int(x[t - 1] if lane else x[t]),
            total,
            bits,
            int((x[:live] > 0).sum()),
            int((x[:live] == 7).any()),
            int((x[:live] >= 0).all()),
        ]
        assert out[: len(expected), t].tolist() == expected, (t, out[: len(expected), t].tolist(), expected)
    assert out[20, 0] == x[:live].max() + 100


@check
def primitives_with_early_exits(kernels):
    for early in (1, 31, 32, 33, 63):
        primitives(kernels, early)


if __name__ == "__main__":
    module = load(sys.argv[1])
    for name in sys.argv[2:]:
        CHECKS[name](module)
        print(name, "agrees")
