# SPDX-License-Identifier: Apache-2.0
"""Attention transfer: distance of unit maps of the channels' energy at each position; one pass over each side's map."""

from __future__ import annotations

import math

import torch

from .. import checks
from .._types import Result, RowsOf, Weights
from ..autograd import apply, in_forward_mode
from .maps import MapLoss, unit


class ATLoss(MapLoss):
    """Attention transfer (AT): where in a feature map the activations are large, compared position by position.

    sum over levels of w_l mean over samples and positions of (a_s - a_t)^2, a = q / |q|_2, q = sum_c |F_c|^p.

    q is a map of positions, its norm one a sample. Source: Zagoruyko & Komodakis 2017 (arXiv 1612.03928), its
    activation-based loss; formula and defaults as in the authors' code, RepDistiller, mdistiller and mmrazor: p = 2 and
    the mean over B x H x W. (The paper writes the norm of a_s - a_t instead of the mean of its squares.) For odd p
    those libraries leave the sign of F_c in; here it is |F_c|^p, the paper's. The weight people use with it is 1000:
    pass weight=1000. 1 is the formula itself.

    Args:
        p: exponent, at least 1.
        rows: [B, C, H, W] needs none. [B, T, d]: "groups" (tokens are the positions, features the channels), needed;
            [B, C, L]: "positions". Other values are refused, as the loss is one of each sample's own positions.
        weights: one weight a level, a buffer; default 1 each. weight: factor of the loss, a buffer.

    Call: `(student_features, teacher_features, *, mask, rows, return_parts)`; a tensor, or a list or dict of levels
    with one mask for all or one a level. Channels may differ between the sides; of two sizes [H, W] the larger map is
    pooled to the smaller by adaptive means (of tokens there must be as many). Each side its own float dtype, computed
    in at least float32. mask: bool [B], or [B, T] or [B, H, W] where both sides have one size: masked positions enter
    neither the norms nor the mean; all masked gives 0. A single sample is no special case; an empty batch gives 0 and
    warns once. A map that is zero everywhere has a = 0, with gradient 0. A NaN that counts gives NaN. Gradient to the
    student only.

    The loss does not change with the scale of a sample's map, nor with the order of its channels; nor with their sign.

    >>> student, teacher = torch.randn(4, 16, 8, 8, requires_grad=True), torch.randn(4, 64, 8, 8)
    >>> loss = kd.losses.ATLoss(weight=1000.0)
    >>> loss(student, teacher).backward()
    >>> bool(loss(3 * teacher, teacher) < 1e-6)
    True
    """

    p: float
    part = "at"

    def __init__(self, p: float = 2.0, *, rows: RowsOf | None = None, weights: Weights = None, weight: float = 1.0):
        super().__init__(rows=rows, weights=weights, weight=weight)
        if not (checks.is_number(p) and 1 <= p < math.inf):
            raise ValueError(f"p is {p!r}: give an exponent of at least 1")
        self.p = float(p)

    def _value(self, x, y, kept):
        squares = (self._attention(x) - self._attention(y)).square()  # masked positions are 0 on both sides
        if kept is None:
            return squares.mean()
        return squares.sum() / kept.expand_as(squares).sum().clamp_min(1)

    def _attention(self, x):
        return unit(energy(x) if self.p == 2 else (x.abs() ** self.p).sum(1), 1)

    def _shown(self):
        return {"p": f"{self.p:g}", **super()._shown()}


def energy(x):
    """sum_c x_c^2 over dimension 1, with one pass for its gradient."""
    return x.square().sum(1) if in_forward_mode() else apply(_Energy, x)


class _Energy(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x) -> Result:
        return x.square().sum(1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return x * (2 * grad)[:, None]
