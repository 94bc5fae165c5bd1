# SPDX-License-Identifier: Apache-2.0
"""Mean squared difference of the linear Gram matrices of a batch, one op a level, no n x n beyond what the op needs."""

from __future__ import annotations

from .._types import Backend, RowsOf, Weights
from ..distributed import GroupLike
from ..gram.op import gram_mse
from .base import FeatureLoss


class GramMSELoss(FeatureLoss):
    """Squared distance of the Gram matrices of the two sides over the batch, scale included.

    sum over levels of w_l / n^2 |XX' - YY'|_F^2, X and Y the student's and teacher's rows.

    Source: `kd.gram_mse`; the relation of SP (`kd.losses.SPLoss`) without its row norms. It has no canonical weight: 1
    is ours. The value goes as the fourth power of the features' scale and with their width: divide both sides by a
    constant (the teacher's norm, say) where that is large. What it does not change with is an orthogonal transform.

    Args:
        rows: what a row is, for more than two dimensions. [B, T, d]: "tokens" (n = B T), "mean" (n = B) or "groups"
            (one Gram matrix a sample, n = T, averaged), needed. [B, C, H, W]: "flatten" (default), "gap" or
            "positions". May also be given in the call.
        weights: one weight a level, a buffer; default 1 each. weight: factor of the loss, a buffer.
        group: "world" or a process group: the loss of the rows of all its ranks, see `kdkernels.distributed`.
        backend: as in `kd.gram_mse`.

    Call: `(student_features, teacher_features, *, mask, rows, return_parts)`; a tensor, or a list or dict of levels
    with one mask for all or one a level. Widths, spatial sizes and float dtypes may differ between the sides; computed
    in at least float32. mask: bool [B], [B, T] or [B, H, W]: False rows enter neither the matrices nor n; all masked
    gives 0. With one row the loss is (|x|^2 - |y|^2)^2; an empty batch gives 0 and warns once. A NaN in a row that
    counts gives NaN. Gradient to the student only.

    >>> student, teacher = torch.randn(32, 16, requires_grad=True), torch.randn(32, 64)
    >>> loss = kd.losses.GramMSELoss()
    >>> loss(student, teacher).backward()
    >>> loss(teacher, teacher).item()
    0.0
    """

    part = "gram_mse"

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
        return gram_mse(x, y, mask=kept, group=group, backend=self.backend)
