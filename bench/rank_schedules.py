# SPDX-License-Identifier: Apache-2.0
"""Runs every schedule of the compiled ranking kernels once, forward and backward, under the eyes of a race checker.

    python -m bench.rank_schedules [--device cuda] [--longest N]

Row lengths on both sides of each schedule's edge, rows of full and of half precision, float32 rows that hold half
values, both regularizations, masks, ties, a NaN row beside whole ones. Results are compared with the portable backend
on the CPU in float64, loosely: what is wrong here is wrong by ranks, the contract has the last digits.
"""

from __future__ import annotations

import argparse
import math
import sys

import torch

import kdkernels as kd
from kdkernels import backend as backends

BACKEND = {"cuda": "cuda", "cpu": "cpp"}
# (rows, n): sub-warp, warp, block in registers, block in shared memory, beyond it
SHAPES = ((9, 1), (9, 2), (9, 31), (9, 32), (5, 33), (3, 1000), (3, 1024), (2, 1025), (2, 4097), (2, 21841), (1, 57000))
LONG = ((3, 128256),)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REGULARIZATIONS = ("l2", "kl")


def rows(count: int, n: int, dtype, kind: str):
    """Seeded rows: plain, or with absent entries, ties and (of several) a row that holds NaN."""
    x = torch.randn(count, n, generator=torch.Generator().manual_seed(n)).to(dtype)
    if kind == "awkward":
        x[:, ::5] = x[:, :1].clone()
        x[0, 1::7] = -torch.inf
        if count > 2:
            x[1, n // 2] = torch.nan
    if kind in ("upcast", "mixed"):
        halves = x.bfloat16().float(), x.half().float(), x if kind == "mixed" else x.bfloat16().float()
        x = torch.stack([halves[i % 3][i] for i in range(count)])
    return x


def points(longest: int):
    """(op, rows, dtype, kind, regularization) of each call."""
    for count, n in (shape for shape in SHAPES + LONG if shape[1] <= longest):
        kinds = ("plain", "awkward") if n < LONG[0][1] else ("plain", "upcast", "mixed")
        for dtype in DTYPES:
            for kind in kinds if dtype == torch.float32 else kinds[:1]:
                for regularization in REGULARIZATIONS:
                    for op in ("soft_rank", "soft_sort", "spearman"):
                        yield op, count, n, dtype, kind, regularization


def call(op: str, x, y, regularization: str, backend: str, upstream):
    """(value, gradient to x)."""
    x = x.detach().requires_grad_()
    how = {"regularization": regularization, "regularization_strength": ("auto", 2.0), "backend": backend}
    value = getattr(kd, op)(x, y, **how) if op == "spearman" else getattr(kd, op)(x, **how)
    value.backward(upstream[: value.numel()].reshape(value.shape).to(value))
    return value.detach(), x.grad


def apart(ours, truth) -> float:
    """Largest difference in units of the largest entry; infinite where one is NaN or infinite and the other is not."""
    ours, truth = ours.double().cpu(), truth.double()
    wild = ~truth.isfinite()
    if not ours[wild].nan_to_num(7.0).equal(truth[wild].nan_to_num(7.0)) or not ours[~wild].isfinite().all():
        return float("inf")
    return float((ours - truth)[~wild].abs().max() / (1 + truth[~wild].abs().max())) if (~wild).any() else 0.0


def check(point, device: str) -> str | None:
    """Runs one point; what is wrong with it, or None."""
    op, count, n, dtype, kind, regularization = point
    x, y = rows(count, n, dtype, kind), rows(count, n, dtype, "plain").flip(-1)
    upstream = torch.randn(count * n, generator=torch.Generator().manual_seed(1))
    value, slope = call(op, x.double(), y.double(), regularization, "torch", upstream)
    # as a loss scaler does: the gradient of a long float16 row overflows otherwise
    scale = 2.0 ** -math.ceil(math.log2(max(1.0, float(slope.nan_to_num(0.0).abs().max()))))
    ours = call(op, x.to(device), y.to(device), regularization, BACKEND[device], (scale * upstream).to(device))
    truth = value, scale * slope
    bounds = (1e-5, {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}[dtype])
    if op == "soft_sort" and dtype != torch.float32:
        bounds = (bounds[1], bounds[1])
    found = [apart(a, b) for a, b in zip(ours, truth, strict=True)]
    wrong = [
        f"{what} off by {error:.1e}"
        for what, error, bound in zip(("value", "gradient"), found, bounds, strict=True)
        if not error <= bound
    ]
    return ", ".join(wrong) or None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.rank_schedules", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=tuple(BACKEND), default="cuda")
    parser.add_argument("--longest", type=int, default=LONG[-1][1], metavar="N", help="leave out longer rows")
    options = parser.parse_args(arguments)
    backend = BACKEND[options.device]
    why = backends.obstacle(backend, options.device, op="spearman")
    if why is not None:
        print(f"left out: the ranking kernels of backend {backend} cannot run: {why}")
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 2
    failed, count = 0, 0
    for point in points(options.longest):
        wrong, count = check(point, options.device), count + 1
        if wrong:
            failed += 1
            print(f"FAILED {point}: {wrong}", flush=True)
    print(f"{count} calls forward and backward, {failed} wrong")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
