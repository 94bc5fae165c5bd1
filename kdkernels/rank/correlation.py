# SPDX-License-Identifier: Apache-2.0
"""Correlations of rows as operators: Spearman with its gradient, compiled or in PyTorch, and Pearson in PyTorch.

The fused Spearman reads both sides once and writes its gradient, for an upstream of 1, in the forward pass; Pearson
saves its inputs and five numbers a row.
"""

from __future__ import annotations

import torch

from ..autograd import at_least_float32
from ..backend import implementation
from ..differentiable import of_rows, operator
from . import checks, metrics

X, Y = 1, 2  # bits of `need`


def _spearman_forward(x, y, *how):
    if x.numel() == 0:
        return tuple(t.zero_() for t in _spearman_fake(x, y, *how))
    *how, backend, need = how
    if x.dtype != y.dtype:
        wide = torch.promote_types(x.dtype, y.dtype)
        x, y = checks.widened(x, wide), checks.widened(y, wide)
    return implementation(__package__, backend).spearman_forward(x, y, *how, bool(need & X), bool(need & Y))


def _spearman_fake(x, y, *how):
    need, dtype = how[-1], at_least_float32(x, y)
    shapes = x.shape[:-1], x.shape if need & X else 0, y.shape if need & Y else 0
    return tuple(x.new_empty(shape, dtype=dtype) for shape in shapes)


def _spearman_backward(grad, dx, dy, *how):
    """Not rounded: autograd itself casts to a narrower input's dtype."""
    need, grad = how[-1], grad.unsqueeze(-1)
    return dx * grad if need & X else None, dy * grad if need & Y else None


spearman = operator(
    "spearman",
    "x y",
    "float strength, bool relative, bool kl, bool hard_target, str backend",
    "dx dy",
    wanted="x:dx y:dy",
    read="",
    forward=_spearman_forward,
    backward=_spearman_backward,
    fake=_spearman_fake,
    tangent=of_rows(0, 1),
).value


def _pearson_forward(x, y, need):
    if x.numel() == 0:
        return tuple(t.zero_() for t in _pearson_fake(x, y, need))
    value, moments = metrics.pearson(x, y)
    return value.to(at_least_float32(x, y)), moments


def _pearson_fake(x, y, need):
    rows = x.shape[:-1]
    return x.new_empty(rows, dtype=at_least_float32(x, y)), x.new_empty((5, *rows), dtype=torch.float64)


def _pearson_backward(grad, x, y, moments, need):
    return metrics.pearson_gradient(grad, x, y, moments, need & X, need & Y)


def _pearson_tangent(run, moved, value, saved, how):
    """By a gradient that is not rounded to half precision."""
    x, y, moments = saved
    return of_rows(0, 1)(run, moved, value, (*(checks.widened(t, value.dtype) for t in (x, y)), moments), how)


pearson = operator(
    "pearson",
    "x y",
    "",
    "moments",
    wanted="x y",
    forward=_pearson_forward,
    backward=_pearson_backward,
    fake=_pearson_fake,
    tangent=_pearson_tangent,
).value
