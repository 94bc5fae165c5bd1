# SPDX-License-Identifier: Apache-2.0
"""Projected MSE on a CPU through `csrc/projection/`: tiles of the difference never leave the cache.

float32 and bfloat16 features; of other dtypes, and for the gradient of the basis, PyTorch.
"""

from __future__ import annotations

import torch

from ..autograd import at_least_float32
from . import torch_impl
from .layout import by_rows, planes, write
from .torch_impl import divisors

DTYPES = (torch.float32, torch.bfloat16)


def _taken(s, t, basis) -> bool:
    return s.dtype in DTYPES and t.dtype in DTYPES and basis.dtype != torch.float64


def forward(s, t, basis, mask, channel_dim: int, reduction: str, keep: bool):
    if not _taken(s, t, basis):
        return torch_impl.forward(s, t, basis, mask, channel_dim, reduction, keep)
    S, T = planes(s, channel_dim), planes(t, channel_dim)
    divisor, counted = divisors(mask, S, basis.shape[1], reduction), None
    if isinstance(divisor, torch.Tensor):
        divisor, counted = 1, divisor
    mask = None if mask is None else mask.contiguous()
    value, projected = torch.ops.kdkernels.project_rows(
        S, T, basis.float().contiguous(), mask, by_rows(S), reduction == "none", divisor, keep
    )
    return (value if counted is None else value / counted).float(), projected


def backward(grad, s, t, basis, mask, projected, channel_dim: int, reduction: str, need: int):
    if not _taken(s, t, basis):
        return torch_impl.backward(grad, s, t, basis, mask, projected, channel_dim, reduction, need)
    S, T = planes(s, channel_dim), planes(t, channel_dim)
    k, rows = basis.shape[1], by_rows(S)
    weight, factor = grad, divisors(mask, S, k, reduction)
    if isinstance(factor, torch.Tensor):
        weight, factor = grad.double() / factor, 1
    weight, factor = weight.float().contiguous(), 2 / factor
    empty = s.new_empty(0)
    ds = torch.empty_like(s) if need & 1 else empty
    dt = torch.empty_like(t) if need & 2 else empty
    if need & 3:
        outs = [write(g, channel_dim) if need & bit else (None, None) for bit, g in ((1, ds), (2, dt))]
        P = basis.float().contiguous()
        torch.ops.kdkernels.spread_rows(projected, P, weight, factor, rows, outs[0][0], outs[1][0])
        for _, finish in outs:
            if finish is not None:
                finish()
    if not need & 4:
        return ds, dt, empty
    Q = torch_impl.shaped(projected, S, k, rows)
    return ds, dt, torch_impl.basis_gradient(Q, S, T, mask, factor * weight, basis, at_least_float32(s, t), rows)
