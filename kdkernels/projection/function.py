# SPDX-License-Identifier: Apache-2.0
"""The differentiable operator of the family: schema, fake, autograd and dispatch to the implementation.

Fixed arity; what is saved beyond the inputs is the projected difference, one vector of rows x k numbers.
"""

from __future__ import annotations

import torch

from ..autograd import NoSecondDerivative, apply, device_type, plain, register, without_autocast
from ..backend import implementation
from ..dtypes import at_least_float32
from . import torch_impl


def forward(s, t, basis, mask, channel_dim, reduction, backend, need):
    run = _fwd if plain(s, t, basis, mask) else torch.ops.kdkernels.projected_mse_fwd
    return run(s, t, basis, mask, channel_dim, reduction, backend, need)


def backward(grad, s, t, basis, mask, projected, channel_dim, reduction, backend, need):
    run = _bwd if plain(grad, s, t, basis, mask) else torch.ops.kdkernels.projected_mse_bwd
    return run(grad, s, t, basis, mask, projected, channel_dim, reduction, backend, need)


class ProjectedMSE(torch.autograd.Function):
    """The value with its gradient; saves the inputs and Q [rows * k]."""

    generate_vmap_rule = True

    forward = staticmethod(forward)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.channel_dim, ctx.reduction, ctx.backend, ctx.need = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def backward(ctx, grad, _projected):
        if grad is None:  # the value was not used
            return (None,) * 8
        run = ProjectedMSEGradient.apply if torch.is_grad_enabled() else backward
        gradients = run(grad, *ctx.saved_tensors, ctx.channel_dim, ctx.reduction, ctx.backend, ctx.need)
        ds, dt, dbasis = (g if ctx.need >> bit & 1 else None for bit, g in enumerate(gradients))
        return ds, dt, dbasis, None, None, None, None, None


class ProjectedMSEGradient(NoSecondDerivative):
    forward = staticmethod(backward)


def differentiable(s, t, basis, mask, channel_dim, reduction, backend, need):
    return apply(ProjectedMSE, s, t, basis, mask, channel_dim, reduction, backend, need)[0]


def _fwd(s, t, basis, mask, channel_dim, reduction, backend, need):
    with without_autocast(device_type(s)):
        return implementation(__package__, backend).forward(s, t, basis, mask, channel_dim, reduction, bool(need))


def _bwd(grad, s, t, basis, mask, projected, channel_dim, reduction, backend, need):
    with without_autocast(device_type(s)):
        run = implementation(__package__, backend).backward
        return run(grad, s, t, basis, mask, projected, channel_dim, reduction, need)


def _fwd_fake(s, t, basis, mask, channel_dim, reduction, backend, need):
    dtype = at_least_float32(s, t)
    value = s.new_empty((s.shape[0],) if reduction == "none" else (), dtype=dtype)
    return value, s.new_empty(torch_impl.saved_size(s, basis, channel_dim, bool(need)), dtype=dtype)


def _bwd_fake(grad, s, t, basis, mask, projected, channel_dim, reduction, backend, need):
    features = (torch.empty_like(x) if need >> bit & 1 else s.new_empty(0) for bit, x in enumerate((s, t)))
    return *features, basis.new_empty(basis.shape) if need & 4 else s.new_empty(0)


def _register():
    how = "int channel_dim, str reduction, str backend, int need"
    tensors = "Tensor s, Tensor t, Tensor basis, Tensor? mask"
    register("projected_mse_fwd", f"({tensors}, {how}) -> (Tensor value, Tensor projected)", _fwd, _fwd_fake)
    register(
        "projected_mse_bwd",
        f"(Tensor grad, {tensors}, Tensor projected, {how}) -> (Tensor ds, Tensor dt, Tensor dbasis)",
        _bwd,
        _bwd_fake,
    )


_register()
