# SPDX-License-Identifier: Apache-2.0
"""The differentiable operator of both losses: `logits_fwd` and `logits_bwd`.

They take [..., C], as a view made outside would cost a graph node. Kept beside the inputs are a few numbers a row.
"""

from __future__ import annotations

import math

import torch

from ..autograd import at_least_float32
from ..backend import implementation
from ..differentiable import of_rows, operator
from .call import STUDENT, TEACHER, Extras, Problem

EXTRAS = len(Extras._fields)
RECORDS = EXTRAS + len(Problem._fields)


def _records(a):
    """(extras, problem, reduction, backend, need), of which an operator gets the fields."""
    return Extras._make(a[:EXTRAS]), Problem._make(a[EXTRAS:RECORDS]), *a[RECORDS:]


def rows_without_copy(*sides):
    """Both sides [..., C] as [R, C]; where that would copy one, as [B, T, C]: `logits[:, :-1]` is read where it is."""
    if sides[0].dim() == 2:
        return sides
    *lead, C = sides[0].shape
    for cut in range(len(lead)):
        shape = (math.prod(lead), C) if cut == 0 else (math.prod(lead[:cut]), math.prod(lead[cut:]), C)
        try:
            return [t.view(shape) for t in sides]
        except RuntimeError:  # strides that no view has
            pass
    return [t.reshape(-1, C) for t in sides]


def _forward(student, teacher, *rest):
    extras, problem, reduction, backend, need = _records(rest)
    run = implementation(__package__, backend).forward
    value, statistics = run(*rows_without_copy(student, teacher), problem, extras, need)
    if reduction == "none":
        return value.reshape(student.shape[:-1]), statistics
    return value.mean() if reduction == "mean" else value.sum(), statistics


def _backward(grad, student, teacher, *rest):
    statistics = rest[EXTRAS]
    extras, problem, reduction, backend, need = _records(rest[:EXTRAS] + rest[EXTRAS + 1 :])
    need = need & STUDENT if problem.mixed else need  # forward mode asks for all
    rows = math.prod(student.shape[:-1])
    factor = 1 / rows if reduction == "mean" else 1.0
    grad = grad.reshape(-1) if reduction == "none" else grad.expand(rows)
    run = implementation(__package__, backend).backward
    d_student, d_teacher = run(grad, factor, *rows_without_copy(student, teacher), statistics, problem, extras, need)
    if student.dim() == 2:
        return d_student, d_teacher
    return (
        d_student.reshape(student.shape) if need & STUDENT else None,
        d_teacher.reshape(teacher.shape) if need & TEACHER else None,
    )


def _fake(student, teacher, *rest):
    extras, problem, reduction, _, need = _records(rest)
    dtype, rows = at_least_float32(student, teacher, extras.clean), student.shape[:-1]
    value = student.new_empty(rows if reduction == "none" else (), dtype=dtype)
    return value, student.new_empty((problem.statistics, math.prod(rows)) if need else (0,), dtype=dtype)


_logits = operator(
    "logits",
    "student teacher labels? permuted? lam? clean? permutation?",
    "float tau, float alpha, float k1, float k2, float k3, float number, bool mixed, str reduction, str backend",
    "statistics",
    wanted="student teacher",
    forward=_forward,
    backward=_backward,
    fake=_fake,
    tangent=of_rows(STUDENT.bit_length() - 1, TEACHER.bit_length() - 1),
).value


def row_loss(student, teacher, problem: Problem, extras: Extras, reduction: str, backend: str):
    """The reduced loss."""
    return _logits(student, teacher, *extras, *problem, reduction, backend)


def divergence(student, teacher, tau: float, reduction: str, backend: str, weight=None):
    """`row_loss` of the plain divergence, times a weight (a tensor of one number, a constant)."""
    if reduction != "none" and student.requires_grad and not torch.compiler.is_compiling():
        directly = getattr(implementation(__package__, backend), "directly", None)
        value = directly and directly(student, teacher, weight, tau, reduction == "mean")
        if value is not None:
            return value
    problem = Problem(tau, 1.0, 1.0, 0.0, 0.0, 1.0, False)
    value = row_loss(student, teacher, problem, Extras(), reduction, backend)
    return value if weight is None else value * weight.to(value.dtype)
