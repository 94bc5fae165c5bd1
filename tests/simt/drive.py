# SPDX-License-Identifier: Apache-2.0
"""Runs the emulated kernels and compares them with NumPy; imports nothing else, so it also runs under a sanitizer.

python tests/simt/drive.py FOLDER CHECK [CHECK ...]     FOLDER holds simt_kernels.so; prints what was compared
CHECK is a function below, sweep:SCHEDULE:N:OPS:COUNT:few|all:FIRST, or skip=FILE:LINE to leave a barrier out.
"""

import importlib
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import compare

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


SHARED = 227 * 1024  # bytes a block may have on sm_90


class Kernels:
    """The native schemas on NumPy arrays; results start as garbage. Half formats are uint16, and float32 when read."""

    def __init__(self, module, schedule="auto", shared=SHARED):
        self.module, self.how, self.reversed = module, (schedule, shared), False

    def _turn(self):
        """Every other call runs its blocks from the last to the first: no block may depend on another."""
        self.reversed = not self.reversed
        self.module.reverse_blocks(self.reversed)

    @staticmethod
    def _out(shape, dtype):
        work = {"float64": np.float64, "float16": np.uint16, "bfloat16": np.uint16}.get(dtype, np.float32)
        return np.full(shape, 777, work)

    @staticmethod
    def _values(out, dtype):
        if dtype == "bfloat16":
            return (out.astype(np.uint32) << 16).view(np.float32)
        return out.view(np.float16).astype(np.float32) if dtype == "float16" else out

    @staticmethod
    def _work(dtype):
        return "float64" if dtype == "float64" else "float32"

    def rank_rows(self, x, dtype, factor, strength, relative, kl, descending, need_blocks):
        rank, eps = self._out(x.shape, self._work(dtype)), np.full(len(x), 777.0)
        blocks = np.full(x.shape, -77, np.int32) if need_blocks else None
        self._turn()
        self.module.rank_rows(x, dtype, factor, strength, relative, kl, descending, rank, blocks, eps, *self.how)
        return rank, blocks if need_blocks else np.zeros(0, np.int32), eps

    def rank_rows_backward(self, grad, x, dtype, rank, blocks, eps, kl, descending):
        dx = self._out(x.shape, dtype)
        self._turn()
        self.module.rank_rows_backward(grad, rank, blocks, eps, kl, descending, dx, dtype, *self.how)
        return self._values(dx, dtype)

    def sort_rows(self, s, dtype, factor, strength, relative, kl):
        value, start, eps = (
            self._out(s.shape, self._work(dtype)),
            np.full(s.shape, -77, np.int32),
            np.full(len(s), 777.0),
        )
        self._turn()
        self.module.sort_rows(s, dtype, factor, strength, relative, kl, value, start, eps, *self.how)
        return value, start, eps

    def sort_rows_backward(self, grad, s, dtype, start, kl):
        ds = self._out(s.shape, dtype)
        self._turn()
        self.module.sort_rows_backward(grad, s, start, kl, ds, dtype, *self.how)
        return self._values(ds, dtype)

    def spearman_rows(self, x, y, dtype, strength, relative, kl, hard, grad_x, grad_y, wide=False):
        work = "float64" if wide else self._work(dtype)
        value = self._out(len(x), work)
        dx, dy = (self._out(x.shape, work) if asked else None for asked in (grad_x, grad_y))
        self._turn()
        self.module.spearman_rows(x, y, dtype, strength, relative, kl, hard, value, dx, dy, *self.how)
        return value, *(np.zeros(0) if d is None else d for d in (dx, dy))


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


# (strength, relative, kl): hard limit, one block, in between, far apart exponents, hard ranks
STRENGTHS = [
    (0.1, False, False),
    (0.01, False, True),
    (1.0, True, False),
    (1e-9, False, False),
    (1e3, False, True),
    (0.0, False, False),
    (1e3, False, False),
    (1.0, True, True),
    (1e-9, False, True),
    (1.0, False, False),
    (0.0, False, True),
]
DTYPES = ["float32", "float16", "float64", "bfloat16"]
# for schedules with many threads: one row of each kind that takes another way through the kernels
FEW = ["random", "nan", "ties", "outlier", "masked", "absent", "constant", "convex"]


def sweep(module, schedule: str, n: int, ops: str, count: int, few: bool, first: int = 0):
    """`count` settings, starting with number `first`, of ranks (r), sorts (s) and Spearman (p) of one row length.

    11 strengths and 4 dtypes: 44 settings before one returns.
    """
    kernels, names = Kernels(module, schedule), FEW if few else None
    for i in range(first, first + count):
        (strength, relative, kl), dtype = STRENGTHS[i % len(STRENGTHS)], DTYPES[i % len(DTYPES)]
        factor = [None, "rows", 1.5][i % 3]
        common = {"seed": i, "names": names, "twice": i == first}
        if "r" in ops:
            setting = (n, dtype, strength, relative, kl, i % 2 == 1, factor)
            compare.compare_rank(kernels, *setting, **common)
        if "s" in ops and strength > 0:
            compare.compare_sort(kernels, n, dtype, strength, relative, kl, factor, **common)
        if "p" in ops and strength > 0:
            compare.compare_spearman(kernels, n, dtype, strength, relative, kl, i % 4 == 1, **common)


if __name__ == "__main__":
    module = load(sys.argv[1])
    for name in sys.argv[2:]:
        if name.startswith("skip="):
            module.skip_barrier(name[5:])
        elif name.startswith("sweep:"):
            schedule, n, ops, count, few, first = name.split(":")[1:]
            sweep(module, schedule, int(n), ops, int(count), few == "few", int(first))
        else:
            CHECKS[name](module)
        print(name, "agrees")
