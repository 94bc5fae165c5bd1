# SPDX-License-Identifier: Apache-2.0
"""The one differentiable operator of the family: schema, fake, autograd and dispatch to the implementation.

Two operators of fixed arity (`kdkernels::gram_fwd`, `kdkernels::gram_bwd`) serve every statistic; what is asked of them
travels as the string of `problem.py`. Both take [n, p] or [G, n, p]: a view made outside would cost a graph node.
"""

from __future__ import annotations

import torch

from ..autograd import NoSecondDerivative, apply, device_type, plain, register, without_autocast
from ..dtypes import at_least_float32
from . import torch_impl
from .problem import decode


def forward(x, y, mask, sigma_x, sigma_y, problem, need):
    run = _gram_fwd if plain(x, y, mask, sigma_x, sigma_y) else torch.ops.kdkernels.gram_fwd
    return run(x, y, mask, sigma_x, sigma_y, problem, need)


def backward(grad, x, y, mask, sigma_x, sigma_y, rows, kept, problem, need):
    run = _gram_bwd if plain(grad, x, y, mask, sigma_x, sigma_y) else torch.ops.kdkernels.gram_bwd
    return run(grad, x, y, mask, sigma_x, sigma_y, rows, kept, problem, need)


class GramStatistic(torch.autograd.Function):
    """One differentiable call of the family; the vectors saved for backward are O(n), see `torch_impl.saved_shapes`."""

    generate_vmap_rule = True

    forward = staticmethod(forward)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.problem, ctx.need = inputs
        _, rows, kept = output
        ctx.mark_non_differentiable(rows, kept)
        ctx.set_materialize_grads(False)  # else backward gets zeros the size of `kept`
        ctx.save_for_backward(*tensors, rows, kept)

    @staticmethod
    def backward(ctx, grad, _rows, _kept):
        if grad is None:  # the value was not used
            return (None,) * 7
        run = GramGradient.apply if torch.is_grad_enabled() else backward
        gradients = run(grad, *ctx.saved_tensors, ctx.problem, ctx.need)
        dx, dy, dsx, dsy = (g if ctx.need >> bit & 1 else None for bit, g in enumerate(gradients))
        return dx, dy, None, dsx, dsy, None, None


class GramGradient(NoSecondDerivative):
    forward = staticmethod(backward)


def differentiable(x, y, mask, sigma_x, sigma_y, problem, need):
    """The value, with its gradient."""
    return apply(GramStatistic, x, y, mask, sigma_x, sigma_y, problem, need)[0]


def _implementation(problem):
    if problem.backend == "triton":
        from . import triton_impl

        return triton_impl
    return torch_impl


def _grouped(x, y, mask):
    """One group is the case G = 1. Indexing by None or 0 is the cheapest view there is; `reshape` costs thrice that."""
    if x.dim() == 3:
        return x, y, mask
    return x[None], y[None], None if mask is None else mask[None]


def _gram_fwd(x, y, mask, sigma_x, sigma_y, problem, need):
    problem = decode(problem)
    features = _grouped(x, y, mask)
    with without_autocast(device_type(x)):
        value, rows, kept = _implementation(problem).forward(*features, sigma_x, sigma_y, problem, need)
    return value if x.dim() == 3 else value[0], rows, kept


def _gram_bwd(grad, x, y, mask, sigma_x, sigma_y, rows, kept, problem, need):
    problem = decode(problem)
    features = _grouped(x, y, mask)
    with without_autocast(device_type(x)):
        implementation = _implementation(problem)
        upstream = grad if x.dim() == 3 else grad[None]
        gradients = implementation.backward(upstream, *features, sigma_x, sigma_y, rows, kept, problem, need)
    dx, dy, *dsigma = (g.contiguous() for g in gradients)  # as the fake promises: permuted features give permuted ones
    if x.dim() == 3:
        return dx, dy, *dsigma
    return dx[0] if need & 1 else dx, dy[0] if need & 2 else dy, *dsigma


def _gram_fwd_fake(x, y, mask, sigma_x, sigma_y, problem, need):
    problem = decode(problem)
    (n, p), q, G = x.shape[-2:], y.shape[-1], x.shape[0] if x.dim() == 3 else 1
    implementation = _implementation(problem)
    saved = implementation.saved_dtype(problem, x, y)
    rows, kept = implementation.saved_shapes(problem, G, n, p, q, need, saved)
    value = x.new_empty(x.shape[:-2], dtype=at_least_float32(x, y))
    return value, x.new_empty(rows, dtype=saved), x.new_empty(kept, dtype=saved)


def _gram_bwd_fake(grad, x, y, mask, sigma_x, sigma_y, rows, kept, problem, need):
    like = (x, y, sigma_x, sigma_y)
    return tuple(
        t.new_empty(t.shape) if need >> bit & 1 and t is not None else x.new_empty(0) for bit, t in enumerate(like)
    )


def _register():
    tensors = "Tensor x, Tensor y, Tensor? mask, Tensor? sigma_x, Tensor? sigma_y"
    register(
        "gram_fwd",
        f"({tensors}, str problem, int need) -> (Tensor value, Tensor rows, Tensor kept)",
        _gram_fwd,
        _gram_fwd_fake,
    )
    register(
        "gram_bwd",
        f"(Tensor grad, {tensors}, Tensor rows, Tensor kept, str problem, int need)"
        " -> (Tensor dx, Tensor dy, Tensor dsigma_x, Tensor dsigma_y)",
        _gram_bwd,
        _gram_bwd_fake,
    )


_register()
