# SPDX-License-Identifier: Apache-2.0
"""The one differentiable operator of the family: schema, fake, autograd and dispatch to the implementation.

Two operators of fixed arity (`kdkernels::gram_fwd`, `kdkernels::gram_bwd`) serve every statistic; what is asked of them
travels as the string of `problem.py`. Both take [n, p] or [G, n, p]: a view made outside would cost a graph node.
"""

from __future__ import annotations

import torch

from . import torch_impl
from .problem import decode


class GramStatistic(torch.autograd.Function):
    """One differentiable call of the family; the vectors saved for backward are O(n), see `torch_impl.saved_shapes`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, y, mask, sigma_x, sigma_y, problem, need):
        return torch.ops.kdkernels.gram_fwd(x, y, mask, sigma_x, sigma_y, problem, need)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.problem, ctx.need = inputs
        _, rows, kept = output
        ctx.mark_non_differentiable(rows, kept)
        ctx.save_for_backward(*tensors, rows, kept)

    @staticmethod
    def backward(ctx, grad, _rows, _kept):
        # with create_graph=True the gradient must carry a graph, if only to say that it has none: dropped silently, a
        # gradient penalty would be a constant
        run = GramGradient.apply if torch.is_grad_enabled() else torch.ops.kdkernels.gram_bwd
        gradients = run(grad, *ctx.saved_tensors, ctx.problem, ctx.need)
        dx, dy, dsx, dsy = (g if ctx.need >> bit & 1 else None for bit, g in enumerate(gradients))
        return dx, dy, None, dsx, dsy, None, None


class GramGradient(torch.autograd.Function):
    """The backward pass as something that refuses to be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad, x, y, mask, sigma_x, sigma_y, rows, kept, problem, need):
        return torch.ops.kdkernels.gram_bwd(grad, x, y, mask, sigma_x, sigma_y, rows, kept, problem, need)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("the second derivative of a Gram op is not written out: pass backend='reference' for it")


_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_apply_directly = super(torch.autograd.Function, GramStatistic).apply


def differentiable(x, y, mask, sigma_x, sigma_y, problem, need):
    """The value, with its gradient. `Function.apply` binds a signature anew in each call, which torch.func needs."""
    if torch.compiler.is_compiling() or _transforms_active():
        return GramStatistic.apply(x, y, mask, sigma_x, sigma_y, problem, need)[0]
    return _apply_directly(x, y, mask, sigma_x, sigma_y, problem, need)[0]


def _implementation(problem):
    if problem.backend == "triton":
        from . import triton_impl

        return triton_impl
    return torch_impl


def _grouped(x, y, mask):
    """One group is the case G = 1."""
    if x.dim() == 3:
        return x, y, mask
    return x[None], y[None], None if mask is None else mask[None]


def _gram_fwd(x, y, mask, sigma_x, sigma_y, problem, need):
    problem = decode(problem)
    features = _grouped(x, y, mask)
    with without_autocast(x.device.type):
        value, rows, kept = _implementation(problem).forward(*features, sigma_x, sigma_y, problem, need)
    return value.reshape(x.shape[:-2]), rows, kept


def _gram_bwd(grad, x, y, mask, sigma_x, sigma_y, rows, kept, problem, need):
    problem = decode(problem)
    features = _grouped(x, y, mask)
    with without_autocast(x.device.type):
        implementation = _implementation(problem)
        gradients = implementation.backward(grad.reshape(-1), *features, sigma_x, sigma_y, rows, kept, problem, need)
    dx, dy, *dsigma = (g.contiguous() for g in gradients)  # as the fake promises: permuted features give permuted ones
    return dx.reshape(x.shape) if need & 1 else dx, dy.reshape(y.shape) if need & 2 else dy, *dsigma


class _Nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


_NOTHING = _Nothing()


def without_autocast(device: str):
    """Products inside keep the dtype they are given: autocast would round centred float32 rows to bfloat16."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _NOTHING


def _gram_fwd_fake(x, y, mask, sigma_x, sigma_y, problem, need):
    problem = decode(problem)
    (n, p), q, G = x.shape[-2:], y.shape[-1], x.shape[0] if x.dim() == 3 else 1
    implementation = _implementation(problem)
    rows, kept = implementation.saved_shapes(problem, G, n, p, q, need)
    saved = implementation.saved_dtype(problem, x, y)
    value = x.new_empty(x.shape[:-2], dtype=torch_impl.compute_dtype(x, y))
    return value, x.new_empty(rows, dtype=saved), x.new_empty(kept, dtype=saved)


def _gram_bwd_fake(grad, x, y, mask, sigma_x, sigma_y, rows, kept, problem, need):
    like = (x, y, sigma_x, sigma_y)
    return tuple(
        t.new_empty(t.shape) if need >> bit & 1 and t is not None else x.new_empty(0) for bit, t in enumerate(like)
    )


def _register():
    library = torch.library
    tensors = "Tensor x, Tensor y, Tensor? mask, Tensor? sigma_x, Tensor? sigma_y"
    library.define(
        "kdkernels::gram_fwd", f"({tensors}, str problem, int need) -> (Tensor value, Tensor rows, Tensor kept)"
    )
    library.define(
        "kdkernels::gram_bwd",
        f"(Tensor grad, {tensors}, Tensor rows, Tensor kept, str problem, int need)"
        " -> (Tensor dx, Tensor dy, Tensor dsigma_x, Tensor dsigma_y)",
    )
    for name, function, fake in (
        ("kdkernels::gram_fwd", _gram_fwd, _gram_fwd_fake),
        ("kdkernels::gram_bwd", _gram_bwd, _gram_bwd_fake),
    ):
        for device in ("CPU", "CUDA"):
            library.impl(name, device)(function)
        library.register_fake(name)(fake)


_register()
