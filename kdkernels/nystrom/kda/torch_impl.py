# SPDX-License-Identifier: Apache-2.0
"""The landmark similarity loss in PyTorch: rows in blocks, V = clamp(S - T, -1, 1) is all that outlives a block.

Saved for backward beside the scale 1 / |T|_F: V [B, C] where landmarks are no more than features, else V S_c [B, d],
multiplied while its block is in cache.
"""

from __future__ import annotations

import torch

from ...autograd import at_least_float32, device_type

# elements of a block of a similarity matrix
BLOCK = {"cpu": 1 << 20, "cuda": 1 << 24}


def keeps_similarities(s, s_centers) -> bool:
    """Whether V is kept rather than its product with the landmarks: no more numbers, and a pass over [B, d] less."""
    return s_centers.shape[0] <= s.shape[1]


def forward(s, t, s_centers, t_centers, need: bool):
    """(value, what `backward` needs, 1 / |T|_F)."""
    total, kept = sums(s, t, s_centers, t_centers, need)
    return finished(total, at_least_float32(s, t), kept)


def sums(s, t, s_centers, t_centers, need: bool):
    """([sum of smooth L1, sum of T^2] float64, what `backward` needs: V [B, C], V S_c [B, d], or nothing)."""
    dtype = at_least_float32(s, t)
    s_centers, t_centers = s_centers.to(dtype), t_centers.to(dtype)
    kept = s.new_empty(kept_shape(s, t, s_centers, need), dtype=dtype)
    total = torch.zeros((2,), dtype=torch.float64, device=s.device)
    loss, square = total
    rows, stays = block_rows(s, s_centers), keeps_similarities(s, s_centers)
    for first in range(0, len(s), rows):
        at = slice(first, first + rows)
        V = _block(s[at].to(dtype), t[at].to(dtype), s_centers, t_centers, loss, square)
        if need and not stays:
            torch.mm(V, s_centers, out=kept[at])
        elif need:
            kept[at] = V
    return total, kept


def finished(total, dtype, kept):
    """What `forward` returns, from the sums."""
    inverse = inverse_norm(total[1])
    return (total[0] * inverse).to(dtype), kept, inverse.to(dtype)


def block_rows(s, s_centers) -> int:
    return max(1, BLOCK.get(device_type(s), BLOCK["cuda"]) // len(s_centers))


def _block(s, t, s_centers, t_centers, loss, square):
    """V = clamp(S - T, -1, 1) of a block of rows; adds sum V (D - V / 2), which is the smooth L1, and sum T^2."""
    T = t @ t_centers.mT
    square += _dot(T, T)
    D = torch.addmm(T, s, s_centers.mT, beta=-1)
    V = D.clamp(-1, 1)
    loss += _dot(V, D.sub_(V, alpha=0.5))
    return V


def _dot(a, b):
    """The sum of a * b, row by row where there are many: some BLAS add a million float32 up with an error of 1e-5."""
    if a.numel() <= 1 << 14:
        return torch.linalg.vecdot(a.flatten(), b.flatten())
    return torch.linalg.vecdot(a, b).sum(dtype=torch.float64)


def inverse_norm(square):
    """1 / sqrt, 0 where it is 0; NaN stays NaN."""
    nothing = square == 0
    return torch.where(nothing, 0, torch.where(nothing, 1, square).rsqrt())


def backward(grad, s, t, s_centers, t_centers, kept, inverse):
    ds = kept * (grad * inverse)  # no scale inside the product: a BLAS may skip what it would multiply by 0, NaN or not
    if keeps_similarities(s, s_centers):
        ds = torch.mm(ds, s_centers.to(ds.dtype))
    return ds.to(s.dtype)


def gradient(grad, s, t, s_centers, t_centers, inverse):
    """The gradient of s from nothing but the inputs: what a backend needs that kept no more."""
    _, kept, _ = forward(s, t, s_centers, t_centers, True)
    return backward(grad, s, t, s_centers, t_centers, kept, inverse)


def kept_shape(s, t, s_centers, need: bool) -> tuple[int, ...]:
    if not need:
        return (0,)
    return (s.shape[0], s_centers.shape[0]) if keeps_similarities(s, s_centers) else tuple(s.shape)
