# SPDX-License-Identifier: Apache-2.0
"""Feature distillation by centred kernel alignment: one op a level, no n x n matrix beyond what the op needs."""

from __future__ import annotations

from .._types import Backend, RowsOf, Weights
from ..distributed import GroupLike
from ..gram.call import Question, minimum_rows
from ..gram.kernels import KernelLike
from ..gram.op import cka
from .base import FeatureLoss
from .means import with_spread


class CKALoss(FeatureLoss):
    """Centred kernel alignment (CKA): one minus the similarity of the two sides' kernel matrices over the batch.

    sum over levels of w_l (1 - CKA(K_l, L_l)), K_l, L_l the kernel matrices of the student's and teacher's features.

    Source: CKA is Kornblith et al. 2019 (arXiv 1905.00414); as a loss, 1 - CKA, it has no canonical weight: 1 is ours.
    With the unbiased estimator the value can slightly exceed 1, and does not drift with the batch size.

    CKA does not change with the scale of the features, so its gradient goes as 1/|x|: at initialisation, where features
    are small, a large weight can drown the cross-entropy and training may collapse. `kd.losses.Ramp` mends it.

    Args:
        kernel: a name, a kernel object such as `kd.RBF()`, or a pair (student's, teacher's). A bandwidth that follows
            from the student's rows ("median", "mean") counts in its gradient as their spread does, the root mean square
            distance from their mean: taken for a constant, as `kd.cka` does, it rewards a student that collapses.
        unbiased, center: the estimator, see `kd.cka`. It needs 4 rows; 2 if biased; 1 if also uncentred.
        rows: what a row is, for more than two dimensions. [B, T, d]: "tokens", "mean" or "groups" (one CKA a sample,
            averaged), needed. [B, C, H, W]: "flatten" (default), "gap" or "positions". May also be given in the call.
        weights: one weight a level, a buffer; default 1 each. weight: factor of the loss, a buffer.
        group: "world" or a process group: the loss of the rows of all its ranks, see `kdkernels.distributed`.
        backend: as in `kd.cka`.

    Call: `(student_features, teacher_features, *, mask, rows, return_parts)`; a tensor, or a list or dict of levels
    with one mask for all or one a level. Widths and float dtypes may differ between the sides; computed in at least
    float32. mask: bool [B], [B, T] or [B, H, W]: False rows do not count. A batch with fewer rows than the estimator
    needs gives 0 with zero gradient and warns once; so does, without a warning, a mask that leaves too few. Where a
    side is constant CKA is undefined: it counts as 0, so the loss is 1 there, with zero gradient. A NaN in a row that
    counts gives NaN. Gradient to the student only.

    >>> student, teacher = torch.randn(32, 16, requires_grad=True), torch.randn(32, 64)
    >>> loss = kd.losses.CKALoss(kernel="rbf")
    >>> loss(student, teacher).backward()
    >>> bool(loss(teacher, teacher).abs() < 1e-6)
    True
    """

    least: int
    unbiased: bool
    center: bool
    shown: tuple[str, ...] = ("kernel", "unbiased", "center")
    part = "cka"

    def __init__(
        self,
        kernel: KernelLike = "linear",
        *,
        unbiased: bool = True,
        center: bool = True,
        rows: RowsOf | None = None,
        weights: Weights = None,
        weight: float = 1.0,
        group: GroupLike = None,
        backend: Backend = "auto",
    ):
        super().__init__(rows=rows, weights=weights, weight=weight, group=group)
        check_estimator(kernel, unbiased, center, False)
        self.kernel, self.unbiased, self.center, self.backend = kernel, unbiased, center, backend
        self.least = minimum_rows(unbiased, center)

    def _value(self, x, y, kept, group):
        return 1 - cka_of(self, x, y, kept, group)


def cka_of(loss, x, y, mask, group=None, row_normalize: bool = False):
    """`kd.cka` of the student's rows x and the teacher's y with the options of a loss, to be trained."""
    (x,) = with_spread(loss.kernel, mask, group, x)
    how = {"kernel": loss.kernel, "unbiased": loss.unbiased, "center": loss.center, "backend": loss.backend}
    return cka(x, y, mask=mask, row_normalize=row_normalize, group=group, **how)


def check_estimator(kernel, unbiased: bool, center: bool, row_normalize: bool):
    """Refuses at construction what the op would refuse at the first batch."""
    Question("cka", kernel, unbiased, center, row_normalize, True).kernels()
