# SPDX-License-Identifier: Apache-2.0
"""Vanilla knowledge distillation: each divergence is a fused row op."""

from __future__ import annotations

import math

from .. import checks
from ..logits.checks import check_inside, check_rows, check_tau
from ..logits.op import DIVERGENCES, any_divergence, divergence, measure_of
from .base import Loss, check_pair, row_mask, zero_where_masked
from .means import mean_of_rows, weights_of_rows


class KDLoss(Loss):
    """tau^2 KL(p_t || p_s), p = softmax(z / tau), in nats, mean over the rows. Source: Hinton et al., arXiv 1503.02531.

    Args:
        tau: temperature, 4 by default (the usual choice on CIFAR-100; the paper has no default). TRL and Liger have 1
            and no tau^2.
        divergence: of p_t and p_s, times tau^2:
            "forward" KL(p_t || p_s), the paper's; "reverse" KL(p_s || p_t);
            "jsd" beta KL(p_t || m) + (1 - beta) KL(p_s || m), m = beta p_t + (1 - beta) p_s (GKD, arXiv 2306.13649, as
            in TRL and in Liger, which jump to the KL divergences at 0 and 1: near an end the value is beta, or
            1 - beta, times them);
            "skew" KL(p_t || skew p_t + (1 - skew) p_s) and "skew_reverse" KL(p_s || (1 - skew) p_t + skew p_s)
            (DistiLLM, arXiv 2402.03898); "tvd" half of sum |p_t - p_s|, whose slope at equal probabilities is 0.
        beta: of "jsd", in (0, 1); 0.5 is the Jensen-Shannon divergence. skew: of the skew ones, in (0, 1).
        scale_tau: False leaves tau^2 out.
        weight: factor of the loss, a buffer; 1 gives the formula.
        reduction: "mean" over the rows that count, or "sum".
        backend: as in `kd.distillation_kl`.

    Call: `(student_logits, teacher_logits, *, mask, labels, ignore_index=-100, normalizer, return_parts)`. Logits
    [..., C], each leading index a row, classes last (of maps [B, C, H, W] pass `logits.movedim(1, -1)`); float16 to
    float64, each side its own dtype, computed in at least float32. mask: bool [...], False rows do not count; labels
    [...] mark with ignore_index the rows that do not count. normalizer replaces the number of rows as divisor (gradient
    accumulation). A batch without rows, or all masked, gives 0 with zero gradient. A logit of -inf is a class with
    probability 0: where both sides have it, the class adds nothing; where only the student has it "forward", and where
    only the teacher has it "reverse", is inf (the latter's gradient NaN); the others are finite. NaN in a row that
    counts gives NaN. Gradient to the student only; second derivatives with backend="reference".

    >>> student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> loss = kd.losses.KDLoss(tau=4.0)
    >>> loss(student, teacher).backward()
    >>> loss(teacher, teacher).item()
    0.0
    """

    shown = ("tau", "divergence", "beta", "skew", "scale_tau", "reduction")

    def __init__(
        self,
        tau: float = 4.0,
        *,
        divergence: str = "forward",
        beta: float = 0.5,
        skew: float = 0.1,
        scale_tau: bool = True,
        weight: float = 1.0,
        reduction: str = "mean",
        backend: str = "auto",
    ):
        super().__init__(weight)
        if divergence not in tuple(DIVERGENCES):
            raise ValueError(f"divergence is {divergence!r}: give one of {tuple(DIVERGENCES)}")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction is {reduction!r}: give 'mean' or 'sum'")
        checks.flags(scale_tau=scale_tau)
        self.tau, self.divergence, self.reduction, self.backend = check_tau(tau), divergence, reduction, backend
        ends = ": its ends are other divergences, divergence='forward' and 'reverse'"
        self.beta, self.skew = check_inside(beta, "beta", ends), check_inside(skew, "skew", ends)
        self.scale_tau = scale_tau

    def forward(
        self,
        student_logits,
        teacher_logits,
        *,
        mask=None,
        labels=None,
        ignore_index: int = -100,
        normalizer=None,
        return_parts: bool = False,
    ):
        check_classes(self, student_logits, teacher_logits)
        counted = row_mask(mask, labels, ignore_index, student_logits, "student_logits")
        if student_logits.numel() == 0 and self._too_small(math.prod(student_logits.shape[:-1]), 1):
            return self._nothing(["kd"], student_logits, return_parts)
        student, teacher = student_logits, teacher_logits.detach() if teacher_logits.requires_grad else teacher_logits
        check_rows(student, teacher, "student_logits", "teacher_logits")
        scale = 1.0 if self.scale_tau else self.tau**-2
        if self.divergence not in ("forward", "reverse"):
            reduction, weights = weights_of_rows(counted, normalizer, self.reduction, student)
            pair = self._hidden(counted, student, teacher)
            how = measure_of(self.divergence, self.tau, self.beta, self.skew), None, reduction, self.backend
            value = any_divergence(*pair, *how, weights=weights, factor=scale)
            return self._total({"kd": value}, return_parts)
        # the op treats its second argument as the fixed side of the divergence, and differentiates in both
        pair = (student, teacher) if self.divergence == "forward" else (teacher, student)
        if counted is None and normalizer is None:
            checks.flags(return_parts=return_parts)
            weight = self.weight if self.scale_tau else self.weight * scale
            value = divergence(*pair, self.tau, self.reduction, self.backend, weight)
            return (value, {"kd": value}) if return_parts else value
        rows = divergence(*self._hidden(counted, *pair), self.tau, "none", self.backend)
        value = mean_of_rows(rows, counted, normalizer, self.reduction)
        return self._total({"kd": value if self.scale_tau else value * scale}, return_parts)

    def _hidden(self, counted, *sides):
        return (hidden(side, counted, self.backend) for side in sides)


def check_classes(loss, student_logits, teacher_logits):
    """Both sides are logits of the same rows and classes."""
    names = check_pair(loss, student_logits, teacher_logits, "logits")
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"{names[1]} has shape {tuple(teacher_logits.shape)}, {names[0]} {tuple(student_logits.shape)}: "
            "the loss needs the same rows and classes on both sides"
        )


def hidden(logits, counted, backend: str):
    """Logits whose masked rows may go to a row op: only the textbook lets a row with upstream 0 reach its gradient."""
    return zero_where_masked(logits, counted) if backend == "reference" else logits
