# SPDX-License-Identifier: Apache-2.0
"""The differentiable operator of losses straight from hidden states: `linear_fwd` makes the gradients, too.

In a plain eager call backward gets them once and keeps none: autograd takes the weight's as it is for `weight.grad`,
where it would copy a saved one. A second backward pass computes them again.
"""

from __future__ import annotations

import functools

import torch

from ..autograd import (
    NoSecondDerivative,
    applied,
    at_least_float32,
    device_type,
    is_batched,
    ordinary,
    plain,
    without_autocast,
)
from ..differentiable import operator
from ..distributed import eager
from .linear_driver import BIAS, HIDDEN, WEIGHT, Side, held, values_and_gradients
from .linear_kinds import Asked, kind_of

# three numbers, or vectors, a row that a kind reads, and its weights
TENSORS = "hidden weight? bias? teacher teacher_weight? teacher_bias? first? second? third? weights?"
COUNT = len(TENSORS.split())


def _forward(*a, slices=None):
    scales, (classes, rows, kind, numbers, factor, mean, backend, need) = a[COUNT : COUNT + 4], a[COUNT + 4 :]
    student, teacher = Side(*a[:3], *scales[:2]), Side(*a[3:6], *scales[2:])
    run, factor = kind_of(kind, slices), factor / len(student.rows) if mean else factor
    backend = slices or backend

    def loss(z, y, *own):
        *own, weights, need = own
        return run(z, y, own, factor if weights is None else weights * factor, numbers, backend, need > 0)

    with without_autocast(device_type(a[0])):
        values, *found = values_and_gradients(student, teacher, classes, a[6:COUNT], loss, rows, need, slices)
    return values.sum(), *found


def _backward(grad, hidden, weight, bias, *rest):
    """Gradients that stay where they are: somebody else may ask for them again."""
    made = zip((hidden, weight, bias), rest[:3], strict=True)
    return [None if t is None or not g.numel() else (g * grad).masked_fill_(grad == 0, 0).to(t.dtype) for t, g in made]


def _fake(hidden, weight, bias, teacher, teacher_weight, teacher_bias, *rest):
    need = rest[-1]
    dtype = at_least_float32(hidden, weight, bias, teacher, teacher_weight, teacher_bias)
    made = []
    for bit, t in ((HIDDEN, hidden), (WEIGHT, weight), (BIAS, bias)):
        shape, kept = (t.shape, held(t.dtype)) if need & bit else ((0,), hidden.dtype)
        made.append(hidden.new_empty(shape, dtype=kept))
    return hidden.new_empty((), dtype=dtype), *made


_linear = operator(
    "linear",
    TENSORS,
    "float scale, float softcap, float teacher_scale, float teacher_softcap, SymInt classes, int rows, str kind, "
    "float[] numbers, float factor, bool mean, str backend",
    "d_hidden d_weight d_bias",
    read="hidden weight? bias?",
    wanted="hidden weight bias",
    forward=_forward,
    backward=_backward,
    fake=_fake,
)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *a):
        *a, ctx.slices = a
        value, *ctx.found = _forward(*a, slices=ctx.slices)
        ctx.how = a[COUNT:]
        ctx.save_for_backward(*a[:COUNT])
        return value

    @staticmethod
    def backward(ctx, grad):
        found, ctx.found = ctx.found, None
        if found is None:
            again = _linear.forward if ctx.slices is None else functools.partial(_forward, slices=ctx.slices)
            _, *found = again(*ctx.saved_tensors, *ctx.how)
        learning = ctx.saved_tensors[:3]
        if is_batched(grad) or not plain(grad):
            made = _linear.backward(grad, *learning, *found, *ctx.how)
        else:
            run = _Gradient.apply if torch.is_grad_enabled() else _handed_over
            made = run(grad, found, *learning)
        wanted = [made[k] if ctx.how[-1] & bit else None for k, bit in enumerate((HIDDEN, WEIGHT, BIAS))]
        return *wanted, *[None] * (COUNT - 2 + len(ctx.how))


class _Gradient(NoSecondDerivative):
    @staticmethod
    def forward(*a):
        return _handed_over(*a)


def _handed_over(grad, found, *learning):
    """Times the upstream, in place; an upstream of 0 leaves no NaN."""
    made = []
    for g, t in zip(found, learning, strict=True):
        if not grad.is_cpu:  # where a look at it would wait for the device
            g.masked_fill_(grad == 0, 0).mul_(grad)
        elif grad == 0:
            g.zero_()
        elif grad != 1:
            g.mul_(grad)
        made.append(g if t is None else g.to(t.dtype))
    return tuple(made)


_once = applied(_Once)
# no operator could carry a group
_over_ranks = eager(lambda *a: _once(*a) if a[-2] else _forward(*a[:-1], slices=a[-1])[0])


def rows_of_heads(student: Side, teacher: Side, classes: int, per_row, asked: Asked):
    """The sum, or the mean, of the values of all rows; per_row: three tensors and weights, [R, ...] or None."""
    tensors = (*student[:3], *teacher[:3], *per_row)
    how = asked.kind, list(map(float, asked.numbers)), asked.factor, asked.reduction == "mean", asked.backend
    numbers = (*student[3:], *teacher[3:], classes, asked.chunk or 0, *how)
    if asked.slices is None and not plain(*tensors):
        return _linear.value(*tensors, *numbers)
    need = 0
    for bit, t in zip((HIDDEN, WEIGHT, BIAS), student[:3], strict=True):
        need |= bit * (t is not None and t.requires_grad and torch.is_grad_enabled())
    if asked.slices is not None:
        return _over_ranks(*ordinary(tensors), *numbers, need, asked.slices)
    if need:
        return _once(*ordinary(tensors), *numbers, need, None)
    return _linear.forward(*tensors, *numbers, 0)[0]
