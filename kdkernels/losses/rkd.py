# SPDX-License-Identifier: Apache-2.0
"""Relational knowledge distillation: distances of pairs and angles of triples of samples, one op a level each."""

from __future__ import annotations

import functools
import math

from .. import backend as backends
from .. import checks
from .._types import Backend, RowsOf, Weights
from ..distributed import GroupLike
from ..relation.op import rkd_angle, rkd_distance
from ..relation.problem import MINIMUM
from .base import FeatureLoss, zero_of


class RKDDistanceLoss(FeatureLoss):
    """Relational distillation by distances (RKD-D): the distances of all pairs of samples, over their mean.

    sum over levels of w_l mean_ik smooth_l1(d_ik(x) / mu(x) - d_ik(y) / mu(y)), mu the mean nonzero distance.

    Source: RKD-D of Park et al. 2019 (arXiv 1904.05068); formula of its reference implementation (lenscloth/RKD, also
    RepDistiller): Euclidean distances of the rows flattened per sample, mean over all n^2 pairs, a gradient through the
    student's mu too. Identical samples have distance 0 here; there 1e-6, which counts in mu. It has weight 25 beside
    the angles' 50 in RepDistiller, see `RKDLoss`; 1 is the formula itself.

    Args:
        rows: what a row is, for more than two dimensions. [B, T, d]: "tokens" (n = B T), "mean" (n = B) or "groups"
            (the pairs of each sample's tokens, averaged over samples), needed. [B, C, H, W]: "flatten" (default, the
            source's), "gap" or "positions". May also be given in the call.
        weights: one weight a level, a buffer; default 1 each. weight: factor of the loss, a buffer.
        group: "world" or a process group: the loss of the rows of all its ranks, see `kdkernels.distributed`.
        backend: as in `kd.rkd_distance`.

    Call: `(student_features, teacher_features, *, mask, rows, return_parts)`; a tensor, or a list or dict of levels
    with one mask for all or one a level. Widths, spatial sizes and float dtypes may differ between the sides; computed
    in at least float32. mask: bool [B], [B, T] or [B, H, W]: False rows enter neither means nor counts. Fewer than 2
    rows give 0 with zero gradient, and a warning once where the batch itself is that small. Memory is n x n: thousands
    of rows, not images times positions. A NaN in a row that counts gives NaN. Gradient to the student only.

    >>> student, teacher = torch.randn(32, 16, requires_grad=True), torch.randn(32, 64)
    >>> loss = kd.losses.RKDDistanceLoss(weight=25.0)
    >>> loss(student, teacher).backward()
    >>> bool(loss(teacher, 3 * teacher + 1) < 1e-6)
    True
    """

    part = "rkd_distance"
    least: int = MINIMUM["rkd_distance"]

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
        return rkd_distance(x, y, mask=kept, group=group, backend=self.backend)


class RKDAngleLoss(FeatureLoss):
    """Relational distillation by angles (RKD-A): the angles of all triples of samples.

    sum over levels of w_l mean_vik smooth_l1(cos_vik(x) - cos_vik(y)), the angle at v between samples i and k.

    Source: RKD-A of Park et al. 2019 (arXiv 1904.05068); formula of its reference implementation (lenscloth/RKD, also
    RepDistiller): mean over all n^3 triples, cosine 0 where v is identical with i or k. It has weight 50 in
    RepDistiller, see `RKDLoss`; 1 is the formula itself. The n x n x p differences of that implementation and its n^3
    cosines are never stored.

    Args:
        rows, weights, weight, group: as in `RKDDistanceLoss`.
        backend: as in `kd.rkd_angle`.

    Call, dtypes, masks: as in `RKDDistanceLoss`, with at least 3 rows. Time grows as n^3.

    >>> student, teacher = torch.randn(32, 16, requires_grad=True), torch.randn(32, 64)
    >>> loss = kd.losses.RKDAngleLoss(weight=50.0)
    >>> loss(student, teacher).backward()
    >>> bool(loss(teacher, 3 * teacher + 1) < 1e-6)
    True
    """

    part = "rkd_angle"
    least: int = MINIMUM["rkd_angle"]

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
        return rkd_angle(x, y, mask=kept, group=group, backend=self.backend)


class RKDLoss(FeatureLoss):
    """Relational distillation (RKD): distances of pairs and angles of triples of samples, in one loss.

    sum over levels of w_l [distance L_D + angle L_A], the terms of `RKDDistanceLoss` and `RKDAngleLoss`.

    Source: Park et al. 2019 (arXiv 1904.05068); formula and factors 25 and 50 as in RepDistiller.

    Args:
        distance, angle: factors of the two terms; 0 drops the term.
        rows, weights, weight, group: as in `RKDDistanceLoss`.
        backend: as in `kd.rkd_angle`; the distances take "auto" where they have no such backend.

    Call, dtypes, masks: as in `RKDDistanceLoss`, with at least 3 rows (2 without angles). parts: "rkd_distance",
    "rkd_angle".

    >>> student, teacher = torch.randn(32, 16, requires_grad=True), torch.randn(32, 64)
    >>> loss = kd.losses.RKDLoss()
    >>> total, parts = loss(student, teacher, return_parts=True)
    >>> total.backward()
    >>> sorted(parts)
    ['rkd_angle', 'rkd_distance']
    """

    least: int
    distance: float
    angle: float
    shown: tuple[str, ...] = ("distance", "angle")

    def __init__(
        self,
        distance: float = 25.0,
        angle: float = 50.0,
        *,
        rows: RowsOf | None = None,
        weights: Weights = None,
        weight: float = 1.0,
        group: GroupLike = None,
        backend: Backend = "auto",
    ):
        super().__init__(rows=rows, weights=weights, weight=weight, group=group)
        for value, name in ((distance, "distance"), (angle, "angle")):
            if not (checks.is_number(value) and 0 <= value < math.inf):
                raise ValueError(f"{name} is {value!r}: give a number >= 0")
        if distance == angle == 0:
            raise ValueError("distance and angle are both 0: nothing is left to compute")
        self.distance, self.angle, self.backend = float(distance), float(angle), backend
        self.least = MINIMUM["rkd_angle" if angle else "rkd_distance"]

    def _terms(self, x, y, kept, group=None):
        small = self._level_too_small(x, self.least, group)
        terms = {}
        for factor, op in ((self.distance, rkd_distance), (self.angle, rkd_angle)):
            if factor and small:
                terms[op.__name__] = zero_of(x)
            elif factor:
                value = functools.partial(self._op, op)
                terms[op.__name__] = factor * self._mean(value, x, y, kept, group, MINIMUM[op.__name__])
        return terms

    def _op(self, op, x, y, kept, group):
        has = op is rkd_angle or self.backend in backends.OPS[op.__name__].backends
        return op(x, y, mask=kept, group=group, backend=self.backend if has else "auto")
