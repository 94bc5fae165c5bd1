# SPDX-License-Identifier: Apache-2.0
"""Probabilistic knowledge transfer: the similarities of each sample to all others as a distribution, one op a level."""

from __future__ import annotations

from .._types import Backend, RowsOf, Weights
from ..distributed import GroupLike
from ..relation.op import pkt
from ..relation.problem import MINIMUM
from .base import FeatureLoss


class PKTLoss(FeatureLoss):
    """Probabilistic knowledge transfer (PKT): each sample's cosine similarities to the others, as probabilities.

    sum over levels of w_l mean_ik T_ik log((T_ik + 1e-7) / (P_ik + 1e-7)), rows of (cos + 1) / 2 with sum 1.

    Source: Passalis and Tefas 2018 (arXiv 1803.10837); formula of its reference implementation
    (passalis/probabilistic_kt, also RepDistiller): cosines of the rows flattened per sample with themselves too, 1e-7
    beside each norm, mean over n^2. Its in-place writes over NaN are not needed here. RepDistiller trains with weight
    30000: pass weight=30000. 1 is the formula itself.

    Args:
        rows: what a row is, for more than two dimensions. [B, T, d]: "tokens" (n = B T), "mean" (n = B) or "groups"
            (the tokens of each sample, averaged over samples), needed. [B, C, H, W]: "flatten" (default, the source's),
            "gap" or "positions". May also be given in the call.
        weights: one weight a level, a buffer; default 1 each. weight: factor of the loss, a buffer.
        group: "world" or a process group: the loss of the rows of all its ranks, see `kdkernels.distributed`.
        backend: as in `kd.pkt`.

    Call: `(student_features, teacher_features, *, mask, rows, return_parts)`; a tensor, or a list or dict of levels
    with one mask for all or one a level. Widths, spatial sizes and float dtypes may differ between the sides; computed
    in at least float32. mask: bool [B], [B, T] or [B, H, W]: False rows are in no distribution. Fewer than 2 rows give
    0 with zero gradient, and a warning once where the batch itself is that small. A zero row has cosine 0 to all and
    gradient 0. The loss does not change with the length of a row, or with an orthogonal transform. A NaN in a row that
    counts gives NaN. Gradient to the student only.

    >>> student, teacher = torch.randn(32, 16, requires_grad=True), torch.randn(32, 64)
    >>> loss = kd.losses.PKTLoss(weight=30000.0)
    >>> loss(student, teacher).backward()
    >>> bool(loss(teacher, 3 * teacher).abs() < 1e-6)
    True
    """

    part = "pkt"
    least: int = MINIMUM["pkt"]

    def __init__(
        self,
        *,
        rows: RowsOf | None = None,
        weights: Weights = None,
        weight: float = 1.0,
        group: GroupLike = None,
        backend: Backend = "auto",
    ):
        super().__init__(rows=rows, weights=weights, weight=weight, group=group)
        self.backend = backend

    def _value(self, x, y, kept, group):
        return pkt(x, y, mask=kept, group=group, backend=self.backend)
