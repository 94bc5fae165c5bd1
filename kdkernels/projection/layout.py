# SPDX-License-Identifier: Apache-2.0
"""Features of any rank seen as [B, c, p], channels and positions, without a copy wherever strides allow it."""

from __future__ import annotations

import math

import torch


def planes(x: torch.Tensor, channel_dim: int) -> torch.Tensor:
    """x as [B, c, p], p = all positions: a view of NCHW, channels_last and token layouts, else a copy."""
    if channel_dim != 1:
        x = x.movedim(channel_dim, 1)
    return x[:, :, None] if x.dim() == 2 else x if x.dim() == 3 else x.flatten(2)


def is_view(x: torch.Tensor, channel_dim: int) -> bool:
    """Whether `planes` is a view: the positions follow each other at one distance."""
    inner = [(n, d) for i, (n, d) in enumerate(zip(x.shape, x.stride(), strict=True)) if i not in (0, channel_dim)]
    inner = [(n, d) for n, d in inner if n != 1]
    return all(d == n_next * d_next for (_, d), (n_next, d_next) in zip(inner, inner[1:], strict=False))


def write(out: torch.Tensor, channel_dim: int):
    """(planes of `out` to be written, what to call when done): where no view exists the planes are copied back."""
    if is_view(out, channel_dim):
        return planes(out, channel_dim), lambda: None
    moved = out.movedim(channel_dim, 1)
    buffer = torch.empty((out.shape[0], out.shape[channel_dim], positions(out, channel_dim)), dtype=out.dtype,
                         device=out.device)  # fmt: skip
    return buffer, lambda: moved.copy_(buffer.view(moved.shape))


def positions(x: torch.Tensor, channel_dim: int) -> int:
    return math.prod(n for i, n in enumerate(x.shape) if i not in (0, channel_dim))


def by_rows(x: torch.Tensor) -> bool:
    """Of planes [B, c, p]: whether a position's channels are neighbours in memory (channels_last, tokens, [B, c])."""
    return x.shape[2] == 1 or (x.stride(1) == 1 and x.stride(2) != 1)
