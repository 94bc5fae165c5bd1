# SPDX-License-Identifier: Apache-2.0
"""The landmark similarity loss on a CPU through `csrc/nystrom/`, rows to each thread; float64 in PyTorch."""

from __future__ import annotations

import torch

from ...dtypes import at_least_float32
from . import torch_impl

__all__ = ["backward", "forward", "kept_shape", "sums"]


def forward(s, t, s_centers, t_centers, need: bool):
    """As `torch_impl.forward`, but V may lie in memory by columns."""
    if at_least_float32(s, t) != torch.float32:
        return torch_impl.forward(s, t, s_centers, t_centers, need)
    return _rows(s, t, s_centers, t_centers, need, None)


def sums(s, t, s_centers, t_centers, need: bool):
    """As `torch_impl.sums`."""
    if at_least_float32(s, t) != torch.float32:
        return torch_impl.sums(s, t, s_centers, t_centers, need)
    total = torch.zeros(2, dtype=torch.float64, device=s.device)
    return total, _rows(s, t, s_centers, t_centers, need, total)[1]


def _rows(s, t, s_centers, t_centers, need: bool, total):
    tensors = (x if x.dtype == torch.float32 else x.float() for x in (s, t, s_centers, t_centers))
    return torch.ops.kdkernels.landmark_rows.default(*tensors, torch_impl.block_rows(s, s_centers), need, total)


def backward(grad, s, t, s_centers, t_centers, kept, inverse):
    if kept.dtype != torch.float32:
        return torch_impl.backward(grad, s, t, s_centers, t_centers, kept, inverse)
    ds = torch.ops.kdkernels.landmark_rows_backward.default(grad, s_centers.float(), kept, inverse)
    return ds if s.dtype == torch.float32 else ds.to(s.dtype)


def kept_shape(s, t, s_centers, need: bool) -> tuple[int, ...]:
    return torch_impl.kept_shape(s, t, s_centers, need)
