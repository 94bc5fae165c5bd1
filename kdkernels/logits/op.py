# SPDX-License-Identifier: Apache-2.0
"""Losses on logits that read each row once for the value and once for the gradient, and the mixing they start from.

Read on in `reference.py` (what is computed), `torch_impl.py` (how, in PyTorch), `triton_impl.py` (how, on a GPU) and
`csrc/logits/` (how, on a CPU).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import backend as backends
from .. import checks
from .._types import Backend, Number, ReductionOrNone
from ..autograd import at_least_float32, device_type, in_pytorch
from . import lerp, linear_operator, once, operator, reference
from .call import DIVERGENCES, Extras, Measure, Problem, measure_of  # noqa: F401
from .checks import (
    check_fraction,
    check_inside,
    check_labels,
    check_lam,
    check_logits,
    check_mix,
    check_permutation,
    check_reduction,
    check_tau,
    check_taus,
)
from .linear import LinearLogits, side_of
from .linear_columns import columns_of_heads  # noqa: F401
from .linear_each import each_row_of_heads
from .linear_kinds import Asked, kind, kind_of_slices  # noqa: F401
from .mixup import MixupBatch, check_alpha, draw_lam, draw_permutation
from .slices import Slices, total  # noqa: F401
from .topk import TAILS, check_count, ignoring, outcomes, outcomes_of  # noqa: F401  for the losses
from .torch_impl import kl  # noqa: F401

__all__ = ["distillation_kl", "generalized_jsd", "mixed_distillation", "mixup"]


def mixup(
    x: torch.Tensor,
    labels: torch.Tensor,
    *,
    alpha: float = 1.0,
    lam: Number | None = None,
    per_sample: bool = False,
    generator: torch.Generator | None = None,
    backend: Backend = "auto",
) -> MixupBatch:
    """Virtual samples x~_i = lam x_i + (1 - lam) x_j with j = permutation(i), gathered and mixed in one pass.

    Source: Zhang et al. 2018, arXiv 1710.09412 (whose experiments use alpha between 0.1 and 1 on images).

    Args:
        x: inputs or features [B, ...]; float16, bfloat16, float32 or float64.
        labels: class indices, int [B].
        alpha: lam is drawn from Beta(alpha, alpha); 0 is no mixing. lam: a number or a float tensor [] or [B] in its
            place. per_sample: a lam for each sample, [B].
        generator: of the draw of lam, and of the permutation after it: the same seed gives the same batch. One of the
            CPU gives the same batch on every device, and waits for it.
        backend: "auto", "triton", "cpp", "torch" or "reference".

    Returns:
        MixupBatch(x, labels, permuted_labels, lam, permutation): x in its own dtype, mixed in at least float32 and
        rounded once; lam float32 (float64 for float64 x), [] or [B]; permutation int64 [B]. Gradients to x. lam = 1
        gives x back exactly, as long as x is finite.

    Raises:
        ValueError: alpha < 0, lam outside [0, 1] (CUDA tensors are not looked at), labels of another length.
        TypeError: x that is not float, labels that are not integers.

    >>> generator = torch.Generator().manual_seed(0)
    >>> batch = kd.mixup(torch.eye(4), torch.arange(4), alpha=0.4, generator=generator)
    >>> torch.allclose(batch.x, batch.lam * torch.eye(4) + (1 - batch.lam) * torch.eye(4)[batch.permutation])
    True
    """
    checks.floating(x, "x")
    if x.dim() == 0:
        raise ValueError("x is 0-d: give a batch [B, ...]")
    checks.flags(per_sample=per_sample)
    B, dtype = x.shape[0], at_least_float32(x)
    check_labels(labels, B, None, x, "labels", "x")
    if lam is None:
        lam = draw_lam(check_alpha(alpha), (B,) if per_sample else (), x.device, dtype, generator)
    else:
        lam = check_lam(lam, B, x, "x")
        lam = lam.to(dtype) if isinstance(lam, torch.Tensor) else torch.full((), lam, dtype=dtype, device=x.device)
        lam = lam.expand(B) if per_sample else lam
    permutation = draw_permutation(B, x.device, generator)
    chosen = backends.resolve("mixup", backend, device_type(x), (x.dtype,))
    if chosen == "reference":
        mixed = in_pytorch(reference.mixup, (x.to(dtype), lam, permutation)).to(x.dtype)
    else:
        mixed = lerp.lerp(x, lam, permutation, chosen)
    return MixupBatch(mixed, labels, labels[permutation], lam, permutation)


def distillation_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    tau: float = 4.0,
    reduction: ReductionOrNone = "mean",
    backend: Backend = "auto",
) -> torch.Tensor:
    """tau^2 KL(p_t || p_s) of each row, p = softmax(z / tau), in nats; mean over the rows.

    Source: Hinton et al. 2015, arXiv 1503.02531.

    Args:
        student, teacher: logits [..., C], classes last, each leading index a row; float16 to float64, each side its own
            dtype.
        tau: temperature: a positive number, or a float tensor [] or one a row [...], a constant.
        reduction: "mean" over the rows, "sum", or "none": [...].
        backend: "auto", "triton", "cpp", "torch" or "reference" (the last one also gives higher derivatives).

    Returns:
        A scalar, or [...]; float32 for half inputs, else the promoted dtype of both sides, in which it is computed.
        Gradients to student and teacher. A logit of -inf is a class with probability 0: it adds nothing where the
        teacher has it; where only the student has it the value is inf, and its gradient finite. A row with NaN, +inf,
        or nothing but -inf is NaN, value and gradient, and leaves the other rows alone. A row whose upstream gradient
        is 0 gets the gradient 0 even then.

    Raises:
        ValueError: shapes that differ, tau <= 0 (CUDA tensors are not looked at), no rows, an unknown reduction.
        TypeError: logits or a tau that are not float.

    Equivalent to `F.kl_div(F.log_softmax(student / tau, -1), F.softmax(teacher / tau, -1), reduction="batchmean") *
    tau**2` for [R, C].

    >>> student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> kd.distillation_kl(student, teacher, tau=2.0).backward()
    >>> kd.distillation_kl(teacher, teacher).item()
    0.0
    """
    check_logits(student, teacher)
    check_reduction(reduction)
    tau, taus = check_taus(tau, student)
    if taus is not None:
        return any_divergence(student, teacher, measure_of("forward", tau), taus, reduction, backend)
    return divergence(student, teacher, tau, reduction, backend)


def divergence(student, teacher, tau: float, reduction: str, backend: str, weight=None):
    """`distillation_kl` of checked arguments, times a weight (a tensor of one number, a constant)."""
    chosen = backends.resolve("distillation_kl", backend, device_type(student), (student.dtype, teacher.dtype))
    if chosen != "reference" and once.has_forward_kl(chosen):
        return once.forward_kl(student, teacher, tau, reduction, chosen, weight)
    if chosen != "reference":
        return operator.divergence(student, teacher, tau, reduction, chosen, weight)
    value = in_pytorch(_reference_kl, (student, teacher), tau, reduction)
    return value if weight is None else value * weight.to(value.dtype)


def generalized_jsd(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    tau: float = 4.0,
    beta: float = 0.5,
    reduction: ReductionOrNone = "mean",
    backend: Backend = "auto",
) -> torch.Tensor:
    """tau^2 [beta KL(p_t || m) + (1 - beta) KL(p_s || m)] of each row, m = beta p_t + (1 - beta) p_s.

    p = softmax(z / tau), in nats, mean over the rows: the generalised Jensen-Shannon divergence. Source: Agarwal et al.
    2024, On-Policy Distillation of Language Models (GKD), arXiv 2306.13649; there, in TRL and in Liger without tau^2.

    Args:
        student, teacher: logits [..., C], classes last, each leading index a row; float16 to float64, each side its own
            dtype.
        tau: temperature: a positive number, or a float tensor [] or one a row [...], a constant.
        beta: share of the teacher in m, between 0 and 1. At both ends the value is 0: its limits, divided by beta or
            1 - beta, are KL(p_t || p_s) and KL(p_s || p_t), `kd.losses.KDLoss` with divergence="forward" or "reverse".
        reduction: "mean" over the rows, "sum", or "none": [...].
        backend: "auto", "triton", "cpp", "torch" or "reference" (the last one also gives higher derivatives).

    Returns:
        A scalar, or [...]; float32 for half inputs, else the promoted dtype of both sides, in which it is computed.
        Gradients to student and teacher. Equal logits give exactly 0. A logit of -inf is a class with probability 0, on
        one side or both: value and gradient stay finite. A row with NaN, +inf, or nothing but -inf is NaN, value and
        gradient, and leaves the other rows alone. A row whose upstream gradient is 0 gets the gradient 0 even then.

    Raises:
        ValueError: shapes that differ, beta outside (0, 1), tau <= 0 (CUDA tensors are not looked at), no rows, an
            unknown reduction. TypeError: logits or a tau that are not float.

    >>> student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> kd.generalized_jsd(student, teacher, tau=2.0, beta=0.1).backward()
    >>> kd.generalized_jsd(teacher, teacher).item()
    0.0
    """
    check_logits(student, teacher)
    check_reduction(reduction)
    beta = check_inside(beta, "beta", ": at 0 and 1 the divergence is 0, see kd.losses.KDLoss for its limits")
    tau, taus = check_taus(tau, student)
    return any_divergence(student, teacher, measure_of("jsd", tau, beta=beta), taus, reduction, backend)


def any_divergence(
    student, teacher, how: Measure, taus, reduction: str, backend: str, *, weights=None, factor=1.0, chunk=None
):
    """factor tau^2 times the divergence of each row of [..., C], of checked arguments; their sum, or mean.

    taus: None, or a constant a row [R] in the place of how.tau. weights, constants [R], multiply the rows; one of
    weight 0 is left out whatever it holds. Sides may be LinearLogits, chunk: rows of them at a time.
    """
    heads = isinstance(student, LinearLogits) or isinstance(teacher, LinearLogits)
    device, dtypes = student.device.type if heads else device_type(student), (student.dtype, teacher.dtype)
    chosen = backends.resolve("generalized_jsd", backend, device, dtypes)
    if heads and chosen != "reference":
        asked = Asked("divergence", how, chosen, reduction, factor, chunk)
        return rows_of_heads(student, teacher, (taus,), weights, asked)
    if heads:
        student, teacher = (s.logits() if isinstance(s, LinearLogits) else s for s in (student, teacher))
    if chosen != "reference":
        return once.divergence(student, teacher, taus, weights, how, factor, reduction, chosen)
    return in_pytorch(_reference_divergence, (student, teacher, taus, weights), how, factor, reduction)


def rows_of_heads(student, teacher, of_rows, weights, asked: Asked):
    """The value of rows of LinearLogits, or logits; of_rows: three tensors at most, [R, ...] or None."""
    per_row, classes = (*of_rows, *[None] * (3 - len(of_rows)), weights), student.shape[-1]
    if asked.reduction == "none":
        values = each_row_of_heads(side_of(student), side_of(teacher), classes, per_row, asked)
        return values.reshape(student.shape[:-1])
    return linear_operator.rows_of_heads(side_of(student), side_of(teacher), classes, per_row, asked)


def mixed_distillation(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    permuted_labels: torch.Tensor,
    lam: Number,
    *,
    tau: float,
    alpha: float,
    teacher_clean: torch.Tensor | None = None,
    permutation: torch.Tensor | None = None,
    mix: Sequence[float] = (1, 0, 0),
    reduction: ReductionOrNone = "mean",
    backend: Backend = "auto",
) -> torch.Tensor:
    """(1 - alpha) CE(y~, p_s) + alpha tau^2 KL(q || p_s^tau) of each row of a mixed batch, in one pass.

    y~ = lam e_a + (1 - lam) e_b, a = labels, b = permuted_labels; p_s at temperature 1 in the first term, p^tau =
    softmax(z / tau) in the second; q = k1 p_t^tau(x~) + k2 [lam p_t^tau(x) + (1 - lam) p_t^tau(x[permutation])] + k3 y~
    with mix = (k1, k2, k3). Source: the form of Similarity Transfer for KD, arXiv 2103.10047, see
    `kd.losses.STKDLoss`.

    Args:
        student, teacher: logits of the mixed samples x~, [B, C]; float16 to float64, each its own dtype.
        labels, permuted_labels: class indices, int [B].
        lam: a number in [0, 1], or a float tensor [] or [B].
        tau, alpha: temperature (> 0), and the share of the divergence in [0, 1].
        teacher_clean, permutation: the teacher's logits of the samples before mixing, [B, C], and the permutation that
            mixed them, int [B]; needed where k2 > 0, not read elsewhere.
        mix: three weights >= 0 that sum to 1.
        reduction: "mean" over the rows, "sum", or "none": [B].
        backend: "auto", "triton", "cpp", "torch" or "reference" (the last one also gives higher derivatives).

    Returns:
        As `distillation_kl`, with the gradient to the student only: teachers, lam and labels are constants. A term
        whose weight is 0 is not computed, and what only it would read is not read: no 0 * inf. The cross-entropy of a
        label with logit -inf is inf.

    Raises:
        ValueError: shapes that differ, labels or permutation out of range, lam or alpha outside [0, 1], tau <= 0.
        TypeError: logits that are not float, labels that are not integers. Values of CUDA tensors are not looked at: a
        label or lam out of range makes its row NaN, a permutation out of range is not allowed.

    >>> x, labels = torch.randn(8, 5), torch.randint(10, (8,))
    >>> batch = kd.mixup(x, labels, generator=torch.Generator().manual_seed(0))
    >>> student, teacher = torch.nn.Linear(5, 10), torch.nn.Linear(5, 10)
    >>> loss = kd.mixed_distillation(student(batch.x), teacher(batch.x), *batch[1:4], tau=4.0, alpha=0.9)
    >>> loss.backward()
    """
    check_logits(student, teacher)
    check_reduction(reduction)
    if student.dim() != 2:
        raise ValueError(f"student has shape {tuple(student.shape)}: give logits [B, C]")
    B, C = student.shape
    check_labels(labels, B, C, student, "labels")
    check_labels(permuted_labels, B, C, student, "permuted_labels")
    problem = Problem(check_tau(tau), check_fraction(alpha, "alpha"), *check_mix(mix), 1.0, True)
    lam = check_lam(lam, B, student)
    if problem.k2:
        if teacher_clean is None or permutation is None:
            raise ValueError(f"mix is {mix!r}: its second weight needs teacher_clean and permutation")
        check_logits(student, teacher_clean, "teacher_clean")
        check_permutation(permutation, B, student)
    extras = Extras(labels.long(), permuted_labels.long())
    if isinstance(lam, torch.Tensor):
        extras = extras._replace(lam=lam)
    else:
        problem = problem._replace(lam=lam)
    if problem.cleaned():
        extras = extras._replace(clean=teacher_clean.detach(), permutation=permutation.long())
    teacher = teacher.detach()
    dtypes = (
        (student.dtype, teacher.dtype) if extras.clean is None else (student.dtype, teacher.dtype, extras.clean.dtype)
    )
    chosen = backends.resolve("mixed_distillation", backend, device_type(student), dtypes)
    if chosen == "reference":
        return in_pytorch(_reference_mixed, (student, teacher, *extras), problem, reduction)
    return operator.row_loss(student, teacher, problem, extras, reduction, chosen)


def _reference_kl(student, teacher, tau, reduction):
    dtype = at_least_float32(student, teacher)
    return _reduced(reference.distillation_kl(student.to(dtype), teacher.to(dtype), tau), reduction)


def _reference_divergence(student, teacher, taus, weights, how, factor, reduction):
    dtype = at_least_float32(student, teacher)
    tau = how.tau if taus is None else taus.to(dtype).reshape(*student.shape[:-1], 1)
    rows = factor * reference.divergence(student.to(dtype), teacher.to(dtype), tau, *how[1:])
    if weights is not None:
        weights = weights.to(dtype).reshape(rows.shape)
        rows = torch.where(weights == 0, 0, rows * weights)
    return _reduced(rows, reduction)


def _reference_mixed(student, teacher, *rest):
    *extras, problem, reduction = rest
    extras = Extras(*extras)
    dtype = at_least_float32(student, teacher, extras.clean)
    lam = student.new_full((), problem.lam, dtype=dtype) if extras.lam is None else extras.lam.to(dtype)
    clean = None if extras.clean is None else extras.clean.to(dtype)
    rows, how = len(student), (problem.tau, problem.alpha, clean, extras.permutation, problem[2:5])
    value = reference.mixed_distillation(
        student.to(dtype), teacher.to(dtype), extras.labels, extras.permuted, lam.expand(rows), *how
    )
    return _reduced(value, reduction)


def _reduced(rows, reduction):
    return rows if reduction == "none" else rows.mean() if reduction == "mean" else rows.sum()
