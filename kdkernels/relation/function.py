# SPDX-License-Identifier: Apache-2.0
"""The differentiable operator of the family: schema, fake, autograd and dispatch to the implementation.

`kdkernels::relation_fwd` gives the value and, for each side that needs it, the n x n weights of the gradient;
`kdkernels::relation_bwd` multiplies those of one side with its features. Both take [n, p] or [G, n, p].
"""

from __future__ import annotations

import torch

from ..autograd import NoSecondDerivative, apply, device_type, plain, register, without_autocast
from . import torch_impl
from .problem import STUDENT, TEACHER, compute_dtype, sides


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


def backward(grad, x, mask, W, kind):
    run = _relation_bwd if plain(grad, x, mask) else torch.ops.kdkernels.relation_bwd
    return run(grad, x, mask, W, kind)


class Relation(torch.autograd.Function):
    """One differentiable call; saved: n x n weights, and the features of the sides that get a gradient."""

    generate_vmap_rule = True

    forward = staticmethod(forward)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, mask, ctx.kind, ctx.need, _ = inputs
        _, W = output
        ctx.mark_non_differentiable(W)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if ctx.need & STUDENT else None, y if ctx.need & TEACHER else None, mask, W)

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 6
        *features, mask, W = ctx.saved_tensors
        run = RelationGradient.apply if torch.is_grad_enabled() else backward
        gradients = [None, None]
        for place, k in enumerate(sides(ctx.need)):
            gradients[k] = run(grad, features[k], mask, W[place], ctx.kind)
        return *gradients, None, None, None, None


class RelationGradient(NoSecondDerivative):
    forward = staticmethod(backward)


def _implementation(backend):
    if backend == "triton":
        from . import triton_impl

        return triton_impl
    if backend == "cpp":
        from . import native_impl

        return native_impl
    return torch_impl


def _grouped(x, mask):
    """One group is the case G = 1."""
    return (x, mask) if x.dim() == 3 else (x[None], None if mask is None else mask[None])


def _relation_fwd(x, y, mask, kind, need, backend):
    features, kept = _grouped(x, mask)
    with without_autocast(device_type(x)):
        value, W = _implementation(backend).forward(features, _grouped(y, None)[0], kept, kind, need)
    return value if x.dim() == 3 else value[0], W


def _relation_fwd_fake(x, y, mask, kind, need, backend):
    G, n = x.shape[0] if x.dim() == 3 else 1, x.shape[-2]
    dtype, count = compute_dtype(x, y), len(sides(need))
    return x.new_empty(x.shape[:-2], dtype=dtype), x.new_empty((count, G, n, n) if need else (0,), dtype=torch.float64)


def _relation_bwd(grad, x, mask, W, kind):
    features, kept = _grouped(x, mask)
    with without_autocast(device_type(x)):
        dx = torch_impl.backward(grad.reshape(-1), features, kept, W, kind)
    return dx if x.dim() == 3 else dx[0]


def _relation_bwd_fake(grad, x, mask, W, kind):
    return x.new_empty(x.shape)


def _register():
    register(
        "relation_fwd",
        "(Tensor x, Tensor y, Tensor? mask, str kind, int need, str backend) -> (Tensor value, Tensor W)",
        _relation_fwd,
        _relation_fwd_fake,
    )
    register(
        "relation_bwd",
        "(Tensor grad, Tensor x, Tensor? mask, Tensor W, str kind) -> Tensor",
        _relation_bwd,
        _relation_bwd_fake,
    )


_register()
