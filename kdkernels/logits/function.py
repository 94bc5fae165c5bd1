# SPDX-License-Identifier: Apache-2.0
"""The differentiable operator of the family: schema, fake, autograd and dispatch to the implementation.

Two operators of fixed arity, `kdkernels::logits_fwd` and `kdkernels::logits_bwd`, serve both losses. They take
[..., C], as a view made outside would cost a graph node. What is saved beside the inputs is a few numbers a row.
"""

from __future__ import annotations

import math

import torch

from ..autograd import NoSecondDerivative, apply, device_type, plain, register, without_autocast
from ..backend import implementation
from ..dtypes import at_least_float32
from .problem import STUDENT, TEACHER, Extras, Problem


def divergence(student, teacher, tau: float, reduction: str, backend: str, weight=None):
    """`row_loss` of the plain divergence, times a weight (a tensor of one number, a constant)."""
    if backend == "cpp" and reduction != "none" and student.requires_grad and _direct(student, teacher, weight):
        weight = weight if weight is None or weight.dtype == torch.float32 else weight.float()
        return apply(Divergence, student, teacher, weight, tau, reduction == "mean")
    problem = Problem(tau, 1.0, (1.0, 0.0, 0.0), 1.0, False)
    value = row_loss(student, teacher, problem, Extras(), reduction, backend)
    return value if weight is None else value * weight.to(value.dtype)


def row_loss(student, teacher, problem: Problem, extras: Extras, reduction: str, backend: str):
    """The reduced loss, with gradient where one is needed."""
    need = 0
    if torch.is_grad_enabled():
        need = STUDENT * student.requires_grad | TEACHER * (teacher.requires_grad and not problem.mixed)
    tau, alpha, mix, lam, mixed = problem
    arguments = (student, teacher, *extras, tau, alpha, list(mix), lam, mixed, reduction, need, backend)
    return (apply(RowLoss, *arguments) if need else forward(*arguments))[0]


def _direct(student, teacher, weight) -> bool:
    """Whether the gradient is the student's alone, the compiled rows read all as it is, and nobody watches."""
    if student.dim() != 2 or teacher.requires_grad or not torch.is_grad_enabled():
        return False
    for side in (student, teacher):
        if side.stride(1) != 1 or side.dtype == torch.float64:
            return False
    return (weight is None or weight.is_cpu) and plain(student, teacher, weight)


class Divergence(torch.autograd.Function):
    """`RowLoss` of what most calls on a CPU are: one number, through operators of fewer arguments."""

    @staticmethod
    def forward(ctx, student, teacher, weight, tau, mean):
        value, statistics = torch.ops.kdkernels.kl_rows.default(student, teacher, weight, tau, mean)
        ctx.how = tau, mean
        ctx.save_for_backward(student, teacher, weight, statistics)
        return value

    @staticmethod
    def backward(ctx, grad):
        run = torch.ops.kdkernels.kl_rows_backward.default
        run = DivergenceGradient.apply if torch.is_grad_enabled() else run
        return run(grad, *ctx.saved_tensors, *ctx.how), None, None, None, None


class DivergenceGradient(NoSecondDerivative):
    @staticmethod
    def forward(*arguments):
        return torch.ops.kdkernels.kl_rows_backward(*arguments)


def forward(*arguments):
    run = _logits_fwd if plain(*arguments[:7]) else torch.ops.kdkernels.logits_fwd
    return run(*arguments)


def backward(*arguments):
    run = _logits_bwd if plain(*arguments[:9]) else torch.ops.kdkernels.logits_bwd
    return run(*arguments)


class RowLoss(torch.autograd.Function):
    """One differentiable call; saved for backward: the logits and the statistics of `problem.py`."""

    generate_vmap_rule = True

    forward = staticmethod(forward)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *ctx.how, need, _ = inputs[7:]
        ctx.need, ctx.backend = need, inputs[-1]
        _, statistics = output
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:7], statistics)

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 15
        run = RowLossGradient.apply if torch.is_grad_enabled() else backward
        d_student, d_teacher = run(grad, *ctx.saved_tensors, *ctx.how, ctx.need, ctx.backend)
        return d_student if ctx.need & STUDENT else None, d_teacher if ctx.need & TEACHER else None, *(None,) * 13


class RowLossGradient(NoSecondDerivative):
    forward = staticmethod(backward)


def _rows(t):
    """[..., C] as [R, C]."""
    return t if t is None or t.dim() == 2 else t.reshape(-1, t.shape[-1])


def _logits_fwd(
    student, teacher, labels, permuted, lam, clean, permutation, tau, alpha, mix, number, mixed,
    reduction, need, backend,
):  # fmt: skip
    problem = Problem(tau, alpha, tuple(mix), number, mixed)
    extras = Extras(labels, permuted, lam, clean, permutation)
    with without_autocast(device_type(student)):
        run = implementation(__package__, backend).forward
        value, statistics = run(_rows(student), _rows(teacher), problem, extras, need)
        if reduction == "none":
            value = value.reshape(student.shape[:-1])
        else:
            value = value.mean() if reduction == "mean" else value.sum()
    return value, statistics


def _logits_fwd_fake(
    student, teacher, labels, permuted, lam, clean, permutation, tau, alpha, mix, number, mixed,
    reduction, need, backend,
):  # fmt: skip
    dtype = at_least_float32(student, teacher, clean)
    rows = student.shape[:-1]
    problem = Problem(tau, alpha, tuple(mix), number, mixed)
    value = student.new_empty(rows if reduction == "none" else (), dtype=dtype)
    return value, student.new_empty((problem.statistics, math.prod(rows)) if need else (0,), dtype=dtype)


def _logits_bwd(
    grad, student, teacher, labels, permuted, lam, clean, permutation, statistics, tau, alpha, mix, number, mixed,
    reduction, need, backend,
):  # fmt: skip
    problem = Problem(tau, alpha, tuple(mix), number, mixed)
    extras = Extras(labels, permuted, lam, clean, permutation)
    rows = math.prod(student.shape[:-1])
    factor = 1 / rows if reduction == "mean" else 1.0
    grad = grad.reshape(-1) if reduction == "none" else grad.expand(rows)
    with without_autocast(device_type(student)):
        run = implementation(__package__, backend).backward
        d_student, d_teacher = run(grad, factor, _rows(student), _rows(teacher), statistics, problem, extras, need)
    if student.dim() != 2:
        d_student = d_student.reshape(student.shape) if need & STUDENT else d_student
        d_teacher = d_teacher.reshape(teacher.shape) if need & TEACHER else d_teacher
    return d_student, d_teacher


def _logits_bwd_fake(
    grad, student, teacher, labels, permuted, lam, clean, permutation, statistics, tau, alpha, mix, number, mixed,
    reduction, need, backend,
):  # fmt: skip
    d_student = student.new_empty(student.shape if need & STUDENT else 0)
    return d_student, teacher.new_empty(teacher.shape) if need & TEACHER else student.new_empty(0)


def _register():
    tensors = "Tensor student, Tensor teacher, Tensor? labels, Tensor? permuted, Tensor? lam, Tensor? clean"
    tensors += ", Tensor? permutation"
    how = "float tau, float alpha, float[] mix, float number, bool mixed, str reduction, int need, str backend"
    register("logits_fwd", f"({tensors}, {how}) -> (Tensor value, Tensor statistics)", _logits_fwd, _logits_fwd_fake)
    register(
        "logits_bwd",
        f"(Tensor grad, {tensors}, Tensor statistics, {how}) -> (Tensor d_student, Tensor d_teacher)",
        _logits_bwd,
        _logits_bwd_fake,
    )


_register()
