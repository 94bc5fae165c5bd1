# SPDX-License-Identifier: Apache-2.0
"""Ranks on a GPU without the CUDA library: PyTorch sorts, one launch fits all rows, one more is the gradient."""

from __future__ import annotations

import math

import torch
import triton

from ..autograd import at_least_float32
from . import torch_impl
from .triton_kernels import fit_rows, spread_rows

# (longest row that is filled up to a power of two, warps); unmeasured: 8 positions a thread, for
# more it has no registers
WARPS = ((256, 1), (512, 2), (1024, 4), (2048, 8))

# below it: the least number of a type, and -inf. Of halves between two numbers, so that it is no number of theirs
BOUND = {"float16": -65488.0, "bfloat16": -3.383e38}
BOUND |= {"float32": -3.4028232635611926e38, "float64": -1.7976931348623155e308}


def width(n: int) -> int:
    """Positions of a program for rows of n."""
    return max(32, triton.next_power_of_2(n))


def warps(N: int) -> int:
    return next(count for longest, count in WARPS if N <= longest)


def constants(N: int, kl: bool, dtype: str) -> dict:
    """What `fit_rows` is compiled for beside options: positions of a thread, threads, levels of merges, what no
    entry is below, and strengths of a gap that nothing pools over."""
    T = min(N, 32 * warps(N))
    gap = 2 * math.log(N + 1) + 2 if kl else float(N)
    return {"C": N // T, "T": T, "LEVELS": N.bit_length() - 1, "BOUND": BOUND[dtype], "CUT": gap, "KL": kl}


def rank_forward(x, strengths, number, relative, kl, descending, need, dtype=None):
    """As `torch_impl.rank_forward`."""
    shape, n = x.shape, x.shape[-1]
    s, order = torch.sort(x.reshape(-1, n).contiguous(), dim=-1)  # which keeps strides
    R, N = len(s), width(n)
    strength = x.new_full((1,), number, dtype=torch.float64) if strengths is None else strengths * number
    rank = x.new_empty(shape, dtype=dtype or at_least_float32(x))
    blocks = x.new_empty(shape if need else 0, dtype=torch.int32)
    eps = x.new_empty(shape[:-1], dtype=torch.float64)
    sums = x.new_empty((R, N), dtype=torch.float64)
    with torch.cuda.device_of(x):  # a launch goes to the current device, wherever its tensors are
        fit_rows[(R,)](
            s, order, strength, rank, blocks, eps, sums,
            n, int(strength.numel() > 1), int(relative), int(number == 0), int(descending), int(need),
            **constants(N, kl and number != 0, str(x.dtype).removeprefix("torch.")), num_warps=warps(N),
        )  # fmt: skip
    return rank, blocks, eps


def rank_backward(grad, x, rank, blocks, eps, kl, descending):
    n = x.shape[-1]
    R, N = x.shape[:-1].numel(), width(n)
    grad, rank, blocks = (t if t is None else t.contiguous() for t in (grad, rank, blocks))
    sums = torch.zeros((R, N), dtype=torch.int64, device=x.device)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        spread_rows[(R,)](
            grad, grad if rank is None else rank, blocks, eps.contiguous(), sums, out, n, int(descending),
            N=N, KL=kl, num_warps=warps(N),
        )  # fmt: skip
    return out


def spearman_forward(*asked):
    """As `torch_impl.spearman_forward`."""
    return torch_impl.spearman_by(rank_forward, rank_backward, *asked)
