# SPDX-License-Identifier: Apache-2.0
"""The landmark similarity loss on a CPU through `csrc/nystrom/`: one pass after the products; float64 in PyTorch.

Kept for backward is the smaller of two: V = clamp(S - T, -1, 1) [B, C], whose product with the landmarks backward then
takes, or that product [B, d]. So never more than B min(C, d) numbers.
"""

from __future__ import annotations

import torch

from . import torch_impl
from .torch_impl import block_rows, compute_dtype


def _keeps_v(s, t, s_centers) -> bool:
    return s_centers.shape[0] <= s.shape[1] and compute_dtype(s, t) == torch.float32


def forward(s, t, s_centers, t_centers, need: bool):
    """(value, kept or empty, 1 / |T|_F)."""
    if compute_dtype(s, t) != torch.float32:
        return torch_impl.forward(s, t, s_centers, t_centers, need)
    keeps_v = _keeps_v(s, t, s_centers)
    s, t, s_centers, t_centers = (x if x.dtype == torch.float32 else x.float() for x in (s, t, s_centers, t_centers))
    rows, run = block_rows(s, s_centers), torch.ops.kdkernels.landmark_block.default
    if rows >= s.shape[0]:
        V, value, inverse = run(s, t, s_centers, t_centers, None)
        kept = s.new_empty(0) if not need else V if keeps_v else torch.mm(V, s_centers)
        return value, kept, inverse
    kept = s.new_empty(((s.shape[0], s_centers.shape[0]) if keeps_v else s.shape) if need else 0)
    sums = torch.zeros(2, dtype=torch.float64)
    for first in range(0, s.shape[0], rows):
        at = slice(first, first + rows)
        V, value, inverse = run(s[at], t[at], s_centers, t_centers, sums)
        if need and keeps_v:
            kept[at] = V
        elif need:
            torch.mm(V, s_centers, out=kept[at])
    return value, kept, inverse


def backward(grad, s, t, s_centers, t_centers, kept, inverse):
    if not _keeps_v(s, t, s_centers):
        return torch_impl.backward(grad, s, t, s_centers, t_centers, kept, inverse)
    s_centers = s_centers if s_centers.dtype == torch.float32 else s_centers.float()
    ds = torch.mm(kept * (grad * inverse), s_centers)
    return ds if s.dtype == torch.float32 else ds.to(s.dtype)


def kept_shape(s, t, s_centers, need: bool) -> tuple[int, ...]:
    if need and _keeps_v(s, t, s_centers):
        return s.shape[0], s_centers.shape[0]
    return torch_impl.kept_shape(s, t, s_centers, need)
