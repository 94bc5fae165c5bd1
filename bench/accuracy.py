# SPDX-License-Identifier: Apache-2.0
"""`python -m bench accuracy`: CKA in float32 and in half precision against float64, beside the naive formula; and soft
ranks (`rank_accuracy.py`).

The truth is the textbook (`backend="reference"`) in float64 on the same rounded inputs. The bandwidth is one number a
side, found in float64 and given to everybody. The error of the value is absolute: the unbiased numerator may be near
zero or below.

The gradient is that of CKA to x, relative in L2, for at most `GRADIENT_ROWS` samples, under a power of two as upstream
gradient that puts its largest entry near 1 (what a loss scaler does: without it float16 underflows). It comes back in
the dtype of x, so bfloat16 alone costs 1.7e-3. Three numbers tell the two apart: `gradient_error` against the truth,
`gradient_floor`, that of the truth itself rounded to the dtype of x, and `gradient_excess`, against that rounded truth.
The last one is held to the bound.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from . import contenders as others
from . import data, drive, machine, rank_accuracy
from .cases import Case

KERNELS = (("linear", 1.0), ("cosine", 1.0), ("rbf", 1.0), ("rbf", 5.0), ("polynomial", 1.0))
REGIMES = tuple(f"relu:{mean}:{scale}" for mean in (3, 30) for scale in (1, 1000))
SIZES = (64, 1024, 4096)
WIDTH = 512
GRADIENT_ROWS = 1024
VALUE_BOUND = {"float32": 1e-6, "bfloat16": 1e-4, "float16": 1e-4}
POLYNOMIAL_BOUND = 5e-6
GRADIENT_BOUND = {"bfloat16": 1e-3, "float16": 1e-3}


class Point(NamedTuple):
    kernel: str
    factor: float  # sigma = factor x median
    regime: str
    n: int
    dtype: str


def points(quick: bool) -> list[Point]:
    sizes = (64,) if quick else SIZES
    return [
        Point(kernel, factor, regime, n, dtype)
        for dtype in ("float32", "bfloat16", "float16")
        for kernel, factor in KERNELS
        for regime in REGIMES
        for n in sizes
        if not (dtype == "float16" and regime == "relu:30:1000")  # 30 000 +- 1000 and more: beyond float16's range
    ]


def run(options) -> int:
    device = options.device
    if options.threads:
        torch.set_num_threads(options.threads)
    shared = machine.provenance(device)
    path = Path(options.out) if options.out else drive.default_path(shared, "accuracy")
    write = drive.Writer(path, shared)
    wanted, chosen = options.backends or drive.BACKENDS[device], []
    if drive.asked("gram", options):
        chosen += [(measure, point, "cka") for point in points(options.quick)]
    if drive.asked("rank", options):
        chosen += [(rank_accuracy.measure, point, "soft_rank") for point in rank_accuracy.points(options.quick)]
    begin, missed = time.monotonic(), 0
    for place, (measured, point, op) in enumerate(chosen):
        for row in measured(point, drive.usable_backends(op, device, wanted), device):
            write(row)
            missed += not row["holds"] and row["contender"] == "kdkernels"
        print(f"\r{place + 1}/{len(chosen)}  {time.monotonic() - begin:.0f} s", end="", file=sys.stderr, flush=True)
    print(f"\n{len(write.rows)} rows, {missed} of kdkernels beyond their bound\n{path}", file=sys.stderr)
    return 1 if missed else 0


def measure(point: Point, backends, device: str) -> list[dict]:
    """A row for each backend, and one for the naive formula in the dtype of the inputs (float32 for half inputs)."""
    x, y = data.features(point.n, WIDTH, WIDTH, point.regime, seed=point.n, device=device)
    x, y = (t.to(getattr(torch, point.dtype)) for t in (x, y))
    sigma = tuple(point.factor * data.median_sigma(t) for t in (x, y)) if point.kernel == "rbf" else None
    case = Case("accuracy", "cka", point.n, WIDTH, WIDTH, point.kernel)
    with_gradient = point.n <= GRADIENT_ROWS
    truth, slope = evaluate(others.ours(case, sigma, "reference"), x.double(), y.double(), with_gradient)
    upstream = 1.0 if slope is None else 2.0 ** -round(math.log2(float(slope.abs().max())))
    slope = None if slope is None else slope * upstream
    rows = []
    for name, backend in [("kdkernels", b) for b in backends] + [("eager", None)]:
        function = others.ours(case, sigma, backend) if backend else others.eager(case, sigma)
        inputs = (x, y) if backend else (x.float(), y.float())
        value, gradient = evaluate(function, *inputs, with_gradient, upstream)
        rows.append(_row(point, name, backend, truth, value, slope, gradient))
    return rows


def evaluate(function, x, y, with_gradient: bool, upstream: float = 1.0):
    """The value as a number, and the gradient to x."""
    x = x.detach().clone().requires_grad_(with_gradient)
    with torch.set_grad_enabled(with_gradient):
        value = function(x, y)
    if with_gradient:
        value.backward(torch.full_like(value, upstream))
    return value.item(), x.grad


def _row(point, name, backend, truth, value, slope, gradient) -> dict:
    error = abs(value - truth)
    apart = floor = excess = None
    if slope is not None:
        rounded = slope.to(gradient.dtype).double()
        apart, floor, excess = (
            float((a - b).norm() / slope.norm())
            for a, b in ((gradient.double(), slope), (rounded, slope), (gradient.double(), rounded))
        )
    bound = VALUE_BOUND[point.dtype]
    if point.kernel == "polynomial":
        bound = max(bound, POLYNOMIAL_BOUND)
    slope_bound = GRADIENT_BOUND.get(point.dtype)
    holds = error <= bound and (excess is None or slope_bound is None or excess <= slope_bound)
    return {
        "kind": "accuracy",
        "status": "ok",
        "op": "cka",
        "case": f"accuracy {point.kernel}",
        "contender": name,
        "backend": backend,
        "kernel": point.kernel,
        "sigma": f"{point.factor:g} x median" if point.kernel == "rbf" else None,
        "dtype": point.dtype,
        "regime": point.regime,
        "shape": {"groups": 1, "n": point.n, "p": WIDTH, "q": WIDTH},
        "truth": truth,
        "error": error,
        "bound": bound,
        "gradient_error": apart,
        "gradient_floor": floor,
        "gradient_excess": excess,
        "gradient_bound": slope_bound,
        "holds": bool(holds),
    }
