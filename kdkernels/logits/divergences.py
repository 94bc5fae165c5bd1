# SPDX-License-Identifier: Apache-2.0
"""The differentiable operator of `call.Measure`: every divergence of rows of logits but what `operator` has.

Kept beside the inputs are seven numbers a row and, where the rows are added up on a CPU, the student's gradient for an
upstream of 1, made in the forward pass while the row is in cache. MATH.md, section 8.
"""

from __future__ import annotations

import math

import torch

from .. import backend as backends
from ..autograd import at_least_float32
from ..differentiable import of_rows, operator
from .call import KEPT, STUDENT, TEACHER, Measure, rows_of
from .operator import rows_without_copy


def _made(student, reduction: str, need: int) -> bool:
    """Whether the forward pass makes the gradient: where the upstream is one number, at which backward may look."""
    return student.device.type == "cpu" and reduction != "none" and need == STUDENT


def _forward(student, teacher, taus, weights, *rest):
    *how, factor, reduction, backend, need = rest
    factor = factor / rows_of(student) if reduction == "mean" else factor
    sides, made = rows_without_copy(student, teacher), _made(student, reduction, need)
    weights = weights if weights is None else weights * factor
    run = backends.implementation(__package__, backend).divergence
    value, statistics, gradient = run(*sides, (taus, weights), Measure(*how), factor, need > 0, made)
    value = value.reshape(student.shape[:-1]) if reduction == "none" else value.sum()
    return value, statistics, gradient.reshape(student.shape) if made else gradient


def _backward(grad, student, teacher, taus, weights, statistics, gradient, *rest):
    *how, factor, reduction, backend, need = rest
    if gradient.numel():
        found = _scaled(gradient, grad)
        if found is not None:
            return found, None
    factor = factor / rows_of(student) if reduction == "mean" else factor
    grad = grad.reshape(-1) if reduction == "none" else grad.expand(rows_of(student))
    grad = grad * factor if weights is None else torch.where(weights == 0, 0, grad * weights * factor)
    run, how = backends.implementation(__package__, backend).divergence_gradient, Measure(*how)
    sides, found = rows_without_copy(student, teacher), [None, None]
    if need & STUDENT:
        found[0] = run(grad, *sides, taus, statistics, how).reshape(student.shape)
    if need & TEACHER:
        how, statistics = how.swapped(statistics)
        found[1] = run(grad, *reversed(sides), taus, statistics, how).reshape(teacher.shape)
    return found


def _scaled(gradient, grad):
    """gradient times the upstream, or None where that would round it a second time, or a row counts for nothing."""
    factor = grad.item()
    if factor == 1:
        return gradient
    exact = gradient.dtype == torch.bfloat16 and math.frexp(factor)[0] in (0.5, -0.5)
    if not math.isfinite(factor) or gradient.dtype.itemsize < 4 and not exact:
        return None
    return gradient * factor if factor else torch.zeros_like(gradient)


def _fake(student, teacher, taus, weights, *rest):
    *_, reduction, _, need = rest
    dtype = at_least_float32(student, teacher)
    value = student.new_empty(student.shape[:-1] if reduction == "none" else (), dtype=dtype)
    statistics = value.new_empty((KEPT, rows_of(student)) if need else (0,))
    made = _made(student, reduction, need)
    return value, statistics, student.new_empty(student.shape if made else (0,))


divergence = operator(
    "divergence",
    "student teacher taus? weights?",
    "float tau, float b, float u, float v, float factor, str reduction, str backend",
    "statistics gradient",
    wanted="student teacher",
    forward=_forward,
    backward=_backward,
    fake=_fake,
    tangent=of_rows(STUDENT.bit_length() - 1, TEACHER.bit_length() - 1),
)
