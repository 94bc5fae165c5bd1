# SPDX-License-Identifier: Apache-2.0
"""The Nystrom cases and what they are measured against.

eager      as one writes it from the formula, in float32: cdist, exp, Cholesky, triangular solve; for CKA and transfer
           the n x n matrices Phi Phi' of both sides and their sums, left out where they would not fit
algebra    m x m products of the features, which autograd keeps: the features of both sides stay in memory
compiled   torch.compile of `algebra`, on CUDA or on request

The landmarks are constants of the case; the gradient is that of the student (or x) alone. nystrom_features gets the
second input as its upstream gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

import kdkernels as kd
from kdkernels.nystrom import spec

from .case import Target

JITTER = 1e-6
MOST_ROWS = 16384  # of an n x n contender
FEATURES = "nystrom_features"


class NystromCase(NamedTuple):
    name: str
    op: str
    n: int
    p: int
    m: int
    dtype: str = "float32"
    targets: tuple[Target, ...] = ()
    quick: bool = False
    kernel: str = "rbf"
    family: str = "nystrom"
    regime: str = "randn"
    sigma: str = "number"
    options: dict = {}

    @property
    def rows(self) -> int:
        return self.n

    @property
    def shape(self) -> dict:
        return {"n": self.n, "p": self.p, "m": self.m}

    @property
    def item(self) -> int:
        return 2 if self.dtype in ("float16", "bfloat16") else 4

    @property
    def bandwidth(self) -> float:
        """About the median distance of standard normal rows."""
        return (2.0 * self.p) ** 0.5

    def smaller(self) -> NystromCase:
        return self._replace(n=self.n // 8, m=min(self.m, 64))

    def work(self, phase: str) -> tuple[int, int]:
        """Least bytes moved and floating-point operations where the features of the forward pass are at hand again."""
        n, p, m = self.shape.values()
        back = n * m * m + 2 * n * m * p  # the solve of the gradient, and what it gives x
        if self.op == FEATURES:
            moved = [spec.bytes_moved(n, p, m, self.item, step) for step in (False, True)]
            flops = [spec.flops(n, p, m), spec.flops(n, p, m) + back]
        else:
            # both sides are read; three products of features, then two that turn them into a gradient
            moved = [2 * n * p * self.item, 3 * n * p * self.item]
            forward = 2 * spec.flops(n, p, m) + 6 * n * m * m
            flops = [forward, forward + 4 * n * m * m + back]
        if phase == "bwd":
            return moved[1] - moved[0], flops[1] - flops[0]
        return (moved[0], flops[0]) if phase == "fwd" else (moved[1], flops[1])


def draw(case: NystromCase, device: str, seed: int):
    """(x, y), y half like x; for the features (x, an upstream gradient)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(case.n, case.p, generator=generator)
    y = torch.randn(case.n, case.m if case.op == FEATURES else case.p, generator=generator)
    pair = (x, y if case.op == FEATURES else (x + y) / 2)
    return tuple(t.to(device, getattr(torch, case.dtype)) for t in pair)


def names(case: NystromCase, device: str, compiled: bool) -> list[str]:
    square = ["eager"] if case.n <= MOST_ROWS or case.op == FEATURES else []
    return [*square, *(["algebra"] if case.op != FEATURES else []), *(["compiled"] if compiled else [])]


def _with_landmarks(case: NystromCase, function):
    """function(x, y, landmarks of x, of y), drawn as the rows are, made once on the device of the first call."""
    known = {}

    def call(x, y):
        if x.device not in known:
            generator = torch.Generator().manual_seed(1)
            both = torch.randn(2, case.m, case.p, generator=generator)
            known[x.device] = (both[0].to(x), (both.sum(0) / 2).to(x))
        return function(x, y, *known[x.device])

    return call


def ours(case: NystromCase, backend: str):
    """f(x, y) -> value through the public function."""
    how = {"kernel": kd.RBF(case.bandwidth), "jitter": JITTER, "backend": backend}
    if case.op == FEATURES:
        return _with_landmarks(case, lambda x, y, zx, zy: kd.nystrom_features(x, zx, **how))
    return _with_landmarks(case, lambda *a: getattr(kd, case.op)(*a, **how))


def contender(case: NystromCase, name: str):
    if name == "compiled":
        plain = _PLAIN[case.op]["eager" if case.op == FEATURES else "algebra"]
        return torch.compile(_with_landmarks(case, plain(case)), dynamic=False)
    return _with_landmarks(case, _PLAIN[case.op][name](case))


def _features(case, x, z):
    def kernel(a, b):
        return torch.exp(torch.cdist(a, b).square() / (-2 * case.bandwidth**2))

    z = z.float()
    W = kernel(z, z) + JITTER * torch.eye(len(z), device=z.device)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(W).mT, kernel(x.float(), z), upper=True, left=False)


def _pairs(statistic):
    """f(x, y) -> value of a case, from a statistic of the features of both sides."""
    return lambda case: lambda x, y, zx, zy: statistic(_features(case, x, zx), _features(case, y, zy))


def _square_cka(a, b):
    def hsic(K, L):
        n = len(K)
        K, L = K - K.diagonal().diag(), L - L.diagonal().diag()
        return (K * L).sum() + K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (K.sum(0) @ L.sum(0))

    K, L = a @ a.mT, b @ b.mT
    return hsic(K, L) / (hsic(K, K) * hsic(L, L)).sqrt()


def _thin_cka(a, b):
    """HSIC_1 of Phi Phi' without it: centred features, less the diagonal."""

    def hsic(a, b):
        n, k, l = len(a), a.square().sum(1), b.square().sum(1)
        return (a.mT @ b).square().sum() - n / (n - 2) * (k @ l) + k.sum() * l.sum() / ((n - 1) * (n - 2))

    a, b = a - a.mean(0), b - b.mean(0)
    return hsic(a, b) / (hsic(a, a) * hsic(b, b)).sqrt()


def _square_transfer(a, b):
    K, L = a @ a.mT, b @ b.mT
    return (K - L).square().sum() / L.square().sum()


def _thin_transfer(a, b):
    norm = (b.mT @ b).square().sum()
    return ((a.mT @ a).square().sum() + norm - 2 * (a.mT @ b).square().sum()) / norm


_PLAIN = {
    FEATURES: {"eager": lambda case: lambda x, y, zx, zy: _features(case, x, zx)},
    "nystrom_cka": {"eager": _pairs(_square_cka), "algebra": _pairs(_thin_cka)},
    "nystrom_transfer": {"eager": _pairs(_square_transfer), "algebra": _pairs(_thin_transfer)},
}


def _case(op: str, n: int, p: int, m: int, *targets: Target, **more) -> NystromCase:
    name = f"{op} n {n}, p {p}, m {m}" + (f" {more['dtype']}" if "dtype" in more else "")
    return NystromCase(name, op, n, p, m, targets=targets, **more)


def cpu_cases() -> list[NystromCase]:
    n, m = 200_000, 256
    limits = (Target("ms", "a limit", 10_000), Target("bytes", "a limit", 3 * n * m * 4))
    eager = Target("speed", "eager", 1.0)
    return [
        _case("nystrom_cka", n, 64, m, *limits, Target("speed", "algebra", 1.0)),
        _case("nystrom_cka", 4096, 256, 128, eager),
        _case("nystrom_transfer", 4096, 256, 128, eager, quick=True),
        _case("nystrom_transfer", 256, 512, 64, eager),
        _case(FEATURES, 16384, 256, 256, eager, quick=True),
        _case(FEATURES, 1024, 512, 64, eager),
    ]


def cuda_cases() -> list[NystromCase]:
    compiled, roof = Target("speed", "compiled", 1.5), Target("roof", "the ceiling", 60.0)
    return [
        _case(FEATURES, 65536, 512, 512, compiled, roof),
        _case(FEATURES, 65536, 512, 256, compiled),
        _case(FEATURES, 65536, 512, 512, compiled, roof, dtype="bfloat16"),
        _case("nystrom_transfer", 8192, 512, 256, Target("speed", "eager", 1.0), quick=True),
        _case("nystrom_transfer", 256, 512, 64, Target("speed", "eager", 1.0)),
        _case("nystrom_cka", 1_000_000, 64, 256, Target("speed", "algebra", 1.0)),
    ]
