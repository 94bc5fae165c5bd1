# SPDX-License-Identifier: Apache-2.0
"""Maximum mean discrepancy between the student's and the teacher's rows, one op a level, nothing (2n) x (2n) kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .. import checks
from .._types import Backend, RowsOf, Weights
from ..autograd import at_least_float32
from ..distributed import GroupLike
from ..gram.kernels import RBF, KernelLike, spec_of
from ..gram.op import mmd
from .base import FeatureLoss, rows_of_pair
from .levels import at
from .means import spread

# five kernels exp(-d2 / (f m)), f = 1/4 to 4: the usual bandwidths of the transfer-learning libraries
PRESETS = {"transfer": {"factors": (0.25, 0.5, 1.0, 2.0, 4.0), "unbiased": False}}


class MMDLoss(FeatureLoss):
    """Maximum mean discrepancy (MMD): whether the batch's features have the distribution of the teacher's.

    sum over levels of w_l MMD^2(X_l, Y_l) = mean k(x, x') + mean k(y, y') - 2 mean k(x, y), see `kd.mmd`.

    Source: Gretton et al. 2012 (JMLR 13). The defaults are those of `kd.mmd`: unbiased, one rbf kernel whose bandwidth
    is the median distance of both sides' rows together. `MMDLoss.preset("transfer")` is the multi-kernel form of the
    transfer-learning libraries (`mmd_rbf`: kernel_mul 2, kernel_num 5): biased, a sum of five rbf kernels around the
    mean squared distance. It has no canonical weight in distillation: 1 is ours.

    It compares two sets of rows: which row of the student belongs to which of the teacher plays no part.

    Args:
        kernel: a name or a kernel object such as `kd.RBF(sigma=(0.5, 1.0, 2.0))`, one for both sides.
        factors: None, or numbers f: then k = sum_f exp(-|x - x'|^2 / (f m)), in place of `kernel`, with m the mean
            squared distance of the distinct rows of both sides together; no gradient goes through m.
        unbiased: leave i = j out of the first two means (the value may be negative). It needs 2 rows, 1 if biased.
        rows: what a row is, for more than two dimensions. [B, T, d]: "tokens" (n = B T), "mean" (n = B) or "groups"
            (one MMD a sample, n = T, averaged), needed. [B, C, H, W]: "flatten" (default), "gap" or "positions". May
            also be given in the call.
        weights: one weight a level, a buffer; default 1 each. weight: factor of the loss, a buffer.
        group: "world" or a process group: the loss of the rows of all its ranks, see `kdkernels.distributed`.
        backend: as in `kd.mmd`.

    Call: `(student_features, teacher_features, *, mask, rows, return_parts)`; a tensor, or a list or dict of levels
    with one mask for all or one a level. Both sides need one width, as their rows lie in one space; float dtypes may
    differ; computed in at least float32. mask: bool [B], [B, T] or [B, H, W], of both sides: False rows do not count;
    too few rows give 0 with zero gradient, and a warning once where the batch itself is too small (a single sample, if
    unbiased). A NaN in a row that counts gives NaN. Gradient to the student only.

    >>> student, teacher = torch.randn(32, 16, requires_grad=True), torch.randn(32, 16) + 1
    >>> loss = kd.losses.MMDLoss.preset("transfer")
    >>> loss(student, teacher).backward()
    >>> bool(loss(teacher, teacher).abs() < 1e-6)
    True
    """

    factors: Sequence[float] | None
    kernel: KernelLike
    unbiased: bool
    part = "mmd"

    def __init__(
        self,
        kernel: KernelLike = "rbf",
        *,
        factors: Sequence[float] | None = None,
        unbiased: bool = True,
        rows: RowsOf | None = None,
        weights: Weights = None,
        weight: float = 1.0,
        group: GroupLike = None,
        backend: Backend = "auto",
    ):
        super().__init__(rows=rows, weights=weights, weight=weight, group=group)
        checks.flags(unbiased=unbiased)
        one, other = spec_of(kernel)
        if one is not other:
            raise ValueError("kernel is a pair: mmd compares both sides under one kernel function")
        if factors is not None:
            if kernel != "rbf":
                raise ValueError(f"kernel is {kernel!r} and factors are given: factors make a sum of rbf kernels")
            # exp(-d2 / (f m)) = exp(-(d2 / m) / (2 sigma^2)) on rows over sqrt(m)
            kernel = RBF(sigma=[(f / 2) ** 0.5 for f in check_factors(factors)])
        self.kernel, self.factors, self.unbiased, self.backend = kernel, factors, unbiased, backend
        self.least = 2 if unbiased else 1

    @classmethod
    def preset(cls, name: str, **changes: Any) -> MMDLoss:
        """The loss with a library's constants; `changes` go to the constructor."""
        if name not in PRESETS:
            raise ValueError(f"preset is {name!r}: give one of {tuple(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    def _compared(self, student, teacher, rows, mask, key):
        x, y, kept = rows_of_pair(self, student, teacher, rows, mask, "features", key)
        if x.shape[-1] != y.shape[-1]:
            raise ValueError(
                f"{at('teacher_features', key)} has rows of {y.shape[-1]} features, {at('student_features', key)} of "
                f"{x.shape[-1]}: MMD compares samples of one space; project the student's to the teacher's width"
            )
        return x, y, kept

    def _value(self, x, y, kept, group):
        if self.factors is not None:
            if group is not None:  # the spread is one of all ranks' rows
                (x, y, kept), group = group.gather(x, y, kept), None
            x, y = in_units_of_their_spread(x, y, kept)
        masks = None if kept is None else (kept, kept)
        return mmd(x, y, kernel=self.kernel, unbiased=self.unbiased, mask=masks, group=group, backend=self.backend)

    def _shown(self):
        shown = {"kernel": self.kernel} if self.factors is None else {"factors": self.factors}
        return {**shown, "unbiased": self.unbiased, **super()._shown()}


def check_factors(factors) -> list[float]:
    fine = isinstance(factors, (tuple, list)) and all(checks.is_number(f) and 0 < f < math.inf for f in factors)
    if not (fine and factors):
        raise ValueError(f"factors is {factors!r}: give a list of positive numbers")
    return [float(f) for f in factors]


def in_units_of_their_spread(x, y, kept):
    """Both sides over sqrt(m), m the mean squared distance between distinct rows of the two sides together."""
    dtype = at_least_float32(x, y)
    rows = torch.cat([side.detach().to(dtype) for side in (x, y)], dim=-2)
    both = None if kept is None else torch.cat([kept, kept], dim=-1)
    count = rows.shape[-2] if both is None else both.sum(-1, dtype=torch.float64)[..., None, None].clamp_min(2)
    apart = (spread(rows, both)[-1] * (2 * count / (count - 1)) ** 0.5).to(dtype)
    return x / apart, y / apart
