# SPDX-License-Identifier: Apache-2.0
"""Launches of the projection kernels: one forward, one backward; only the gradient of the basis is left to PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from ..autograd import at_least_float32
from . import torch_impl
from .layout import planes, write
from .torch_impl import divisors
from .triton_kernels import Planes, project, spread


class Tile(NamedTuple):
    rows: int
    channels: int
    directions: int
    warps: int
    stages: int


# (most directions, half inputs, float32 inputs), by the model of bench/model, [32, 256, 32, 32]
PROJECT = (
    (16, Tile(64, 32, 16, 2, 3), Tile(64, 16, 16, 2, 3)),
    (32, Tile(64, 32, 32, 2, 3), Tile(64, 16, 32, 2, 3)),
    (1 << 30, Tile(64, 32, 64, 2, 3), Tile(64, 16, 64, 2, 3)),
)
SPREAD = (
    (64, Tile(64, 64, 64, 2, 2), Tile(64, 32, 64, 2, 2)),
    (1 << 30, Tile(64, 64, 32, 4, 2), Tile(64, 32, 32, 2, 2)),
)
# where sizes do not divide by 16: loads are narrow and many, and larger tiles spill
NARROW_PROJECT, NARROW_SPREAD = {"rows": 32, "channels": 16}, {"rows": 32, "channels": 32}
PROGRAMS = 512  # enough for each multiprocessor of the largest GPUs to have a few


def _half(s, t) -> bool:
    return s.dtype != torch.float32 and t.dtype != torch.float32


def _precision(half: bool) -> str:
    """Half inputs: 11 bits of each factor are as many as the gradient keeps; float32: three products make it exact."""
    return "tf32" if half else "tf32x3"


def _pick(table, narrow: dict, k: int, half: bool, even: bool) -> Tile:
    tile = next(pair[0 if half else 1] for limit, *pair in table if k <= limit)
    return tile if even else tile._replace(**narrow)


def _even(*sizes: int) -> bool:
    return all(size % 16 == 0 for size in sizes)


def _merge(*sides):
    """Each side [B, c, p] or None as Planes; B, p of the rows a program may own: all samples' where strides allow."""
    B, _, p = next(x for x in sides if x is not None).shape
    out = [None if x is None else Planes(x, x.stride(0), x.stride(2), x.stride(1)) for x in sides]
    merged = all(x is None or x.step_b == p * x.step_p for x in out)
    return *out, *((1, B * p) if merged else (B, p))


def forward(s, t, basis, mask, channel_dim: int, reduction: str, keep: bool):
    with torch.cuda.device_of(s):
        S, T = planes(s, channel_dim), planes(t, channel_dim)
        (samples, c, per), k = S.shape, basis.shape[1]
        *sides, B, p = _merge(S, T)
        even = _even(p, c, k)
        tile = _pick(PROJECT, NARROW_PROJECT, k, _half(s, t), even)
        blocks = triton.cdiv(k, tile.directions)
        squares = torch.empty((blocks, samples, per), dtype=torch.float32, device=s.device)
        projected = torch.empty(samples * per * k if keep else 0, dtype=torch.float32, device=s.device)
        counted = None if mask is None else mask.contiguous().view(torch.uint8)
        if squares.numel():
            project[(B * triton.cdiv(p, tile.rows) * blocks,)](
                *sides, basis.float().contiguous(), counted, squares, projected if keep else None, B, p, c, k,
                BR=tile.rows, BC=tile.channels, BK=tile.directions, EVEN=even,
                PRECISION=_precision(_half(s, t)), num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
        total = squares.sum((0, 2) if reduction == "none" else None, dtype=torch.float64)
        return (total / divisors(mask, S, k, reduction)).to(at_least_float32(s, t)), projected


def backward(grad, s, t, basis, mask, projected, channel_dim: int, reduction: str, need: int):
    with torch.cuda.device_of(s):
        S, T = planes(s, channel_dim), planes(t, channel_dim)
        k, empty = basis.shape[1], s.new_empty(0)
        weight = (2 * grad.double() / divisors(mask, S, k, reduction)).float()
        ds = torch.empty_like(s) if need & 1 else empty
        dt = torch.empty_like(t) if need & 2 else empty
        if need & 3 and s.numel():
            _spread(projected, basis, weight, (ds if need & 1 else None, dt if need & 2 else None), channel_dim)
        dbasis = empty
        if need & 4:
            Q = projected.view(S.shape[0], S.shape[2], k)
            dbasis = torch_impl.basis_gradient(Q, S, T, mask, weight, basis, torch.float32, True)
        return ds, dt, dbasis


def _spread(projected, basis, weight, gradients, channel_dim):
    """Writes the gradients of s and t; None where nobody asks."""
    outs, finishes = zip(*((None, None) if x is None else write(x, channel_dim) for x in gradients), strict=True)
    given = [x for x in outs if x is not None]
    (_, c, per), k = given[0].shape, basis.shape[1]
    *sides, B, p = _merge(*outs)
    half = all(x.dtype != torch.float32 for x in given)
    even = _even(p, c, k)
    tile = _pick(SPREAD, NARROW_SPREAD, k, half, even)
    tiles = B * triton.cdiv(p, tile.rows)
    spread[(tiles, min(triton.cdiv(c, tile.channels), triton.cdiv(PROGRAMS, tiles)))](
        *sides, projected, basis.float().contiguous(), weight.contiguous(), p, per, c, k,
        BR=tile.rows, BC=tile.channels, BK=tile.directions, ONE=k <= tile.directions, WEIGHTS=weight.dim() == 1,
        EVEN=even, PRECISION=_precision(half), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    for finish in finishes:
        if finish is not None:
            finish()
