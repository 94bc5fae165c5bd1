# SPDX-License-Identifier: Apache-2.0
"""The landmark similarity loss in PyTorch: rows in blocks, value and gradient in one pass, [B, C] never stored.

A block of both similarity matrices stays in cache between the products, the smooth L1 and the product that turns it
into the gradient; saved for backward: the gradient up to its scale, [B, d], and that scale.
"""

from __future__ import annotations

import torch

from ...autograd import device_type

# elements of a block of a similarity matrix
BLOCK = {"cpu": 1 << 20, "cuda": 1 << 24}


def compute_dtype(s, t) -> torch.dtype:
    return torch.promote_types(torch.promote_types(s.dtype, t.dtype), torch.float32)


def forward(s, t, s_centers, t_centers, need: bool):
    """(value, slope [B, d] or empty, 1 / |T|_F): dL/ds = slope / |T|_F."""
    total, slope = sums(s, t, s_centers, t_centers, need)
    return finished(total, compute_dtype(s, t), slope)


def sums(s, t, s_centers, t_centers, need: bool):
    """([sum of smooth L1, sum of T^2] float64, slope)."""
    dtype = compute_dtype(s, t)
    s_centers, t_centers = s_centers.to(dtype), t_centers.to(dtype)
    slope = s.new_empty(s.shape if need else (0,), dtype=dtype)
    total = torch.zeros((2,), dtype=torch.float64, device=s.device)
    loss, square = total
    rows = block_rows(s, s_centers)
    for first in range(0, len(s), rows):
        at = slice(first, first + rows)
        V = _block(s[at].to(dtype), t[at].to(dtype), s_centers, t_centers, loss, square)
        if need:
            torch.mm(V, s_centers, out=slope[at])
    return total, slope


def finished(total, dtype, kept):
    """What `forward` returns, from the sums."""
    inverse = inverse_norm(total[1])
    return (total[0] * inverse).to(dtype), kept, inverse.to(dtype)


def block_rows(s, s_centers) -> int:
    return max(1, BLOCK.get(device_type(s), BLOCK["cuda"]) // len(s_centers))


def _block(s, t, s_centers, t_centers, loss, square):
    """V = clamp(S - T, -1, 1) of a block of rows; adds sum V (D - V / 2), which is the smooth L1, and sum T^2."""
    T = t @ t_centers.mT
    square += torch.linalg.vecdot(T.flatten(), T.flatten())
    D = torch.addmm(T, s, s_centers.mT, beta=-1)
    V = D.clamp(-1, 1)
    loss += torch.linalg.vecdot(V.flatten(), D.sub_(V, alpha=0.5).flatten())
    return V


def inverse_norm(square):
    """1 / sqrt, 0 where it is 0; NaN stays NaN."""
    nothing = square == 0
    return torch.where(nothing, 0, torch.where(nothing, 1, square).rsqrt())


def backward(grad, s, t, s_centers, t_centers, slope, inverse):
    return (slope * (grad * inverse)).to(s.dtype)


def gradient(grad, s, t, s_centers, t_centers, inverse):
    """The gradient of s from nothing but the inputs: what a backend needs that saved no slope."""
    _, slope, _ = forward(s, t, s_centers, t_centers, True)
    return backward(grad, s, t, s_centers, t_centers, slope, inverse)


def kept_shape(s, t, s_centers, need: bool) -> tuple[int, ...]:
    return tuple(s.shape) if need else (0,)
