# SPDX-License-Identifier: Apache-2.0
"""A sum of divergences whose gradient is made with its value and handed over once, where a backend does that in one go.

In a plain call of one student; whatever else is asked goes by the operator of `divergences.py`. MATH.md, section 3.
"""

from __future__ import annotations

import torch

from .. import backend as backends
from ..autograd import NoSecondDerivative, applied, is_batched, ordinary, plain
from .call import STUDENT, Measure, measure_of, rows_of
from .divergences import divergence as operated
from .operator import rows_without_copy


class _Once(torch.autograd.Function):
    """The student's gradient of a sum, made in the forward pass: backward hands it over and keeps none.

    An upstream that is not 1 is multiplied in where it lies, at which no host looks. A second backward pass, for which
    the graph was kept, computes it again.
    """

    @staticmethod
    def forward(ctx, student, teacher, taus, weights, *how):
        value, ctx.found = _sum_and_gradient(student, teacher, taus, weights, *how)
        ctx.how = how
        ctx.save_for_backward(student, teacher, taus, weights)
        return value

    @staticmethod
    def backward(ctx, grad):
        found, ctx.found = ctx.found, None
        if is_batched(grad) or not plain(grad):
            how = *ctx.how, STUDENT
            kept = operated.forward(*ctx.saved_tensors, *how)[1:]
            found = operated.backward(grad, *ctx.saved_tensors, *kept, *how)[0]
        else:
            run = _Gradient.apply if torch.is_grad_enabled() else _handed_over
            found = run(grad, found, *ctx.saved_tensors, *ctx.how)
        return found, *[None] * (3 + len(ctx.how))


class _Gradient(NoSecondDerivative):
    @staticmethod
    def forward(*a):
        return _handed_over(*a)


def _sides(student, teacher, how):
    """(the implementation, rows of both sides, the measure, the factor of each row)"""
    *how, factor, reduction, backend = how
    factor = factor / rows_of(student) if reduction == "mean" else factor
    return backends.implementation(__package__, backend), rows_without_copy(student, teacher), Measure(*how), factor


def _sum_and_gradient(student, teacher, taus, weights, *how):
    run, sides, measure, factor = _sides(student, teacher, how)
    value, gradient = run.sum_and_gradient(*sides, taus, weights, measure, factor)
    return value, gradient


def _handed_over(grad, found, student, teacher, taus, weights, *how):
    run, sides, measure, factor = _sides(student, teacher, how)
    found = run.gradient_again(grad, *sides, taus, weights, measure, factor, found)
    return found.reshape(student.shape)


_once = applied(_Once)


def _made_once(student, teacher, taus, weights, how: Measure, reduction: str, backend: str) -> bool:
    """Whether the forward pass makes the student's gradient, and the upstream is one number."""
    if reduction == "none" or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    if teacher.requires_grad or not student.requires_grad or not plain(student, teacher, taus, weights):
        return False
    makes = getattr(backends.implementation(__package__, backend), "makes_gradient", None)
    return makes is not None and makes(how)


def divergence(student, teacher, taus, weights, how: Measure, factor: float, reduction: str, backend: str):
    """factor tau^2 times the divergence of each row, or their sum, or mean; taus, weights: constants [R], or None."""
    if _made_once(student, teacher, taus, weights, how, reduction, backend):
        return _once(*ordinary((student, teacher, taus, weights)), *how, factor, reduction, backend)
    return operated.value(student, teacher, taus, weights, *how, factor, reduction, backend)


@torch.compiler.assume_constant_result
def has_forward_kl(backend: str) -> bool:
    """Whether the backend has one for all divergences, and `operator.divergence` no rows of its own."""
    return hasattr(backends.implementation(__package__, backend), "makes_gradient")


def forward_kl(student, teacher, tau: float, reduction: str, backend: str, weight=None):
    """The forward divergence, times a weight (a tensor of one number, a constant)."""
    weights = None
    if weight is not None and weight.device == student.device and not torch.compiler.is_compiling():
        weights, weight = weight.detach().reshape(1).expand(rows_of(student)), None
    value = divergence(student, teacher, None, weights, measure_of("forward", tau), 1.0, reduction, backend)
    return value if weight is None else value * weight.to(value.dtype)
