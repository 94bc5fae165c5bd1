# SPDX-License-Identifier: Apache-2.0
"""Flow of solution procedure: products of consecutive layers over positions as batched matmuls, never C x C x HW."""

from __future__ import annotations

from typing import Literal

from .._types import RowsOf, Weights
from .base import check_pair, constant, mean_of_groups, zero_of
from .maps import MapLoss, channels_at_positions, check_map, mask_of_positions, pooled, same_channels
from .product import product

POOLS = ("avg", "max")


class FSPLoss(MapLoss):
    """Flow of the solution procedure (FSP): products of the feature maps of consecutive layers.

    sum over pairs (l, l+1) of layers of w_l mean over samples and entries of (G_s - G_t)^2, G = F_l F_(l+1)' / HW.

    F_l [C_l, H W] is a sample's map at layer l, so G is C_l x C_(l+1). Source: Yim et al. 2017 (CVPR); formula and
    default as in RepDistiller. Of two consecutive layers the larger map is pooled to the smaller: by means there
    (pool="avg"), by maxima in torchdistill (pool="max"; that library also sums the norms of the columns of G_s - G_t
    over the batch where this loss has a mean of squares). The weight RepDistiller's scripts use is 50: pass weight=50.
    1 is the formula itself.

    Args:
        pool: "avg" or "max".
        rows: [B, C, H, W] needs none. [B, T, d]: "groups" (tokens are the positions, features the channels), needed;
            [B, C, L]: "positions". Other values are refused, as the loss is one of each sample's own positions.
        weights: one weight a pair of layers (one fewer than layers), a buffer; default 1 each. weight: factor of the
            loss, a buffer.

    Call: `(student_features, teacher_features, *, mask, rows, return_parts)`: two lists of at least 2 layers, in order.
    Both sides need the same channels at each layer (a 1 x 1 convolution mends it); sizes [H, W] may differ between the
    sides, each pools among its own layers; of tokens there must be as many in each layer of a side. Each tensor its own
    float dtype, computed in at least float32. mask: bool [B], or [B, T] or [B, H, W] where every layer of both sides
    has one size: masked positions are left out of products and HW; all masked gives 0. A single sample is no special
    case; an empty batch gives 0 and warns once. A NaN that counts gives NaN. Gradient to the student only.

    >>> student = [torch.randn(4, 8, 8, 8, requires_grad=True), torch.randn(4, 16, 4, 4)]
    >>> teacher = [torch.randn(4, 8, 16, 16), torch.randn(4, 16, 8, 8)]
    >>> loss = kd.losses.FSPLoss(weight=50.0)
    >>> loss(student, teacher).backward()
    >>> loss(teacher, teacher).item()
    0.0
    """

    part = "fsp"
    unit = "pairs of layers"

    def __init__(
        self,
        *,
        pool: Literal["avg", "max"] = "avg",
        rows: RowsOf | None = None,
        weights: Weights = None,
        weight: float = 1.0,
    ):
        super().__init__(rows=rows, weights=weights, weight=weight)
        if pool not in POOLS:
            raise ValueError(f"pool is {pool!r}: give one of {POOLS}")
        self.pool = pool

    def _ready(self, pairs, rows, mask):
        names = [check_pair(self, s, t, "features", key) for key, s, t in pairs]
        if len(pairs) < 2:
            raise ValueError(
                f"student_features is one layer of shape {tuple(pairs[0][1].shape)}: this loss compares consecutive "
                "layers, give lists of at least 2 on both sides"
            )
        sizes, pairs = [], [(s, constant(t)) for _, s, t in pairs]
        for both, named in zip(pairs, names, strict=True):
            sizes.append([check_map(x, rows, name) for x, name in zip(both, named, strict=True)])
            axis = 2 if both[0].dim() == 3 and rows == "groups" else 1
            same_channels(*(x[:1].movedim(axis, 1) for x in both), named)
            if len(both[0]) != len(pairs[0][0]):
                raise ValueError(
                    f"{named[0]} has {len(both[0])} samples, {names[0][0]} has {len(pairs[0][0])}: all layers describe "
                    "one batch"
                )
        one_size = len({size for both in sizes for size in both}) == 1
        kept = mask_of_positions(mask, pairs[0][0], sizes[0][0], names[0][0], one_size)
        ready = []
        for i in range(len(pairs) - 1):
            sides = []
            for k in (0, 1):
                layers = pairs[i][k], pairs[i + 1][k]
                sides += self._two_layers(*layers, sizes[i][k], sizes[i + 1][k], names[i + 1][k], rows, kept)
            ready.append((*sides, kept))
        return dict(enumerate(ready))

    def _two_layers(self, below, above, size, other, name, rows, kept):
        """Both as [B, C, L], the larger map pooled to the smaller."""
        if size != other:
            if len(size) != 2 or len(other) != 2:
                raise ValueError(
                    f"{name} has positions {other}, the layer before it {size}: only maps [B, C, H, W] are pooled"
                )
            target = tuple(map(min, size, other))
            below, above = (pooled(x, target, self.pool) for x in (below, above))
        return [channels_at_positions(x, rows, kept) for x in (below, above)]

    def _terms(self, below, above, teacher_below, teacher_above, kept):
        if self._too_small(len(below), self.least):
            return {self.part: zero_of(below) + zero_of(above)}
        flows = [_flow(below, above, kept), _flow(teacher_below, teacher_above, kept)]
        squares = (flows[0] - flows[1]).square().mean((1, 2))
        return {self.part: mean_of_groups(squares, kept, 1)}

    def _shown(self):
        return {"pool": repr(self.pool), **super()._shown()}


def _flow(below, above, kept):
    """F_l F_(l+1)' over the number of positions that count, [B, C_l, C_(l+1)]."""
    count = below.shape[2]
    if kept is not None and kept.shape[1] > 1:
        count = kept.sum(1).clamp_min(1)[:, None, None]
    return product(below, above.mT) / count
