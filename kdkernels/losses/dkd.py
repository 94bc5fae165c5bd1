# SPDX-License-Identifier: Apache-2.0
"""DKD: the divergence split at the label; the part among the other classes is the fused row op on closed logits."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import softplus

from .. import checks
from .._types import Backend, Mask, Number, Reduction, Result
from ..autograd import at_least_float32
from ..distributed import GroupLike
from ..logits.checks import check_taus
from ..logits.op import Asked, distillation_kl, kind, kind_of_slices, kl
from .base import Loss, constant, full_precision
from .mesh import over_mesh
from .rows import NAMES, Logits, hold_tau, of_heads, on_mesh, over_heads, rows_of, sides, stored
from .slices import sliced


class DKDLoss(Loss):
    """Decoupled distillation (DKD): the divergence of the label against the rest, and that among the other classes.

    alpha TCKD + beta NCKD, each tau^2 KL, mean over the rows; nats.

    TCKD = KL of (p_y, 1 - p_y), the label y against all others; NCKD = KL of the softmax over the classes other than
    y; p = softmax(z / tau). Source: Decoupled Knowledge Distillation, arXiv 2203.08679; formula and defaults of its
    reference implementation (mdistiller): alpha = 1, beta = 8, tau = 4, warm-up 20 epochs, cross-entropy of weight 1
    beside it. Where that code takes log(p) and hides the label by -1000, this stays finite and exact: the label is
    closed, and log(1 - p_y) is never a difference.

    Args:
        alpha, beta: factors of the two terms; 0 drops the term.
        tau: temperature: a number, or a tensor [] or one a row, as in `KDLoss`.
        warmup: epochs over which the loss rises: after `set_epoch(epoch)` it is multiplied by min(epoch / warmup, 1),
            epochs counted from 1. Until `set_epoch` is called it is the formula itself; 0 is no warm-up.
        weight: factor of the whole loss, a buffer. reduction: "mean" over the rows that count, or "sum".
        backend: as in `kd.distillation_kl`.

    Call: `(student_logits, teacher_logits, labels, *, mask, ignore_index=-100, token_weights, normalizer, vocab, chunk,
    group, return_parts)`: logits [..., C] with C >= 2, or `kd.LinearLogits`, labels int [...], below vocab; rows whose
    label is ignore_index do not count. Masks, weights, vocabularies, chunk, group, DTensors, dtypes, the empty batch
    and NaN as in `KDLoss`. A row in which a side leaves no class but the label open (-inf) gives NaN. A label out of
    range raises for CPU tensors. Gradient to the student only. parts: "tckd", "nckd". Buffers: weight, warm.

    >>> student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> labels = torch.randint(10, (8,))
    >>> loss = kd.losses.DKDLoss()
    >>> loss.set_epoch(5)
    >>> loss(student, teacher, labels).backward()
    """

    alpha: float
    beta: float
    warmup: int
    takes_heads = True
    shown: tuple[str, ...] = ("alpha", "beta", "tau", "warmup", "reduction")

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        tau: float | torch.Tensor = 4.0,
        *,
        warmup: int = 20,
        weight: float = 1.0,
        reduction: Reduction = "mean",
        backend: Backend = "auto",
    ):
        super().__init__(weight)
        for value, name in ((alpha, "alpha"), (beta, "beta"), (warmup, "warmup")):
            if not (checks.is_number(value) and 0 <= value < math.inf):
                raise ValueError(f"{name} is {value!r}: give a number >= 0")
        if alpha == beta == 0:
            raise ValueError("alpha and beta are both 0: nothing is left to compute")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction is {reduction!r}: give 'mean' or 'sum'")
        hold_tau(self, tau)
        self.alpha, self.beta, self.warmup = float(alpha), float(beta), warmup
        self.reduction, self.backend = reduction, backend
        self.register_buffer("warm", torch.ones(()))

    def set_epoch(self, epoch: float) -> None:
        """The epoch that is about to run, counted from 1; in place, so nothing recompiles."""
        self.warm.fill_(min(epoch / self.warmup, 1.0) if self.warmup else 1.0)

    def forward(
        self,
        student_logits: Logits,
        teacher_logits: Logits,
        labels: torch.Tensor,
        *,
        mask: Mask = None,
        ignore_index: int = -100,
        token_weights: torch.Tensor | None = None,
        normalizer: Number | None = None,
        vocab: int | None = None,
        chunk: int | None = None,
        group: GroupLike = None,
        return_parts: bool = False,
    ) -> Result:
        given, marks = (student_logits, teacher_logits), {"mask": mask, "labels": labels, "ignore_index": ignore_index}
        marks.update(token_weights=token_weights, normalizer=normalizer)
        if on_mesh(*given):
            call = {"vocab": vocab, "chunk": chunk, "return_parts": return_parts}
            return over_mesh(self, given, marks, call)
        *given, vocab, slices = sliced(self, given, vocab, group, marks)
        student, teacher = sides(self, *given, vocab)
        C = student.shape[-1] if slices is None else sum(slices.sizes)
        if len(student.shape) < 2 or C < 2:
            raise ValueError(f"student_logits has shape {tuple(student.shape)}: give [..., C] with C >= 2 classes")
        rows = rows_of(student, self.reduction, **marks)
        names = [name for name, factor in (("tckd", self.alpha), ("nckd", self.beta)) if factor]
        if self._too_small(math.prod(student.shape[:-1]), 1):
            return self._nothing(names, getattr(student_logits, "tensors", student_logits), return_parts)
        tau, taus = check_taus(self.tau, student, NAMES[0])
        tau = tau if taus is None else taus.reshape(student.shape[:-1])
        label = torch.where(labels == ignore_index, 0, labels).long()
        if (
            label.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and bool(((label < 0) | (label >= C)).any())
        ):
            raise ValueError(f"labels holds a value outside 0 to {C - 1}, which are the classes")
        teacher = teacher.detach()
        if slices is not None or of_heads(student, teacher) and self.backend != "reference":
            asked = Asked("decoupled", (), self.backend, chunk=chunk, slices=slices)
            return self._of_heads((student, teacher), rows, (label.reshape(-1), taus), asked, return_parts)
        with full_precision(label):
            x, y = stored(*(rows.hidden(side, "reference") for side in (student, teacher)))
            values = part_rows((x, constant(y)), label, tau, (self.alpha, self.beta), Whole(self.backend))
            parts = {name: rows.mean(value) * self.warm.to(value.dtype) for name, value in values.items()}
            return self._total(parts, return_parts)

    def _of_heads(self, pair, rows, of_rows, asked, return_parts):
        """One pass over the heads; parts that are asked for take one each."""
        tau = 0.0 if of_rows[1] is not None else self.tau
        factors = (
            {"tckd": (self.alpha, 0.0), "nckd": (0.0, self.beta)} if return_parts else {"": (self.alpha, self.beta)}
        )
        parts = {}
        for name, both in factors.items():
            if any(both):
                value = over_heads(pair, rows, asked._replace(numbers=(*both, tau)), *of_rows)
                parts[name] = value * self.warm.to(value.dtype)
        return self._total(parts, return_parts)


class Whole:
    """Rows [..., C] with all their classes; `Slices` has the same of rows whose classes other ranks have, too."""

    def __init__(self, backend):
        self.backend = backend

    def chosen(self, x, classes):
        return x.gather(-1, classes)

    def without(self, x, classes):
        return x.scatter(-1, classes, -math.inf)

    def logsumexp(self, x):
        return x.logsumexp(-1)

    def forward_kl(self, student, teacher, tau):
        return distillation_kl(student, teacher, tau=tau, reduction="none", backend=self.backend)


def part_rows(pair, label, tau, factors, over):
    """The terms of each row times their factors, those that are not 0."""
    (alpha, beta), dtype, label = factors, at_least_float32(*pair), label[..., None]
    pair = tuple(side.to(dtype) for side in pair)
    others = [over.without(side, label) for side in pair]
    values = {}
    if alpha:
        values["tckd"] = alpha * target_rows(pair, others, label, tau, over)
    if beta:
        values["nckd"] = beta * over.forward_kl(*others, tau)
    return values


@kind("decoupled")
def _decoupled(z, y, label, taus, _, numbers, backend):
    return _of_slices(z, y, label, taus, _, numbers, Whole(backend))


@kind_of_slices("decoupled")
def _of_slices(z, y, label, taus, _, numbers, over):
    *factors, tau = numbers
    return sum(part_rows((z, y), label, tau if taus is None else taus, factors, over).values())


def target_rows(sides, others, label, tau, over):
    """tau^2 KL of (p_y, 1 - p_y), from the log odds of the label; tau a number, or [...]."""
    of_class = tau[..., None] if isinstance(tau, torch.Tensor) else tau
    odds_s, odds_t = (
        (over.chosen(side, label)[..., 0] / tau) - over.logsumexp(other / of_class)
        for side, other in zip(sides, others, strict=True)
    )
    p, q = (torch.stack([odds, -odds], -1).sigmoid() for odds in (odds_s, odds_t))
    w = torch.stack([softplus(-odds_t) - softplus(-odds_s), softplus(odds_t) - softplus(odds_s)], -1)
    return tau**2 * kl(p, q, w)
