# SPDX-License-Identifier: Apache-2.0
"""Correlation congruence in the two forms that the libraries call by that name, compositions of a few products."""

from __future__ import annotations

import math
from typing import Literal

import torch

from .. import checks
from .._types import Result, RowsOf, Weights
from ..autograd import apply, at_least_float32, device_type, plain
from ..backend import runs_compiled
from ..distributed import GroupLike
from .base import FeatureLoss, rows_of_pair, zero_where_masked
from .levels import at

VARIANTS = ("neighbour", "taylor")
NATIVE = ("neighbour_rows", "scale_pairs")


class CCLoss(FeatureLoss):
    """Correlation congruence (CC): how the samples of a batch relate, by neighbours or by a kernel of all pairs.

    Correlation congruence; "neighbour": mean_i sum_c |x_ic - y_ic| |x_(i+1)c - y_(i+1)c| over the n - 1 neighbours.

    "taylor": |K - L|_F / n^2 with K_ik = exp(-2 gamma) sum_(p <= order) (2 gamma)^p / p! (x_i.x_k)^p, L the same of y;
    the norm is not squared. On rows of length 1 (normalize=True) K expands the rbf kernel exp(-gamma |x_i - x_k|^2).

    Source: Peng et al. 2019 (arXiv 1904.01802). "neighbour" is the formula of RepDistiller's `Correlation` (sent to it
    by the paper's author), "taylor" that of torchdistill's `CCKDLoss` with its kernel "gaussian" and reduction
    "batchmean"; that library leaves rows as they are, and its documented example has gamma 0.4 and order 2 (`max_p`).
    The two have little in common. RepDistiller trains with weight 0.02: pass weight=0.02. 1 is the formula itself.

    Args:
        variant: "neighbour" or "taylor".
        gamma, order, normalize: of "taylor"; a number > 0, an integer >= 1, whether rows are divided by their norms.
        rows: what a row is, for more than two dimensions. [B, T, d]: "tokens" (n = B T), "mean" (n = B) or "groups"
            (one comparison a sample, n = T, averaged), needed. [B, C, H, W]: "flatten" (default), "gap" or
            "positions". May also be given in the call.
        weights: one weight a level, a buffer; default 1 each. weight: factor of the loss, a buffer.
        group: "world" or a process group: the loss of the rows of all its ranks, see `kdkernels.distributed`. The
            neighbour of a rank's last row is the first of the next.

    Call: `(student_features, teacher_features, *, mask, rows, return_parts)`; a tensor, or a list or dict of levels
    with one mask for all or one a level. "neighbour" needs one width on both sides (project the student's); "taylor"
    does not. float dtypes may differ; computed in at least float32, "taylor" in float64. mask: bool [B], [B, T] or [B,
    H, W]: the neighbour of a row is the next one that counts. "neighbour" needs 2 rows: fewer give 0 with zero
    gradient, and a warning once where the batch itself is that small. "taylor" has gradient 0 where both sides agree. A
    NaN in a row that counts gives NaN. Gradient to the student only.

    >>> student, teacher = torch.randn(32, 16, requires_grad=True), torch.randn(32, 16)
    >>> loss = kd.losses.CCLoss(weight=0.02)
    >>> loss(student, teacher).backward()
    >>> kd.losses.CCLoss("taylor", normalize=True)(teacher, teacher).item()
    0.0
    """

    gamma: float
    order: int
    normalize: bool
    part = "cc"

    def __init__(
        self,
        variant: Literal["neighbour", "taylor"] = "neighbour",
        *,
        gamma: float = 0.4,
        order: int = 2,
        normalize: bool = False,
        rows: RowsOf | None = None,
        weights: Weights = None,
        weight: float = 1.0,
        group: GroupLike = None,
    ):
        super().__init__(rows=rows, weights=weights, weight=weight, group=group)
        if variant not in VARIANTS:
            raise ValueError(f"variant is {variant!r}: give one of {VARIANTS}")
        if not (checks.is_number(gamma) and 0 < gamma < math.inf):
            raise ValueError(f"gamma is {gamma!r}: give a number > 0")
        checks.integer(order, "order")
        checks.flags(normalize=normalize)
        self.variant, self.gamma, self.order, self.normalize = variant, float(gamma), order, normalize
        self.least = 2 if variant == "neighbour" else 1

    def _compared(self, student, teacher, rows, mask, key):
        x, y, kept = rows_of_pair(self, student, teacher, rows, mask, "features", key)
        if self.variant == "neighbour" and x.shape[-1] != y.shape[-1]:
            raise ValueError(
                f"{at('teacher_features', key)} has rows of {y.shape[-1]} features, {at('student_features', key)} of "
                f"{x.shape[-1]}: the neighbour variant subtracts them; project the student's to the teacher's width"
            )
        return x, y, kept

    def _value(self, x, y, kept, group):
        if group is not None:
            x, y, kept = group.gather(x, y, kept)
        dtype = at_least_float32(x, y)
        if self.variant == "neighbour":
            eager = kept is None and dtype == torch.float32 and plain(x, y)
            if eager and runs_compiled("auto", device_type(x), NATIVE):
                return apply(Neighbours, x.float(), y.float())
            x, y = (zero_where_masked(side.to(dtype), kept) for side in (x, y))
            return neighbours((x - y).abs(), kept)
        x, y = (zero_where_masked(side, kept).double() for side in (x, y))
        return self._kernels(x, y, kept).to(dtype)

    def _kernels(self, x, y, kept):
        """|K - L|_F / n^2 of each group; float64, as K - L has fewer digits than K."""
        if self.normalize:
            x, y = unit_rows(x), unit_rows(y)
        apart = self._series(x @ x.mT) - self._series(y @ y.mT)
        n = x.shape[-2]
        if kept is not None:  # masked rows are 0 on both sides, and so are the differences of their kernels
            n = kept.sum(-1).clamp_min(1)
        return torch.linalg.vector_norm(apart, dim=(-2, -1)) / n**2

    def _series(self, g):
        """exp(-2 gamma) sum_(p = 1..order) (2 gamma g)^p / p!; the term of p = 0 is the same on both sides."""
        scaled, total = 2 * self.gamma * g, 0
        for p in range(self.order, 0, -1):
            total = scaled / p * (1 + total)
        return math.exp(-2 * self.gamma) * total

    def _shown(self):
        taylor = {"gamma": self.gamma, "order": self.order, "normalize": self.normalize}
        return {"variant": self.variant, **(taylor if self.variant == "taylor" else {}), **super()._shown()}


class Neighbours(torch.autograd.Function):
    """`neighbours(|x - y|, None)` of float32 rows on a CPU in one compiled pass, which finds the gradient to x too."""

    @staticmethod
    def forward(ctx, x, y) -> Result:
        need = ctx.needs_input_grad[0]
        both = (side if side.dim() == 3 else side[None] for side in (x, y))
        both = (side if side.stride(-1) == 1 else side.contiguous() for side in both)
        value, slope = torch.ops.kdkernels.neighbour_rows(*both, need)
        if need:
            ctx.save_for_backward(x, y, slope)
        return value if x.dim() == 3 else value[0]

    @staticmethod
    def backward(ctx, grad):
        x, y, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            return torch.autograd.grad(neighbours((x - y).abs(), None), x, grad, create_graph=True)[0], None
        dx = torch.ops.kdkernels.scale_pairs(grad.reshape(-1), slope, None)
        return dx if x.dim() == 3 else dx[0], None


def neighbours(apart, kept):
    """mean over the n - 1 pairs of a row and the next that counts of sum_c apart_ic apart_jc; apart [..., n, d]."""
    n = apart.shape[-2]
    if kept is None:
        return (apart[..., :-1, :] * apart[..., 1:, :]).sum(-1).mean(-1)
    # the first row that counts from each place on, n if there is none
    places = torch.arange(n, device=apart.device).expand(kept.shape)
    onward = torch.where(kept, places, n).flip(-1).cummin(-1).values.flip(-1)
    following = torch.cat([onward[..., 1:], torch.full_like(onward[..., :1], n)], -1)
    index = following.clamp_max(n - 1)[..., None].expand(apart.shape)
    products = (apart * apart.gather(-2, index)).sum(-1)
    products = torch.where(kept & (following < n), products, 0)
    return products.sum(-1) / (kept.sum(-1) - 1).clamp_min(1)


def unit_rows(x):
    """x / |x|, a row of zeros as it is and with gradient 0."""
    square = x.square().sum(-1, keepdim=True)
    return torch.where(square == 0, 0, x / torch.where(square == 0, 1, square).sqrt())
