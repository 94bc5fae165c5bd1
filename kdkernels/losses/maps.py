# SPDX-License-Identifier: Apache-2.0
"""What losses between feature maps share: each sample's channels at its positions, [B, C, L], and masks of positions.

A masked position is 0 on both sides, which is exact for what only sums over positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import checks
from ..autograd import at_least_float32
from .base import FeatureLoss, check_pair, constant, zero_of


class MapLoss(FeatureLoss):
    """A loss of each sample's map, averaged over the samples that count: `_value` gets [B, C, L] and a mask [B, L]."""

    one_size = True  # the larger map is pooled to the smaller; else each side has its own positions
    one_width = False  # channels are compared one to one

    def _compared(self, student, teacher, rows, mask, key):
        names = check_pair(self, student, teacher, "features", key)
        size, other = (check_map(side, rows, name) for side, name in zip((student, teacher), names, strict=True))
        kept = mask_of_positions(mask, student, size, names[0], size == other)
        teacher = constant(teacher)
        if self.one_size:
            student, teacher = to_smaller(student, teacher, size, other, names)
        x, y = (channels_at_positions(side, rows, kept) for side in (student, teacher))
        if self.one_width:
            same_channels(x, y, names)
        return x, y, kept

    def _terms(self, x, y, kept):
        if self._too_small(len(x), self.least):
            return {self.part: zero_of(x)}
        return {self.part: self._value(x, y, kept)}


def same_channels(x, y, names):
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"{names[1]} has {y.shape[1]} channels, {names[0]} has {x.shape[1]}: channels are compared one to one; "
            "bring the student's to the teacher's number with a 1 x 1 convolution"
        )


def check_map(x, rows, name: str) -> tuple[int, ...]:
    """The spatial size, (T,) for tokens."""
    shape = tuple(x.shape)
    if x.dim() == 2:
        raise ValueError(
            f"{name} has shape {shape}: this loss compares positions, give [B, C, H, W], or [B, T, d] with "
            "rows='groups'"
        )
    if x.dim() == 3 and rows is None:
        raise ValueError(
            f"{name} has shape {shape} and rows is not given: for [B, T, d] pass rows='groups' (tokens are the "
            "positions of a sample), for [B, C, L] rows='positions'"
        )
    if rows not in ((None, "positions") if x.dim() > 3 else ("groups", "positions")):
        raise ValueError(
            f"{name} has shape {shape} with rows={rows!r}: this loss compares the positions of each sample; give "
            "rows='groups' for [B, T, d], rows='positions' for [B, C, L], none for [B, C, H, W]"
        )
    return shape[1:2] if x.dim() == 3 and rows == "groups" else shape[2:]


def mask_of_positions(mask, like, size, name: str, one_size: bool):
    """[B, L], or None; from [B], or from one entry a position where no pooling mixes them."""
    if mask is None:
        return None
    checks.boolean(mask, like, name)
    mask = constant(mask)
    batch = (len(like),)
    if tuple(mask.shape) not in (batch, (*batch, *size)):
        raise ValueError(f"mask has shape {tuple(mask.shape)}: for {name} give {batch} or {(*batch, *size)}")
    if mask.dim() == 1:
        return mask[:, None]
    if not one_size:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, and not every map has the size of {name}: a mask of positions needs "
            "maps of one size; mask samples with [B], or bring all to one size first"
        )
    return mask.flatten(1)


def to_smaller(x, y, size, other, names):
    """The larger map pooled to the smaller (mean), in each direction."""
    if size == other:
        return x, y
    if len(size) != 2 or len(other) != 2:
        raise ValueError(
            f"{names[1]} has positions {other}, {names[0]} {size}: only maps [B, C, H, W] are pooled to one size"
        )
    target = tuple(map(min, size, other))
    return pooled(x, target), pooled(y, target)


def pooled(x, size, how: str = "avg"):
    """[B, C, H, W] to `size`, adaptively, in at least float32."""
    before = tuple(x.shape[2:])
    if before == tuple(size):
        return x
    x = x.to(at_least_float32(x))
    if all(n % m == 0 for n, m in zip(before, size, strict=True)):
        # the same windows, without the atomics of the adaptive pool's gradient on CUDA
        window = tuple(n // m for n, m in zip(before, size, strict=True))
        return F.avg_pool2d(x, window) if how == "avg" else F.max_pool2d(x, window)
    return F.adaptive_avg_pool2d(x, size) if how == "avg" else F.adaptive_max_pool2d(x, size)


def channels_at_positions(x, rows, kept):
    """[B, C, L] in at least float32, 0 where masked."""
    x = x.mT if x.dim() == 3 and rows == "groups" else x.flatten(2)
    x = x.to(at_least_float32(x))
    return x if kept is None else torch.where(kept[:, None], x, 0)


def unit(x, dim: int):
    """x over its L2 norm along `dim`; what is zero stays zero, NaN stays NaN."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / torch.where(norm == 0, 1, norm)
