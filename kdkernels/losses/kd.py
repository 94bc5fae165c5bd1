# SPDX-License-Identifier: Apache-2.0
"""Vanilla knowledge distillation: each divergence is a fused row op."""

from __future__ import annotations

import math
from typing import Literal

import torch

from .. import checks
from .._types import Backend, Mask, Number, ReductionOrNone, Result
from ..autograd import at_least_float32
from ..distributed import GroupLike
from ..logits import TopKLogits
from ..logits.call import Measure
from ..logits.checks import check_inside, check_reduction, check_rows, check_taus
from ..logits.op import (
    DIVERGENCES,
    TAILS,
    Asked,
    any_divergence,
    divergence,
    ignoring,
    kind,
    kind_of_slices,
    measure_of,
    outcomes,
    outcomes_of,
)
from .base import Loss, full_precision, zero_of, zero_where_masked
from .mesh import over_mesh
from .rows import NAMES, Logits, TeacherLogits, hold_tau, of_heads, on_mesh, over_heads, rows_of, sides, stored
from .slices import sliced


class KDLoss(Loss):
    """Distillation of tempered softmaxes (KD): KL, reverse KL, Jensen-Shannon, skew or total variation.

    tau^2 KL(p_t || p_s), p = softmax(z / tau), in nats, mean over the rows. Source: Hinton et al., arXiv 1503.02531.

    The teacher's side may be `kd.TopKLogits`: k classes a row, and what is left of 1.

    Args:
        tau: temperature: a positive number, 4 by default (the usual choice on CIFAR-100; the paper has no default; TRL
            and Liger have 1 and no tau^2), or a float tensor [] or one a row [...], a constant that moves with the
            module; `loss.tau = ...` changes it between calls.
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
        reduction: "mean" over the rows that count, weighed by token_weights; "sum"; or "none": [...], of each row its
            weight times its value, 0 where it does not count (of kd.LinearLogits backward then makes the logits again,
            and a compiled graph breaks).
        backend: as in `kd.distillation_kl`.

    Call: `(student_logits, teacher_logits, *, mask, labels, ignore_index=-100, token_weights, normalizer, vocab, chunk,
    group, return_parts)`. Logits [..., C], each leading index a row, classes last (of maps [B, C, H, W] pass
    `logits.movedim(1, -1)`); float16 to float64, each side its own dtype, computed in at least float32; or, of either
    side, `kd.LinearLogits`, hidden states and a head, whose logits are never stored: chunk rows of them exist at a time
    (by default as many as take 48 MiB, on a GPU 1 GiB, and at least 128). mask: bool [...], False rows do not count;
    labels [...] mark with ignore_index the rows that do not count. token_weights: float [...], >= 0, constants (CUDA
    tensors are not looked at: a row of a negative one is NaN): "mean" is the sum of weight times value over the sum of
    the weights, and a row of weight 0 does not count. normalizer replaces that divisor (gradient accumulation,
    num_items; 0 where nothing counts gives 0). vocab: the first so many classes are all there are, on both sides:
    vocabularies that are padded to different sizes. A batch without rows, or all masked, gives 0 with zero gradient. A
    logit of -inf is a class with probability 0: where both sides have it, the class adds nothing; where only the
    student has it "forward", and where only the teacher has it "reverse", is inf (the latter's gradient NaN); the
    others are finite. NaN in a row that counts gives NaN. Gradient to the student only; second derivatives with
    backend="reference".

    group: "world" or a process group whose ranks hold the vocabulary in slices, one after another: tensors of logits
    are this rank's slice, kd.LinearLogits has a group of its own, and a side without is whole on every rank; rows and
    marks are the same on all. Each rank gets the loss, the gradient of its slice, and those of hidden states and of
    what is whole, added up over the ranks; a few sums a row travel. DTensors do the same by where they are cut, and
    their rows may be cut, too: the loss is that of all rows, on every rank, the gradient that of a rank's own.

    >>> student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> loss = kd.losses.KDLoss(tau=4.0)
    >>> loss(student, teacher).backward()
    >>> loss(teacher, teacher).item()
    0.0
    """

    beta: float
    skew: float
    takes_topk = takes_heads = True
    shown: tuple[str, ...] = ("tau", "divergence", "beta", "skew", "scale_tau", "reduction")

    def __init__(
        self,
        tau: float | torch.Tensor = 4.0,
        *,
        divergence: Literal["forward", "reverse", "jsd", "skew", "skew_reverse", "tvd"] = "forward",
        beta: float = 0.5,
        skew: float = 0.1,
        scale_tau: bool = True,
        weight: float = 1.0,
        reduction: ReductionOrNone = "mean",
        backend: Backend = "auto",
    ):
        super().__init__(weight)
        if divergence not in tuple(DIVERGENCES):
            raise ValueError(f"divergence is {divergence!r}: give one of {tuple(DIVERGENCES)}")
        check_reduction(reduction)
        checks.flags(scale_tau=scale_tau)
        hold_tau(self, tau)
        self.divergence, self.reduction, self.backend = divergence, reduction, backend
        ends = ": its ends are other divergences, divergence='forward' and 'reverse'"
        self.beta, self.skew = check_inside(beta, "beta", ends), check_inside(skew, "skew", ends)
        self.scale_tau = scale_tau

    def forward(
        self,
        student_logits: Logits,
        teacher_logits: TeacherLogits,
        *,
        mask: Mask = None,
        labels: torch.Tensor | None = None,
        ignore_index: int = -100,
        token_weights: torch.Tensor | None = None,
        normalizer: Number | None = None,
        vocab: int | None = None,
        chunk: int | None = None,
        group: GroupLike = None,
        return_parts: bool = False,
    ) -> Result:
        if chunk is not None:
            checks.integer(chunk, "chunk", hint=" of rows at a time")
        given, marks = (student_logits, teacher_logits), {"mask": mask, "labels": labels, "ignore_index": ignore_index}
        marks.update(token_weights=token_weights, normalizer=normalizer)
        if on_mesh(*given):
            return over_mesh(self, given, marks, {"vocab": vocab, "chunk": chunk, "return_parts": return_parts})
        *given, vocab, slices = sliced(self, given, vocab, group, marks)
        student, teacher = sides(self, *given, vocab, slices)
        rows = rows_of(student, self.reduction, **marks)
        if student.numel() == 0 and self._too_small(math.prod(student.shape[:-1]), 1):
            zero = zero_of(getattr(student_logits, "tensors", student_logits))
            zero = zero.expand(student.shape[:-1]) if self.reduction == "none" else zero
            return self._total({"kd": zero}, return_parts)
        if isinstance(teacher, TopKLogits):
            check_rows(student, teacher.values, *NAMES)
            return self._total({"kd": self._beside_topk(student, teacher, rows, (chunk, slices))}, return_parts)
        teacher = teacher.detach() if teacher.requires_grad else teacher
        check_rows(student, teacher, *NAMES)
        tau, taus = check_taus(self.tau, student, NAMES[0])
        scale = 1.0 if self.scale_tau else tau**-2
        # `divergence` treats its second argument as the fixed side, and differentiates in both
        pair = {"forward": (student, teacher), "reverse": (teacher, student)}.get(self.divergence)
        direct = pair and rows.plain() and taus is None and slices is None and self.reduction != "none"
        if direct and not of_heads(student, teacher):
            checks.flags(return_parts=return_parts)
            weight = self.weight if self.scale_tau else self.weight.double() * scale
            value = divergence(*pair, tau, self.reduction, self.backend, weight)
            return (value, {"kd": value}) if return_parts else value
        value = self._of_pair((student, teacher), rows, (tau, taus), scale, (chunk, slices))
        return self._total({"kd": value}, return_parts)

    def _of_pair(self, pair, rows, temperatures, scale: float, driver=(None, None)):
        """driver: rows at a time, and slices of the vocabulary."""
        (tau, taus), (chunk, slices) = temperatures, driver
        factors = None if self.scale_tau or taus is None else taus**-2
        how = measure_of(self.divergence, tau, self.beta, self.skew)
        if slices is not None:
            asked = Asked("divergence", how, self.backend, factor=scale, chunk=chunk, slices=slices)
            return over_heads(pair, rows, asked, taus, factors=factors)
        reduction, weights = rows.of_op(pair[0], factors)
        pair = (rows.hidden(side, self.backend) for side in pair)
        how = how, taus, reduction, self.backend
        return any_divergence(*pair, *how, weights=weights, factor=scale, chunk=chunk)

    def _beside_topk(self, student, teacher, rows, driver):
        """Of the outcomes that the teacher knows: the student's are one pass over its logits."""
        tail = teacher.tail
        if tail == "ignore" and self.divergence != "forward":
            raise ValueError(
                f"divergence is {self.divergence!r}, and tail='ignore' leaves out what it says of the other classes: "
                "give tail='bucket' or 'renormalize'"
            )
        (chunk, slices), (tau, taus) = driver, check_taus(self.tau, student, NAMES[0])
        classes = student.shape[-1] if slices is None else sum(slices.sizes)
        values, index = outcomes(student, teacher, classes, rows.mask, (tau, taus))
        scale = 1.0 if self.scale_tau else tau**-2
        at = (tau, taus) if tail == "renormalize" else (1.0, None)
        if tail != "renormalize":
            scale = scale * tau**2  # the outcomes are those of tau already
        if of_heads(student) and self.backend != "reference" or slices is not None:
            pair = (rows.hidden(student, "reference"), zero_where_masked(values, rows.mask))
            factors = None if self.scale_tau or at[1] is None else taus**-2
            numbers = TAILS.index(tail), tau, *measure_of(self.divergence, at[0], self.beta, self.skew)
            asked = Asked("outcomes", numbers, self.backend, factor=scale, chunk=chunk, slices=slices)
            return over_heads(pair, rows, asked, index.flatten(0, -2), at[1], factors=factors)
        (student,) = stored(rows.hidden(student, self.backend))
        student = outcomes_of(student, index, tail, tau, self.backend)
        if tail != "ignore":
            return self._of_pair((student, values), rows, at, scale)
        with full_precision(student):
            pair = (zero_where_masked(side, rows.mask) for side in (student, values))
            return rows.mean(ignoring(*pair, index.shape[-1])) * scale


@kind("outcomes")
def _outcomes(z, y, index, taus, _, numbers, backend):
    tail, tau, *_ = numbers
    return _of_outcomes(outcomes_of(z, index, TAILS[int(tail)], tau, backend), y, index, taus, numbers, backend)


@kind_of_slices("outcomes")
def _outcomes_of_slices(z, y, index, taus, _, numbers, slices):
    tail, tau, *_ = numbers
    z = z.to(at_least_float32(z, y))
    found = slices.chosen(z, index)
    if TAILS[int(tail)] != "renormalize":
        others = slices.without(z, index)
        top = torch.maximum(found.amax(-1), slices.max(others.amax(-1))).detach()[:, None]
        found = (found - top) / tau
        if y.shape[-1] > index.shape[-1]:
            found = torch.cat([found, slices.logsumexp((others - top) / tau)[:, None]], -1)
    return _of_outcomes(found, y, index, taus, numbers, "auto")


def _of_outcomes(found, y, index, taus, numbers, backend):
    tail, _, *how = numbers
    if TAILS[int(tail)] == "ignore":
        return ignoring(found, y, index.shape[-1])
    return any_divergence(found, y, Measure(*how), taus, "none", backend)
