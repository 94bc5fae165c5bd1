# SPDX-License-Identifier: Apache-2.0
"""DKD: the divergence split at the label; the part among the other classes is the fused row op on closed logits."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import softplus

from .. import checks
from ..autograd import at_least_float32
from ..logits.checks import check_tau
from ..logits.op import distillation_kl, kl
from .base import Loss, constant, full_precision, row_mask, zero_where_masked
from .kd import check_classes
from .means import mean_of_rows


class DKDLoss(Loss):
    """alpha TCKD + beta NCKD, each tau^2 KL, mean over the rows; nats.

    TCKD = KL of (p_y, 1 - p_y), the label y against all others; NCKD = KL of the softmax over the classes other than
    y; p = softmax(z / tau). Source: Decoupled Knowledge Distillation, arXiv 2203.08679; formula and defaults of its
    reference implementation (mdistiller): alpha = 1, beta = 8, tau = 4, warm-up 20 epochs, cross-entropy of weight 1
    beside it. Where that code takes log(p) and hides the label by -1000, this stays finite and exact: the label is
    closed, and log(1 - p_y) is never a difference.

    Args:
        alpha, beta: factors of the two terms; 0 drops the term.
        tau: temperature.
        warmup: epochs over which the loss rises: after `set_epoch(epoch)` it is multiplied by min(epoch / warmup, 1),
            epochs counted from 1. Until `set_epoch` is called it is the formula itself; 0 is no warm-up.
        weight: factor of the whole loss, a buffer. reduction: "mean" over the rows that count, or "sum".
        backend: as in `kd.distillation_kl`.

    Call: `(student_logits, teacher_logits, labels, *, mask, ignore_index=-100, normalizer, return_parts)`: logits
    [..., C] with C >= 2, labels int [...]; rows whose label is ignore_index do not count. Masks, dtypes, the empty
    batch and NaN as in `KDLoss`. A row in which a side leaves no class but the label open (-inf) gives NaN. A label out
    of range raises for CPU tensors. Gradient to the student only. parts: "tckd", "nckd". Buffers: weight, warm.

    >>> student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> labels = torch.randint(10, (8,))
    >>> loss = kd.losses.DKDLoss()
    >>> loss.set_epoch(5)
    >>> loss(student, teacher, labels).backward()
    """

    shown = ("alpha", "beta", "tau", "warmup", "reduction")

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        tau: float = 4.0,
        *,
        warmup: int = 20,
        weight: float = 1.0,
        reduction: str = "mean",
        backend: str = "auto",
    ):
        super().__init__(weight)
        for value, name in ((alpha, "alpha"), (beta, "beta"), (warmup, "warmup")):
            if not (checks.is_number(value) and 0 <= value < math.inf):
                raise ValueError(f"{name} is {value!r}: give a number >= 0")
        if alpha == beta == 0:
            raise ValueError("alpha and beta are both 0: nothing is left to compute")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction is {reduction!r}: give 'mean' or 'sum'")
        self.alpha, self.beta, self.tau, self.warmup = float(alpha), float(beta), check_tau(tau), warmup
        self.reduction, self.backend = reduction, backend
        self.register_buffer("warm", torch.ones(()))

    def set_epoch(self, epoch: float):
        """The epoch that is about to run, counted from 1; in place, so nothing recompiles."""
        self.warm.fill_(min(epoch / self.warmup, 1.0) if self.warmup else 1.0)

    def forward(
        self,
        student_logits,
        teacher_logits,
        labels,
        *,
        mask=None,
        ignore_index: int = -100,
        normalizer=None,
        return_parts: bool = False,
    ):
        check_classes(self, student_logits, teacher_logits)
        if student_logits.dim() < 2 or student_logits.shape[-1] < 2:
            raise ValueError(
                f"student_logits has shape {tuple(student_logits.shape)}: give [..., C] with C >= 2 classes"
            )
        counted = row_mask(mask, labels, ignore_index, student_logits, "student_logits")
        names = [name for name, factor in (("tckd", self.alpha), ("nckd", self.beta)) if factor]
        if self._too_small(math.prod(student_logits.shape[:-1]), 1):
            return self._nothing(names, student_logits, return_parts)
        C = student_logits.shape[-1]
        label = torch.where(labels == ignore_index, 0, labels).long()[..., None]
        if (
            label.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and bool(((label < 0) | (label >= C)).any())
        ):
            raise ValueError(f"labels holds a value outside 0 to {C - 1}, which are the classes")
        with full_precision(student_logits):
            dtype = at_least_float32(student_logits, teacher_logits)
            sides = [zero_where_masked(side, counted).to(dtype) for side in (student_logits, constant(teacher_logits))]
            others = [side.scatter(-1, label, -math.inf) for side in sides]
            rows = {}
            if self.alpha:
                rows["tckd"] = self.alpha * self._target_rows(sides, others, label)
            if self.beta:
                how = {"tau": self.tau, "reduction": "none", "backend": self.backend}
                rows["nckd"] = self.beta * distillation_kl(*others, **how)
            parts = {
                name: mean_of_rows(value, counted, normalizer, self.reduction) * self.warm.to(dtype)
                for name, value in rows.items()
            }
            return self._total(parts, return_parts)

    def _target_rows(self, sides, others, label):
        """tau^2 KL of (p_y, 1 - p_y), from the log odds of the label."""
        odds_s, odds_t = (
            (side.gather(-1, label)[..., 0] / self.tau) - (other / self.tau).logsumexp(-1)
            for side, other in zip(sides, others, strict=True)
        )
        p, q = (torch.stack([odds, -odds], -1).sigmoid() for odds in (odds_s, odds_t))
        w = torch.stack([softplus(-odds_t) - softplus(-odds_s), softplus(odds_t) - softplus(odds_s)], -1)
        return self.tau**2 * kl(p, q, w)
