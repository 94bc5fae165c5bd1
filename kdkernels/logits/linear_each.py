# SPDX-License-Identifier: Apache-2.0
"""Values of single rows straight from hidden states: a row's upstream is known in backward only, which makes the logits
of a chunk once more, six products in the place of four. Kept are the inputs."""

from __future__ import annotations

import torch

from ..autograd import NoSecondDerivative, device_type, without_autocast
from ..distributed import eager
from .linear_driver import Side, values_and_gradients
from .linear_kinds import Asked, kind_of


class _Each(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, *tensors):
        ctx.call = call
        ctx.save_for_backward(*tensors)
        return _run(call, tensors, 0)[0]

    @staticmethod
    def backward(ctx, grad):
        need = sum(wanted << bit for bit, wanted in enumerate(ctx.needs_input_grad[1:4]))
        run = _Gradients.apply if torch.is_grad_enabled() else _Gradients.forward
        found = run(grad, ctx.call, need, *ctx.saved_tensors)
        made = [found[bit] if need >> bit & 1 else None for bit in range(3)]
        return None, *made, *[None] * (len(ctx.saved_tensors) - 3)


class _Gradients(NoSecondDerivative):
    @staticmethod
    def forward(grad, call, need, *tensors):
        *tensors, weights = tensors
        # a row's weight is what its slopes are multiplied by
        grad = grad if weights is None else torch.where(weights == 0, 0, grad * weights)
        found = _run(call, (*tensors, grad), need)[1:]
        return tuple(g if t is None else g.to(t.dtype) for g, t in zip(found, tensors[:3], strict=True))


def _run(call, tensors, need):
    scales, classes, asked = call
    student, teacher = Side(*tensors[:3], *scales[:2]), Side(*tensors[3:6], *scales[2:])
    run, where = kind_of(asked.kind, asked.slices), asked.slices or asked.backend
    numbers = list(map(float, asked.numbers))

    def loss(z, y, *own):
        *own, weights, need = own
        return run(z, y, own, asked.factor if weights is None else weights * asked.factor, numbers, where, need > 0)

    with without_autocast(device_type(tensors[0])):
        return values_and_gradients(
            student, teacher, classes, tensors[6:], loss, asked.chunk or 0, need, slices=asked.slices
        )


@eager
def each_row_of_heads(student: Side, teacher: Side, classes: int, per_row, asked: Asked):
    """The value of each row, [R]; as `linear_operator.rows_of_heads`, which adds them up."""
    call = (*student[3:], *teacher[3:]), classes, asked
    return _Each.apply(call, *student[:3], *teacher[:3], *per_row)
