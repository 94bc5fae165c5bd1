# SPDX-License-Identifier: Apache-2.0
"""Similarity-preserving distillation: distance of the row-normalised Gram matrices of a batch, one op a level."""

from __future__ import annotations

from .._types import Backend, RowsOf, Weights
from ..distributed import GroupLike
from ..gram.op import gram_mse
from .base import FeatureLoss


class SPLoss(FeatureLoss):
    """Similarity preserving (SP): the pairwise similarities of a batch, row by row normalised.

    sum over levels of w_l / n^2 |K_l - L_l|_F^2, K = XX' and L = YY' with each row divided by its L2 norm.

    Source: Tung & Mori 2019 (arXiv 1907.09682); formula and default as in RepDistiller and mdistiller, on maps that are
    flattened per sample. The weight people use with it is 3000: pass weight=3000. 1 is the formula itself.

    Args:
        rows: what a row is, for more than two dimensions. [B, T, d]: "tokens" (n = B T), "mean" (n = B) or "groups"
            (one Gram matrix a sample, n = T, averaged), needed. [B, C, H, W]: "flatten" (default, the source's), "gap"
            or "positions". May also be given in the call.
        weights: one weight a level, a buffer; default 1 each. weight: factor of the loss, a buffer.
        group: "world" or a process group: the loss of the rows of all its ranks, see `kdkernels.distributed`.
        backend: as in `kd.gram_mse`.

    Call: `(student_features, teacher_features, *, mask, rows, return_parts)`; a tensor, or a list or dict of levels
    with one mask for all or one a level. Widths, spatial sizes and float dtypes may differ between the sides; computed
    in at least float32. mask: bool [B], [B, T] or [B, H, W]: False rows enter neither the matrices nor n; all masked
    gives 0. With one row both matrices are 1 and loss and gradient are 0 up to rounding; an empty batch gives 0 and
    warns once. A row of a matrix that is zero stays zero, and the gradient is finite there (1e10 and more in the public
    code). A NaN in a row that counts gives NaN. Gradient to the student only.

    The loss does not change with an orthogonal transform or the scale of the features.

    >>> student, teacher = torch.randn(32, 16, 4, 4, requires_grad=True), torch.randn(32, 64, 2, 2)
    >>> loss = kd.losses.SPLoss(weight=3000.0)
    >>> loss(student, teacher).backward()
    >>> bool(loss(teacher, 3 * teacher) < 1e-6)
    True
    """

    part = "sp"

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
        return gram_mse(x, y, normalize="row", mask=kept, group=group, backend=self.backend)
