# SPDX-License-Identifier: Apache-2.0
"""Inter-channel correlation: distance of each sample's row-normalised C x C Gram matrices, all samples in one op."""

from __future__ import annotations

from .._types import Backend, RowsOf, Weights
from ..gram.op import gram_mse
from .base import mean_of_groups
from .maps import MapLoss


class ICKDLoss(MapLoss):
    """Inter-channel correlation (ICKD): how the channels of a feature map correlate with each other.

    sum over levels of w_l mean over samples of |G_s - G_t|_F^2 / C, G = F F' with each row divided by its L2 norm.

    F [C, L] is a sample's map, so G_ab correlates channels a and b. Source: Liu et al. 2021 (arXiv 2202.03680, the
    ICKD-C of its public CIFAR-100 code): the rows of the Gram matrix are normalised, not those of F. The weight of that
    code is 2.5. There the student's map first goes through an embedding that is trained with it,
    `nn.Sequential(nn.Conv2d(c_s, c_t, 1, bias=False), nn.BatchNorm2d(c_t))`: put it before this loss. The loss itself
    is the formula on what it is given and needs the same channels, one to one, on both sides.

    Args:
        rows: [B, C, H, W] needs none. [B, T, d]: "groups" (tokens are the positions, features the channels), needed;
            [B, C, L]: "positions". Other values are refused, as the loss is one of each sample's own positions.
        weights: one weight a level, a buffer; default 1 each. weight: factor of the loss, a buffer.
        backend: as in `kd.gram_mse`.

    Call: `(student_features, teacher_features, *, mask, rows, return_parts)`; a tensor, or a list or dict of levels
    with one mask for all or one a level. Sizes [H, W], numbers of tokens and float dtypes may differ between the sides,
    as the sums run over each side's own positions; computed in at least float32. mask: bool [B], or [B, T] or [B, H, W]
    where both sides have one size: masked positions are left out of the sums, a sample with none left out of the mean;
    all masked gives 0. A single sample is no special case; an empty batch gives 0 and warns once. A row of G that is
    zero stays zero, and the gradient is finite there (1e10 and more in the public code). A NaN that counts gives NaN.
    Gradient to the student only.

    The loss does not change with the scale of a sample's map or with the order of its positions.

    >>> student, teacher = torch.randn(4, 64, 4, 4, requires_grad=True), torch.randn(4, 64, 8, 8)
    >>> loss = kd.losses.ICKDLoss(weight=2.5)
    >>> loss(student, teacher).backward()
    >>> bool(loss(3 * teacher, teacher) < 1e-6)
    True
    """

    part = "ickd"
    one_size = False
    one_width = True

    def __init__(
        self, *, rows: RowsOf | None = None, weights: Weights = None, weight: float = 1.0, backend: Backend = "auto"
    ):
        super().__init__(rows=rows, weights=weights, weight=weight)
        self.backend = backend

    def _value(self, x, y, kept):
        value = gram_mse(x, y, normalize="row", reduction="sum", backend=self.backend)
        return mean_of_groups(value, kept, 1) / x.shape[1]
