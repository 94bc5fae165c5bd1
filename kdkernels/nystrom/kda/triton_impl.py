# SPDX-License-Identifier: Apache-2.0
"""Launches of the landmark similarity kernels: two forward; backward one, or products of row blocks where d is wide.

Nothing but the inputs and one number is saved. Above `RECOMPUTE_WIDTH` features the tiles would be computed again too
often: there the gradient is that of `torch_impl`, blocks of rows and cuBLAS.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from . import torch_impl
from .triton_kernels import similarity_finish, similarity_gradient, similarity_sums


class Tile(NamedTuple):
    rows: int
    landmarks: int
    depth: int
    width: int  # columns of ds a program owns
    warps: int
    stages: int


# (half inputs, float32 inputs); unmeasured: small, as KDA's batches have to fill the GPU with few rows
SUMS = (Tile(32, 32, 64, 0, 4, 3), Tile(32, 32, 32, 0, 4, 2))
GRADIENT = (Tile(32, 32, 64, 128, 4, 2), Tile(32, 32, 32, 64, 4, 2))
RECOMPUTE_WIDTH = 512
FINISH_BLOCK = 512


def half_of(s, t) -> bool:
    return s.dtype != torch.float32 and t.dtype != torch.float32


def precision(half: bool) -> str:
    """tf32 holds half inputs exactly and rounds the landmarks to 11 bits; float32 inputs need three products."""
    return "tf32" if half else "tf32x3"


def forward(s, t, s_centers, t_centers, need: bool):
    with torch.cuda.device_of(s):
        slots = _slots(s, t, s_centers, t_centers)
        tiles = len(slots)
        value, inverse = (torch.empty((), dtype=torch.float32, device=s.device) for _ in range(2))
        similarity_finish[(1,)](slots, value, inverse, tiles, BLOCK=FINISH_BLOCK, num_warps=4)
        return value, value.new_empty(0), inverse


def sums(s, t, s_centers, t_centers, need: bool):
    """As `torch_impl.sums`, with nothing kept."""
    with torch.cuda.device_of(s):
        return _slots(s, t, s_centers, t_centers).sum(0, dtype=torch.float64), s.new_empty(0, dtype=torch.float32)


def _slots(s, t, s_centers, t_centers):
    """[tiles, 2] the two sums of each tile."""
    half = half_of(s, t)
    tile = SUMS[0 if half else 1]
    (B, d), C, e = s.shape, s_centers.shape[0], t.shape[1]
    tiles = triton.cdiv(B, tile.rows) * triton.cdiv(C, tile.landmarks)
    slots = torch.empty((tiles, 2), dtype=torch.float32, device=s.device)
    if tiles:
        similarity_sums[(tiles,)](
            *operands(s, t, s_centers, t_centers), slots, B, C, d, e, BM=tile.rows, BN=tile.landmarks,
            BD=tile.depth, PRECISION=precision(half), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return slots


def backward(grad, s, t, s_centers, t_centers, kept, inverse):
    with torch.cuda.device_of(s):
        (B, d), C, e = s.shape, s_centers.shape[0], t.shape[1]
        if d > RECOMPUTE_WIDTH:
            return torch_impl.gradient(grad, s, t, s_centers, t_centers, inverse)
        half = half_of(s, t)
        tile = GRADIENT[0 if half else 1]
        depth = tile.depth if d % 16 == e % 16 == 0 else tile.depth // 2  # narrow loads: more spill 1,000 bytes
        ds = torch.empty(s.shape, dtype=s.dtype, device=s.device)
        if B:
            similarity_gradient[(triton.cdiv(B, tile.rows), triton.cdiv(d, tile.width))](
                *operands(s, t, s_centers, t_centers), grad.float(), inverse, ds, B, C, d, e, BM=tile.rows,
                BN=tile.landmarks, BD=depth, BW=tile.width, PRECISION=precision(half), num_warps=tile.warps,
                num_stages=tile.stages,
            )  # fmt: skip
        return ds


def operands(s, t, s_centers, t_centers):
    return s.contiguous(), t.contiguous(), s_centers.float().contiguous(), t_centers.float().contiguous()


def kept_shape(s, t, s_centers, need: bool) -> tuple[int, ...]:
    return (0,)
