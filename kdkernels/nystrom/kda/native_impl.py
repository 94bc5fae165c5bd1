# SPDX-License-Identifier: Apache-2.0
"""The landmark similarity loss on a CPU through `csrc/nystrom/`: one pass after the products; float64 in PyTorch."""

from __future__ import annotations

import torch

from . import torch_impl
from .torch_impl import backward, block_rows, compute_dtype, kept_shape

__all__ = ["backward", "forward", "kept_shape"]


def forward(s, t, s_centers, t_centers, need: bool):
    """As `torch_impl.forward`: (value, slope [B, d] or empty, 1 / |T|_F); a block of V lives until its product."""
    if compute_dtype(s, t) != torch.float32:
        return torch_impl.forward(s, t, s_centers, t_centers, need)
    s, t, s_centers, t_centers = (x if x.dtype == torch.float32 else x.float() for x in (s, t, s_centers, t_centers))
    rows, run = block_rows(s, s_centers), torch.ops.kdkernels.landmark_block.default
    if rows >= s.shape[0]:
        V, value, inverse = run(s, t, s_centers, t_centers, None)
        return value, torch.mm(V, s_centers) if need else s.new_empty(0), inverse
    slope = s.new_empty(s.shape if need else 0)
    sums = torch.zeros(2, dtype=torch.float64)
    for first in range(0, s.shape[0], rows):
        at = slice(first, first + rows)
        V, value, inverse = run(s[at], t[at], s_centers, t_centers, sums)
        if need:
            torch.mm(V, s_centers, out=slope[at])
    return value, slope, inverse
