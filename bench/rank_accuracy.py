# SPDX-License-Identifier: Apache-2.0
"""The ranking part of `python -m bench accuracy`: float32 ranks against float64, in units of float32's last place.

The truth is the textbook (`backend="reference"`) in float64 on the same rounded rows. Error of a rank: the distance to
the truth over the spacing of float32 at the truth (4.9e-4 above 4096). Half inputs give float32 ranks, held to the same
bound. torchsort, where installed, gets the row in float32.
"""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch

import kdkernels as kd

STRENGTHS = (1e-9, 1e-6, 1e-3, 1e-2, 0.1, 1.0, 10.0, 1e3)
SIZES = (10, 100, 1000, 4097, 21841, 131072)
ROWS = 2
BOUND = 1.0  # units in the last place


class Point(NamedTuple):
    kernel: str
    n: int
    dtype: str


def points(quick: bool) -> list[Point]:
    sizes = SIZES[:3] if quick else SIZES
    dtypes = ("float32", "bfloat16", "float16")
    return [Point(kernel, n, dtype) for dtype in dtypes for kernel in ("l2", "kl") for n in sizes]


def row_values(n: int, dtype: str, device: str):
    """Unit-scale rows with a common offset, and ties where the dtype makes them."""
    x = torch.randn(ROWS, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    return (x + 0.5).to(getattr(torch, dtype)).to(device)


def ulps(rank, truth):
    """The largest distance of rank to truth [.., n] (float64) in spacings of float32 at the truth; NaN counts."""
    _, exponent = torch.frexp(truth)
    return float(((rank.double() - truth).abs() / torch.ldexp(torch.ones_like(truth), exponent - 24)).max())


def measure(point: Point, backends, device: str) -> list[dict]:
    """A row for each backend, and for torchsort, over all strengths."""
    x = row_values(point.n, point.dtype, device)
    contenders = [("kdkernels", backend) for backend in backends]
    contenders += [("torchsort", None)] if importlib.util.find_spec("torchsort") else []
    worst = {contender: (-1.0, 0.0) for contender in contenders}
    for strength in STRENGTHS:
        truth = kd.soft_rank(x.double().cpu(), point.kernel, strength, backend="reference").to(device)
        for contender in contenders:
            error = ulps(_rank(*contender, x, point.kernel, strength), truth)
            # a NaN is the worst of all, and stays it
            if not error <= worst[contender][0]:
                worst[contender] = (error, strength)
    return [_row(point, *contender, *worst[contender]) for contender in contenders]


def _rank(name: str, backend, x, kernel: str, strength: float):
    if name == "kdkernels":
        return kd.soft_rank(x, kernel, strength, backend=backend)
    import torchsort

    return torchsort.soft_rank(x.float(), kernel, strength)


def _row(point: Point, name: str, backend, error: float, strength: float) -> dict:
    return {
        "kind": "rank accuracy",
        "status": "ok",
        "op": "soft_rank",
        "case": f"accuracy {point.kernel}",
        "contender": name,
        "backend": backend,
        "kernel": point.kernel,
        "dtype": point.dtype,
        "regime": "randn + 0.5",
        "shape": {"rows": ROWS, "n": point.n},
        "strengths": list(STRENGTHS),
        "worst_strength": strength,
        "error_ulp": error,
        "bound": BOUND,
        "holds": error <= BOUND,
    }
