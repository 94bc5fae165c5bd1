# SPDX-License-Identifier: Apache-2.0
"""How each class correlates over the rows, straight from hidden states: moments of a chunk after another, no logits.

A class's slopes need the moments of all rows, so backward makes the logits of each chunk once more: six products in the
place of four. Kept are the inputs and six numbers a class. MATH.md, section 11.
"""

from __future__ import annotations

import torch

from ..autograd import at_least_float32
from ..differentiable import operator
from .linear import side_of
from .linear_driver import Side, values_and_gradients

TENSORS = "hidden weight? bias? teacher teacher_weight? teacher_bias? weights?"
SIDES = 6  # tensors of both


def _kept(rows, weights):
    return rows if weights is None else torch.where(weights[:, None] != 0, rows, 0)


def _moments_of(s, t, weights):
    """[6, C] of a chunk: the number of rows that count, means of both sides, centred sums of s s, t t and s t."""
    n = torch.full_like(s[0], len(s)) if weights is None else (weights != 0).sum().to(s.dtype).expand(s.shape[1])
    means = [_kept(side, weights).sum(0) / n.clamp_min(1) for side in (s, t)]
    s, t = (_kept(side - mean, weights) for side, mean in zip((s, t), means, strict=True))
    return torch.stack([n, *means, (s * s).sum(0), (t * t).sum(0), (s * t).sum(0)]).double()


def _merged(a, b):
    """Those of the rows of both (Chan, Golub and LeVeque, 1979)."""
    n, apart = a[0] + b[0], b[1:3] - a[1:3]
    share = b[0] / n.clamp_min(1)
    between = torch.stack([apart[0] * apart[0], apart[1] * apart[1], apart[0] * apart[1]]) * (a[0] * share)
    return torch.cat([n[None], a[1:3] + apart * share, a[3:] + b[3:] + between])


def _probabilities(z, y, tau: float):
    dtype = at_least_float32(z, y)
    return ((side.to(dtype) / tau).softmax(-1) for side in (z, y))


def _norms(moments):
    return moments[3].sqrt(), moments[4].sqrt(), moments[5]


def _over_chunks(tensors, how, loss, need: int):
    *scales, classes, _, _, rows = how
    sides = Side(*tensors[:3], *scales[:2]), Side(*tensors[3:SIDES], *scales[2:])
    return values_and_gradients(*sides, classes, tensors[SIDES:], loss, rows, need)


def _forward(*a):
    tensors, (*how, _need) = a[: SIDES + 1], a[SIDES + 1 :]
    *_, classes, tau, eps, _ = how
    moments = tensors[0].new_zeros((6, classes), dtype=torch.float64)

    def loss(z, y, weights, _need):
        nonlocal moments
        moments = _merged(moments, _moments_of(*_probabilities(z, y, tau), weights))
        return z.new_zeros(len(z)), None

    _over_chunks(tensors, how, loss, 0)
    norm_s, norm_t, dot = _norms(moments)
    apart = 1 - (dot / (norm_s * norm_t + eps)).mean()
    return torch.where(moments[0, 0] > 1, apart, 0).to(at_least_float32(*_given(tensors))), moments


def _backward(grad, *a):
    tensors, moments, (*how, need) = a[: SIDES + 1], a[SIDES + 1], a[SIDES + 2 :]
    *_, tau, eps, _ = how
    norm_s, norm_t, dot = _norms(moments)
    of_t = 1 / (norm_s * norm_t + eps)
    # no gradient through the norm of a class that is the same in all rows
    of_s = torch.where(norm_s == 0, 0, dot * norm_t * of_t**2 / torch.where(norm_s == 0, 1, norm_s))
    factor = torch.where((moments[0] > 1) & (grad != 0), -grad.double() / (tau * len(dot)), 0)
    rows_of_classes = factor * of_t, factor * of_s, *moments[1:3]

    def loss(z, y, weights, _need):
        s, t = _probabilities(z, y, tau)
        a, b, mean_s, mean_t = (row.to(s.dtype) for row in rows_of_classes)
        slopes = (t - mean_t).mul_(a).sub_((s - mean_s).mul_(b)).mul_(s)
        slopes -= s * slopes.sum(-1, keepdim=True)
        left = factor[0] == 0 if weights is None else (weights[:, None] == 0) | (factor[0] == 0)
        return z.new_zeros(len(z)), slopes.masked_fill_(left, 0).to(z.dtype)

    found = _over_chunks(tensors, how, loss, need)[1:]
    return [g if t is None else g.to(t.dtype) for g, t in zip(found, tensors[:3], strict=True)]


def _given(tensors):
    return [t for t in tensors[:SIDES] if t is not None]


def _fake(*a):
    tensors, how = a[: SIDES + 1], a[SIDES + 1 :]
    value = tensors[0].new_empty((), dtype=at_least_float32(*_given(tensors)))
    return value, tensors[0].new_empty((6, how[4]), dtype=torch.float64)


_columns = operator(
    "linear_columns",
    TENSORS,
    "float scale, float softcap, float teacher_scale, float teacher_softcap, SymInt classes, float tau, float eps, "
    "int rows",
    "moments",
    wanted="hidden weight bias",
    forward=_forward,
    backward=_backward,
    fake=_fake,
).value


def columns_of_heads(student, teacher, weights, tau: float, eps: float, chunk: int | None):
    """1 - mean_c of Pearson's correlation of class c over the rows of weight other than 0, of softmax(z / tau); 0 of
    fewer than 2 rows. Sides: LinearLogits, or logits [..., C]. weights: [R], or None. chunk: rows at a time."""
    sides = side_of(student), side_of(teacher)
    tensors = *sides[0][:3], *sides[1][:3], weights
    return _columns(*tensors, *sides[0][3:], *sides[1][3:], student.shape[-1], tau, eps, chunk or 0)
