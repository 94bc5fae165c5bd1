# SPDX-License-Identifier: Apache-2.0
"""The angles on a GPU: one launch over all triplets of all groups, beside products that PyTorch does in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from . import torch_impl
from .pairs import inverse
from .torch_impl import backward, kept_of
from .triton_kernels import triangles

__all__ = ["backward", "forward", "kept_of"]


class Config(NamedTuple):
    rows: int
    columns: int
    warps: int


# unmeasured: the largest tile without spills on sm_80, sm_90 and sm_100
TILE = Config(16, 32, 4)


def forward(x, y, mask, kind: str, need: int):
    return torch_impl.forward(x, y, mask, kind, need, torch_impl.one_sided(_triangles))


def _parts(square):
    """[3, G, n, n] float32: d^2 / 2 as the sum of two floats, and 1 / d."""
    half = square / 2
    high = half.float()
    return torch.stack([high, (half - high).float(), inverse(square).float()])


def _triangles(own, other, weight: bool):
    x, y = _parts(own), _parts(other)
    G, n, _ = own.shape
    tiles = triton.cdiv(n, TILE.rows)
    value = x.new_empty((G * n, tiles))
    V = x.new_empty((G, n, n) if weight else (0,))
    with torch.cuda.device_of(x):  # a launch goes to the current device, wherever its tensors are
        triangles[(G * n, tiles)](
            x, y, value, V, n, G * n * n, BB=TILE.rows, BC=TILE.columns, WEIGHT=weight, num_warps=TILE.warps
        )
    # both orders of i and k; i = k is 1 on both sides, but for a sample that is one with v on one side alone
    alone = ((own == 0) != (other == 0)).sum((-2, -1)) / 2
    return 2 * value.reshape(G, -1).sum(-1, dtype=torch.float64) + alone, V.double()
