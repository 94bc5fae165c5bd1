# SPDX-License-Identifier: Apache-2.0
"""Rows of logits as k chosen classes and one for all others: one pass over the row, one over its gradient.

Kept beside the inputs are two numbers a row. MATH.md, section 10.
"""

from __future__ import annotations

import math

import torch

from ..autograd import at_least_float32
from ..differentiable import operator
from .call import rows_of
from .operator import rows_without_copy
from .torch_impl import chunks, part


def _forward(student, index, tau, need):
    """[..., k + 1]: (z - max) / tau of the chosen classes, log of the sum of its exponentials over the others."""
    dtype, k = at_least_float32(student), index.shape[-1]
    z, index = rows_without_copy(student)[0], index.reshape(-1, k)
    out = student.new_empty((len(index), k + 1), dtype=dtype)
    statistics = out.new_empty((2, len(index)) if need else (0,))
    for rows in chunks(z):
        x = part(z, rows).to(dtype, copy=True)
        chosen = x.gather(-1, index[rows])
        x.scatter_(-1, index[rows], -math.inf)
        top = x.amax(-1, keepdim=True)
        shift = torch.where(top == -math.inf, 0, top)
        log = x.sub_(shift).div_(tau).exp_().sum(-1, keepdim=True).log_()
        whole = torch.maximum(chosen.amax(-1, keepdim=True), top)
        out[rows] = torch.cat([(chosen - whole) / tau, (shift - whole) / tau + log], -1)
        if need:
            # of nothing: what it has of the gradient is nothing, too
            statistics[:, rows] = torch.cat([shift, torch.where(log == -math.inf, math.inf, log)], -1).mT
    return out.reshape(*student.shape[:-1], k + 1), statistics


def _backward(grad, student, index, statistics, tau, need):
    """g_i / tau at the chosen classes, g_rest / tau exp((z - m) / tau - L) at the others; 0 where g_rest is."""
    dtype, k = statistics.dtype, index.shape[-1]
    z, index, grad = rows_without_copy(student)[0], index.reshape(-1, k), grad.reshape(-1, k + 1)
    out = student.new_empty((len(index), student.shape[-1]))
    for rows in chunks(z):
        g, (top, log) = grad[rows].to(dtype) / tau, statistics[:, rows, None]
        rest = g[:, -1:]
        x = part(z, rows).to(dtype, copy=True).sub_(top).div_(tau).sub_(log).exp_().mul_(rest)
        x = x.masked_fill_(rest == 0, 0)
        out[rows] = x.scatter_(-1, index[rows], g[:, :-1])
    return (out.reshape(student.shape),)


def _fake(student, index, tau, need):
    out = student.new_empty((*index.shape[:-1], index.shape[-1] + 1), dtype=at_least_float32(student))
    return out, out.new_empty((2, rows_of(student)) if need else (0,))


def _tangent(run, tangents, value, saved, how):
    (moved,), (_, index, *_), (tau, *_) = tangents, saved, how
    moved = moved.to(value.dtype)
    of_rest = torch.cat([torch.zeros_like(value[..., :-1]), torch.ones_like(value[..., -1:])], -1)
    (rest,) = run(of_rest, *saved, *how)
    rest = (rest.to(value.dtype) * moved).sum(-1, keepdim=True)
    return torch.cat([moved.gather(-1, index) / tau, rest], -1)


buckets = operator(
    "buckets",
    "student index",
    "float tau",
    "statistics",
    wanted="student",
    forward=_forward,
    backward=_backward,
    fake=_fake,
    tangent=_tangent,
).value


def textbook(student, index, tau):
    """The same, but for a number a row, by PyTorch: log p of the chosen classes, log of the sum of all others' p."""
    z = student.to(at_least_float32(student)) / tau
    log_p = z - z.logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(-1, index), log_p.scatter(-1, index, -math.inf).logsumexp(-1, keepdim=True)], -1)
