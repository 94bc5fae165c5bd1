# SPDX-License-Identifier: Apache-2.0
"""Neuron selectivity transfer: a polynomial MMD between channels as one Gram distance over positions, never C x C x HW.

mean_ab (s_a.s_b)^2 + mean_ab (t_a.t_b)^2 - 2 mean_ab (s_a.t_b)^2 of channels s_a, t_b as vectors over L positions is
|S'S / C_s - T'T / C_t|_F^2, two L x L matrices a sample; where C < L, C x C ones, with the same value.
"""

from __future__ import annotations

from .._types import Backend, RowsOf, Weights
from ..gram.op import gram_mse
from .base import mean_of_groups
from .maps import MapLoss, unit


class NSTLoss(MapLoss):
    """Neuron selectivity transfer (NST): the distribution of activation patterns over the channels of a map.

    sum over levels of w_l mean over samples of MMD^2 between student's and teacher's channels, k(s, t) = (s.t)^2.

    Source: Huang & Wang 2017 (arXiv 1707.01219); formula and defaults as in RepDistiller and mdistiller: each channel's
    map divided by its L2 norm over the positions, the degree-2 kernel without a constant, its biased means over all
    pairs of channels. The term of the teacher alone is part of the value, there too; B x C x C x HW is stored nowhere.
    The weight people use with it is 50: pass weight=50. 1 is the formula itself.

    Args:
        rows: [B, C, H, W] needs none. [B, T, d]: "groups" (tokens are the positions, features the channels), needed;
            [B, C, L]: "positions". Other values are refused, as the loss is one of each sample's own positions.
        weights: one weight a level, a buffer; default 1 each. weight: factor of the loss, a buffer.
        backend: as in `kd.gram_mse`.

    Call: `(student_features, teacher_features, *, mask, rows, return_parts)`; a tensor, or a list or dict of levels
    with one mask for all or one a level. Channels may differ between the sides; of two sizes [H, W] the larger map is
    pooled to the smaller by adaptive means (of tokens there must be as many). Each side its own float dtype, computed
    in at least float32. mask: bool [B], or [B, T] or [B, H, W] where both sides have one size: masked positions are
    left out of the norms and of the products, a sample with none left out of the mean; all masked gives 0. A single
    sample is no special case; an empty batch gives 0 and warns once. A channel that is zero everywhere stays zero, with
    gradient 0. A NaN that counts gives NaN. Gradient to the student only.

    The loss does not change with the order, the sign or the scale of channels.

    >>> student, teacher = torch.randn(4, 16, 8, 8, requires_grad=True), torch.randn(4, 64, 8, 8)
    >>> loss = kd.losses.NSTLoss(weight=50.0)
    >>> loss(student, teacher).backward()
    >>> bool(loss(teacher.flip(1), teacher) < 1e-6)
    True
    """

    part = "nst"

    def __init__(
        self, *, rows: RowsOf | None = None, weights: Weights = None, weight: float = 1.0, backend: Backend = "auto"
    ):
        super().__init__(rows=rows, weights=weights, weight=weight)
        self.backend = backend

    def _value(self, x, y, kept):
        s, t = (unit(side, 2).mT / side.shape[1] ** 0.5 for side in (x, y))
        return mean_of_groups(gram_mse(s, t, reduction="sum", backend=self.backend), kept, 1)
