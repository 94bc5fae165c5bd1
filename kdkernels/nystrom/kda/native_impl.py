# SPDX-License-Identifier: Apache-2.0
"""The landmark similarity loss on a CPU through `csrc/nystrom/`: one pass after the products; float64 in PyTorch."""

from __future__ import annotations

import torch

from . import torch_impl
from .torch_impl import backward, block_rows, compute_dtype, kept_shape

__all__ = ["backward", "forward", "kept_shape", "sums"]


def forward(s, t, s_centers, t_centers, need: bool):
    """As `torch_impl.forward`: (value, slope [B, d] or empty, 1 / |T|_F); a block of V lives until its product."""
    if compute_dtype(s, t) != torch.float32:
        return torch_impl.forward(s, t, s_centers, t_centers, need)
    s, t, s_centers, t_centers = (x if x.dtype == torch.float32 else x.float() for x in (s, t, s_centers, t_centers))
    if block_rows(s, s_centers) >= s.shape[0]:
        V, value, inverse = torch.ops.kdkernels.landmark_block.default(s, t, s_centers, t_centers, None)
        return value, torch.mm(V, s_centers) if need else s.new_empty(0), inverse
    _, slope, value, inverse = _blocks(s, t, s_centers, t_centers, need)
    return value, slope, inverse


def sums(s, t, s_centers, t_centers, need: bool):
    """As `torch_impl.sums`."""
    if compute_dtype(s, t) != torch.float32:
        return torch_impl.sums(s, t, s_centers, t_centers, need)
    return _blocks(*(x.float() for x in (s, t, s_centers, t_centers)), need)[:2]


def _blocks(s, t, s_centers, t_centers, need: bool):
    """(sums, slope, value, inverse norm) of all blocks of rows."""
    rows, run = block_rows(s, s_centers), torch.ops.kdkernels.landmark_block.default
    slope = s.new_empty(s.shape if need else 0)
    sums, value, inverse = torch.zeros(2, dtype=torch.float64), None, None
    for first in range(0, s.shape[0], rows):
        at = slice(first, first + rows)
        V, value, inverse = run(s[at], t[at], s_centers, t_centers, sums)
        if need:
            torch.mm(V, s_centers, out=slope[at])
    return sums, slope, value, inverse
