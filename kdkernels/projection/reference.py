# SPDX-License-Identifier: Apache-2.0
"""The textbook: projected mean squared error one line per equation, in the letters of MATH.md. The oracle of tests."""

from __future__ import annotations

import torch


def projected_mse(s, t, basis, mask, reduction: str):
    """s, t [B, p, c] (p positions a sample), basis [c, k], mask bool [B, p] or None -> a scalar, or [B] for "none"."""
    D = s - t
    if mask is not None:
        D = torch.where(mask[..., None], D, 0)
    Q = D @ basis
    squares = (Q * Q).sum(-1)
    count = torch.full_like(squares, 1.0) if mask is None else mask.to(squares.dtype)
    if reduction == "sum":
        return squares.sum()
    k = basis.shape[1]
    if reduction == "none":
        return squares.sum(1) / (count.sum(1) * k).clamp(min=1)
    return squares.sum() / (count.sum() * k).clamp(min=1)
