# SPDX-License-Identifier: Apache-2.0
"""Vanilla knowledge distillation: a divergence of the tempered softmaxes, here in plain PyTorch."""

from __future__ import annotations

import math

import torch

from .base import Loss, check_pair, full_precision, mean_of_rows, row_mask, zero_where_masked
from .base import at_least_float32 as dtype_of

DIVERGENCES = ("forward", "reverse", "jsd")


class KDLoss(Loss):
    """tau^2 KL(p_t || p_s), p = softmax(z / tau), in nats, mean over the rows. Source: Hinton et al., arXiv 1503.02531.

    Args:
        tau: temperature, 4 by default (the usual choice on CIFAR-100; the paper has no default).
        divergence: "forward" KL(p_t || p_s), the paper's; "reverse" KL(p_s || p_t); "jsd" the Jensen-Shannon divergence
            [KL(p_t || m) + KL(p_s || m)] / 2 with m = (p_t + p_s) / 2. Each times tau^2.
        weight: factor of the loss, a buffer; 1 gives the formula.
        reduction: "mean" over the rows that count, or "sum".

    Call: `(student_logits, teacher_logits, *, mask, labels, ignore_index=-100, normalizer, return_parts)`. Logits
    [..., C], each leading index a row; float16 to float64, each side its own dtype, computed in at least float32. mask:
    bool [...], False rows do not count; labels [...] mark with ignore_index the rows that do not count. normalizer
    replaces the number of rows as divisor (gradient accumulation). A batch without rows, or all masked, gives 0 with
    zero gradient. A logit of -inf is a class with probability 0: where both sides have it, the class adds nothing. NaN
    in a row that counts gives NaN. Gradient to the student only.

    >>> student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> loss = kd.losses.KDLoss(tau=4.0)
    >>> loss(student, teacher).backward()
    >>> loss(teacher, teacher).item()
    0.0
    """

    def __init__(self, tau: float = 4.0, *, divergence: str = "forward", weight: float = 1.0, reduction: str = "mean"):
        super().__init__(weight)
        if not (tau > 0 and math.isfinite(tau)):
            raise ValueError(f"tau is {tau!r}: a temperature is a positive number")
        if divergence not in DIVERGENCES:
            raise ValueError(f"divergence is {divergence!r}: give one of {DIVERGENCES}")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction is {reduction!r}: give 'mean' or 'sum'")
        self.tau, self.divergence, self.reduction = float(tau), divergence, reduction

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
        names = check_pair(student_logits, teacher_logits, "logits")
        if student_logits.shape != teacher_logits.shape:
            raise ValueError(
                f"{names[1]} has shape {tuple(teacher_logits.shape)}, {names[0]} {tuple(student_logits.shape)}: "
                "the divergence needs the same rows and classes on both sides"
            )
        counted = row_mask(mask, labels, ignore_index, student_logits, names[0])
        rows = math.prod(student_logits.shape[:-1])
        if self._too_small(rows, 1):
            return self._nothing(["kd"], student_logits, return_parts)
        with full_precision(student_logits):
            dtype = dtype_of(student_logits, teacher_logits)
            student = zero_where_masked(student_logits, counted).to(dtype) / self.tau
            teacher = zero_where_masked(teacher_logits.detach(), counted).to(dtype) / self.tau
            per_row = self._divergence(student.log_softmax(-1), teacher.log_softmax(-1)) * self.tau**2
            return self._total({"kd": mean_of_rows(per_row, counted, normalizer, self.reduction)}, return_parts)

    def _divergence(self, log_s, log_t):
        if self.divergence == "forward":
            return kl(log_t, log_s)
        if self.divergence == "reverse":
            return kl(log_s, log_t)
        # logaddexp of two -inf has no gradient
        least = torch.finfo(log_s.dtype).min / 2
        log_m = torch.logaddexp(log_s.clamp_min(least), log_t.clamp_min(least)) - math.log(2)
        return (kl(log_t, log_m) + kl(log_s, log_m)) / 2

    def _shown(self):
        return {"tau": self.tau, "divergence": self.divergence, "reduction": self.reduction}


def kl(log_p, log_q):
    """sum_c p_c (log p_c - log q_c), a class with p_c = 0 adding nothing."""
    p = log_p.exp()
    return (p * torch.where(p > 0, log_p - log_q, 0)).sum(-1)
