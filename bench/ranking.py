# SPDX-License-Identifier: Apache-2.0
"""The ranking cases and what they are measured against.

sort       torch.sort of the row alone (spearman: of both rows), with a backward that does nothing: a floor, not a rival
torchsort  the package, where it is installed; half inputs as a float32 copy, for it ranks none of these lengths in half
eager      the obvious PyTorch: 1/2 + sum_j sigmoid((x_i - x_j) / strength), n x n, another smooth rank
reference  `kdkernels`' textbook, sequential pooling, on the small cases

One strength serves all contenders, a number: `relative` c stands for the number that c sqrt(12) / n standard deviations
are for the rows of the case, so that a part of each row pools; 1.0 is torchsort's default.
"""

from __future__ import annotations

import importlib.util
import math
from typing import NamedTuple

import torch

import kdkernels as kd

from . import data
from .case import Target

SPREAD = 4.0  # standard deviation of the regime "logits"
MOST_PAIRS = {"cpu": 2**27, "cuda": 2**31}  # entries of the n x n form


class RankCase(NamedTuple):
    name: str
    op: str
    rows: int
    n: int
    kernel: str = "l2"  # the regularization
    relative: float | None = 1.0
    number: float = 1.0  # the strength where `relative` is None
    dtype: str = "float32"
    targets: tuple[Target, ...] = ()
    quick: bool = False
    family: str = "rank"
    regime: str = "logits"
    sigma: None = None

    @property
    def strength(self) -> float:
        return self.number if self.relative is None else self.relative * SPREAD * math.sqrt(12) / self.n

    @property
    def options(self) -> dict:
        return {"regularization_strength": self.strength, "relative": self.relative}

    @property
    def shape(self) -> dict:
        return {"rows": self.rows, "n": self.n}

    @property
    def item(self) -> int:
        return 2 if self.dtype in ("float16", "bfloat16") else 4

    def smaller(self) -> RankCase:
        return self._replace(rows=self.rows // 4, n=self.n // 4)

    def work(self, phase: str) -> tuple[int, int]:
        """Least bytes moved; the arithmetic of a sort is no floating-point work."""
        entries = self.rows * self.n
        # soft_rank: x in, rank out; upstream and x in, gradient out. spearman: both rows in, the gradient out, fused
        forward = 2 * self.item if self.op == "spearman" else self.item + 4
        backward = self.item if self.op == "spearman" else 4 + 2 * self.item
        moved = {"fwd": forward, "bwd": backward, "step": forward + backward}[phase]
        return moved * entries, 0


def draw(case: RankCase, device: str, seed: int):
    """x, and y: the teacher of spearman, the upstream gradient of the others."""
    x, y = data.features(case.rows, case.n, case.n, case.regime, seed, device)
    return x.to(getattr(torch, case.dtype)), y.to(
        getattr(torch, case.dtype) if case.op == "spearman" else torch.float32
    )


def names(case: RankCase, device: str) -> list[str]:
    found = ["sort"]
    found += ["eager"] if case.op != "soft_sort" else []  # which has no n x n form in common use
    found += ["torchsort"] if importlib.util.find_spec("torchsort") else []
    return found + (["reference"] if case.rows * case.n <= 2**12 else [])


def ours(case: RankCase, backend: str):
    """f(x, y) -> value through the public function."""
    function, how = getattr(kd, case.op), {"regularization": case.kernel, "regularization_strength": case.strength}
    if case.op == "spearman":
        return lambda x, y: function(x, y, backend=backend, **how)
    return lambda x, y: function(x, backend=backend, **how)


def reference(case: RankCase):
    return ours(case, "reference")


def contender(case: RankCase, name: str):
    return {"sort": sort, "torchsort": torchsort, "eager": eager, "reference": reference}[name](case)


class _Sorted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sort(-1).values

    @staticmethod
    def backward(ctx, grad):
        return None


def sort(case: RankCase):
    if case.op == "spearman":
        return lambda x, y: _Sorted.apply(x)[..., 0] + y.sort(-1).values[..., 0]
    return lambda x, y: _Sorted.apply(x)


def torchsort(case: RankCase):
    import torchsort

    wide = torch.promote_types(getattr(torch, case.dtype), torch.float32)
    function = torchsort.soft_sort if case.op == "soft_sort" else torchsort.soft_rank
    soft = lambda x: function(x.to(wide), case.kernel, case.strength)  # noqa: E731
    if case.op == "spearman":
        return lambda x, y: _pearson(soft(x), soft(y))
    return lambda x, y: soft(x)


def eager(case: RankCase):
    def soft(x):
        pairs = x.numel() * x.shape[-1]
        if pairs > MOST_PAIRS[x.device.type]:
            raise MemoryError(f"the n x n form would hold {pairs} entries several times")
        x = x.float()
        return 0.5 + ((x[..., :, None] - x[..., None, :]) / case.strength).sigmoid().sum(-1)

    if case.op == "spearman":
        return lambda x, y: _pearson(soft(x), soft(y))
    return lambda x, y: soft(x)


def _pearson(r, t):
    r, t = r - r.mean(-1, keepdim=True), t - t.mean(-1, keepdim=True)
    return (r * t).sum(-1) / (r.norm(dim=-1) * t.norm(dim=-1))


def cpu_cases() -> list[RankCase]:
    def case(rows, n, least, **more):
        return _case(rows, n, (Target("speed", "torchsort", least, backend="cpp"),), **more)

    return [
        case(256, 1000, 3.0, quick=True),
        case(256, 1000, 3.0, relative=None),
        case(1024, 100, 3.0),
        case(1024, 100, 3.0, relative=None),
        case(64, 21841, 2.0),
        case(8, 128256, 4.0, dtype="bfloat16"),
        case(8, 128256, 1.0),
        case(64, 32, 1.0),
        case(64, 128, 1.0),
        case(64, 1024, 1.0),
        case(64, 4096, 1.0),
        case(256, 1000, 1.0, kernel="kl"),
        case(256, 1000, 1.0, dtype="bfloat16"),
        case(256, 1000, 1.0, op="soft_sort", quick=True),
        case(256, 1000, 1.0, op="soft_sort", kernel="kl"),
        case(96, 10, 1.0, op="spearman"),
        case(256, 100, 1.0, op="spearman", quick=True),
        case(256, 1000, 1.0, op="spearman"),
    ]


def cuda_cases() -> list[RankCase]:
    def target(figure, against, bound, phase="step"):
        return Target(figure, against, bound, phase, backend="cuda")

    small = (target("speed", "torchsort", 20.0), target("launches", "launches", 3), target("graph", "empty graph", 4.0))
    large = (
        target("speed", "sort", 1 / 0.35, "fwd"),
        target("speed", "torchsort", 10.0),
        target("microseconds", "the clock", 150.0),
    )
    half = (target("speed", "sort", 1 / 0.3, "fwd"),)
    return [
        _case(8192, 1000, large, quick=True),
        _case(8192, 1000, (), kernel="kl"),
        _case(8192, 1000, (), relative=None),
        _case(8192, 1000, (target("speed", "sort", 2.0),), op="spearman"),
        *(_case(256, n, small, op=op, quick=n == 100) for op in ("soft_rank", "spearman") for n in (100, 1000)),
        _case(64, 21841, (target("speed", "sort", 1.0, "fwd"),)),
        *(_case(rows, 128256, half, dtype="bfloat16") for rows in (64, 256, 1024)),
        _case(64, 128256, ()),
        _case(8192, 32, ()),
        _case(256, 1000, (), op="soft_sort"),
        *(_case(64, n, ()) for n in (128, 1024, 4096)),
    ]


def _case(rows: int, n: int, targets, op: str = "soft_rank", **more) -> RankCase:
    words = ["ranking", op, f"{rows} x {n}", more.get("kernel"), more.get("dtype")]
    words.append("strength 1" if "relative" in more else None)
    return RankCase(" ".join(filter(None, words)), op, rows, n, targets=targets, **more)
