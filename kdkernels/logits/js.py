# SPDX-License-Identifier: Apache-2.0
"""The Jensen-Shannon divergence of rows of logits, with the student's gradient, in PyTorch: chunk by chunk.

Five numbers a row are kept beside the inputs. Formulas: MATH.md, section 1.
"""

from __future__ import annotations

import torch

from .. import backend as backends
from ..autograd import at_least_float32, device_type, in_pytorch
from ..differentiable import of_rows, operator
from . import reference
from .call import L_S, L_T, M_S, M_T, K, rows_of
from .operator import rows_without_copy
from .torch_impl import _chunks, _part, _shifted, softmax

KEPT = 5
FAR = 80  # of |w|: exp(-80) is nothing beside 1, in float64 too


def _log_ratio(zs, ys, shift):
    """w = log(p / q) of scaled logits; 0 where both sides exclude the class, which has no share in m."""
    return (zs - ys).sub_(shift).nan_to_num_(0.0, FAR, -FAR).clamp_(-FAR, FAR)


def _of_both(w):
    """d w and log(1 - d^2), d = tanh(w / 2): the latter as it stands, exact near 0, or from exp(-|w|)."""
    size = w.abs()
    e = (-size).expm1_()
    d = e / (-2 - e)
    near = d.clamp(max=0.5).square_().neg_().log1p_()
    far = (e / 2).log1p_().mul_(-2).sub_(size)
    # a product with a mask: a choice entry by entry takes twenty times as long on a CPU
    return d * size, near.lerp_(far, (d > 0.5).to(w.dtype))


def _forward(student, teacher, tau: float, need: int):
    sides, dtype = rows_without_copy(student, teacher), at_least_float32(student, teacher)
    values = student.new_empty(rows_of(student), dtype=dtype)
    kept = values.new_empty((KEPT, len(values)) if need else (0,))
    for rows in _chunks(sides[0]):
        (_, zs, p, m_s, l_s), (_, ys, q, m_t, l_t) = (_shifted(_part(side, rows), tau, dtype) for side in sides)
        p, q, w = softmax(p, l_s), softmax(q, l_t), _log_ratio(zs, ys, l_s - l_t)
        moved, log = _of_both(w)
        if need:
            mean = (p * (w + log)).sum(-1, keepdim=True)
            kept[:, rows] = torch.cat([m_s, l_s, m_t, l_t, mean], -1).mT
        values[rows] = tau**2 / 4 * (p.add_(q) * moved.add_(log)).sum(-1)
    return values.reshape(student.shape[:-1]), kept


def _backward(grad, student, teacher, kept, tau: float, need: int):
    """tau / 2 p_c (log(p_c / m_c) - KL(p || m)), log(p / m) = [w + log(1 - d^2)] / 2; twice that KL is kept.

    A row whose upstream is 0 gets exactly 0.
    """
    sides, dtype, grad = rows_without_copy(student, teacher), kept.dtype, grad.reshape(-1)
    found = student.new_empty(rows_of(student), student.shape[-1])
    for rows in _chunks(sides[0]):
        of, g = kept[:, rows, None], grad[rows, None].to(dtype)
        zs, ys = ((_part(side, rows).to(dtype) - m) / tau for side, m in zip(sides, (of[M_S], of[M_T]), strict=True))
        w = _log_ratio(zs, ys, of[L_S] - of[L_T])
        d = (zs - of[L_S]).exp_() * (_of_both(w)[1].add_(w) - of[K]) * (g * (tau / 4))
        found[rows] = torch.where(g != 0, d, 0.0).to(student.dtype)
    return (found.reshape(student.shape),)


def _fake(student, teacher, tau, need):
    value = student.new_empty(student.shape[:-1], dtype=at_least_float32(student, teacher))
    return value, value.new_empty((KEPT, rows_of(student)) if need else (0,))


_js = operator(
    "js",
    "student teacher",
    "float tau",
    "statistics",
    wanted="student",
    forward=_forward,
    backward=_backward,
    fake=_fake,
    tangent=of_rows(0),
).value


def divergence(student, teacher, tau: float, backend: str):
    """tau^2 JS(p_s, p_t) of each row of [..., C]; the teacher is a constant. Where a backend can run, this can."""
    dtypes = (student.dtype, teacher.dtype)
    if backends.resolve("distillation_kl", backend, device_type(student), dtypes) == "reference":
        return in_pytorch(_by_the_book, (student, teacher), tau)
    return _js(student, teacher, tau)


def _by_the_book(student, teacher, tau):
    dtype = at_least_float32(student, teacher)
    return reference.jensen_shannon(student.to(dtype), teacher.to(dtype), tau)
