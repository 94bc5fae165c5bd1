# SPDX-License-Identifier: Apache-2.0
"""Rows of logits as k chosen classes and one for all others: one pass over the row, one over its gradient.

Kept beside the inputs are two numbers a row. MATH.md, section 10.
"""

from __future__ import annotations

import math

import torch

from ..autograd import at_least_float32, device_type
from ..backend import implementation, runs_compiled
from ..differentiable import operator
from .call import rows_of
from .operator import rows_without_copy

COMPILED = ("bucket_rows", "bucket_rows_backward")


def _forward(student, index, tau, backend, need):
    rows = rows_without_copy(student)[0], index.reshape(-1, index.shape[-1])
    out, statistics = _implementation(student, backend).bucket_rows(*rows, tau, need > 0)
    return out.reshape(*student.shape[:-1], -1), statistics


def _backward(grad, student, index, statistics, tau, backend, need):
    k = index.shape[-1]
    rows = grad.reshape(-1, k + 1), rows_without_copy(student)[0], index.reshape(-1, k)
    found = _implementation(student, backend).bucket_gradient(*rows, statistics, tau)
    return (found.reshape(student.shape),)


def _implementation(student, backend):
    compiled = student.dtype != torch.float64 and runs_compiled(backend, device_type(student), COMPILED)
    return implementation(__package__, "cpp" if compiled else "torch")


def _fake(student, index, tau, backend, need):
    out = student.new_empty((*index.shape[:-1], index.shape[-1] + 1), dtype=at_least_float32(student))
    return out, out.new_empty((2, rows_of(student)) if need else (0,))


def _tangent(run, tangents, value, saved, how):
    (moved,), (_, index, *_), tau = tangents, saved, how[0]
    moved = moved.to(value.dtype)
    of_rest = torch.cat([torch.zeros_like(value[..., :-1]), torch.ones_like(value[..., -1:])], -1)
    (rest,) = run(of_rest, *saved, *how)
    rest = (rest.to(value.dtype) * moved).sum(-1, keepdim=True)
    return torch.cat([moved.gather(-1, index) / tau, rest], -1)


buckets = operator(
    "buckets",
    "student index",
    "float tau, str backend",
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
