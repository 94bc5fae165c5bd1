# SPDX-License-Identifier: Apache-2.0
"""The differentiable operator of the family: schema, fake, autograd and dispatch to the implementation.

`kdkernels::relation_fwd` gives the value and, for each side that needs it, what its gradient is made of: n x n weights,
or all of it but the upstream factor (`kept_of` of the implementation). `kdkernels::relation_bwd` makes the gradient of
one side. Both take [n, p] or [G, n, p].
"""

from __future__ import annotations

import torch

from ..autograd import NoSecondDerivative, apply, device_type, plain, register, without_autocast
from ..backend import implementation
from ..dtypes import at_least_float32
from .problem import STUDENT, TEACHER, sides


def relation(x, y, mask, kind: str, backend: str):
    """The value, with gradient where one is needed."""
    need = 0
    if torch.is_grad_enabled():
        need = STUDENT * x.requires_grad | TEACHER * y.requires_grad
    arguments = (x, y, mask, kind, need, backend)
    return (apply(Relation, *arguments) if need else forward(*arguments))[0]


def forward(x, y, mask, kind, need, backend):
    run = _relation_fwd if plain(x, y, mask) else torch.ops.kdkernels.relation_fwd
    return run(x, y, mask, kind, need, backend)


def backward(grad, x, mask, kept, kind, backend):
    run = _relation_bwd if plain(grad, x, mask) else torch.ops.kdkernels.relation_bwd
    return run(grad, x, mask, kept, kind, backend)


class Relation(torch.autograd.Function):
    """One differentiable call; saved: the features of the sides that get a gradient, and what forward keeps of them."""

    generate_vmap_rule = True

    forward = staticmethod(forward)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, mask, ctx.kind, ctx.need, ctx.backend = inputs
        _, *kept = output
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if ctx.need & STUDENT else None, y if ctx.need & TEACHER else None, mask, *kept)

    @staticmethod
    def backward(ctx, grad, _of_x, _of_y):
        if grad is None:
            return (None,) * 6
        *features, mask, of_x, of_y = ctx.saved_tensors
        run = RelationGradient.apply if torch.is_grad_enabled() else backward
        gradients, kept = [None, None], (of_x, of_y)
        for k in sides(ctx.need):
            gradients[k] = run(grad, features[k], mask, kept[k], ctx.kind, ctx.backend)
        return *gradients, None, None, None, None


class RelationGradient(NoSecondDerivative):
    forward = staticmethod(backward)


def _grouped(x, mask):
    """One group is the case G = 1."""
    return (x, mask) if x.dim() == 3 else (x[None], None if mask is None else mask[None])


def _relation_fwd(x, y, mask, kind, need, backend):
    features, kept = _grouped(x, mask)
    with without_autocast(device_type(x)):
        run = implementation(__package__, backend).forward
        value, of_x, of_y = run(features, _grouped(y, None)[0], kept, kind, need)
    return value if x.dim() == 3 else value[0], of_x, of_y


def _relation_fwd_fake(x, y, mask, kind, need, backend):
    both = [_grouped(side, None)[0] for side in (x, y)]
    shapes, dtype = implementation(__package__, backend).kept_of(*both, kind)
    kept = [x.new_empty(shape if need >> k & 1 else (0,), dtype=dtype) for k, shape in enumerate(shapes)]
    return x.new_empty(x.shape[:-2], dtype=at_least_float32(x, y)), *kept


def _relation_bwd(grad, x, mask, kept, kind, backend):
    features, mask = _grouped(x, mask)
    with without_autocast(device_type(x)):
        dx = implementation(__package__, backend).backward(grad.reshape(-1), features, mask, kept, kind)
    return dx if x.dim() == 3 else dx[0]


def _relation_bwd_fake(grad, x, mask, kept, kind, backend):
    return x.new_empty(x.shape)


def _register():
    register(
        "relation_fwd",
        "(Tensor x, Tensor y, Tensor? mask, str kind, int need, str backend) -> (Tensor value, Tensor, Tensor)",
        _relation_fwd,
        _relation_fwd_fake,
    )
    register(
        "relation_bwd",
        "(Tensor grad, Tensor x, Tensor? mask, Tensor kept, str kind, str backend) -> Tensor",
        _relation_bwd,
        _relation_bwd_fake,
    )


_register()
