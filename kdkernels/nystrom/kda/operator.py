# SPDX-License-Identifier: Apache-2.0
"""The differentiable operator of the landmark similarity loss: schema, fake, autograd and dispatch."""

from __future__ import annotations

import torch

from ...autograd import NoSecondDerivative, apply, device_type, plain, register, without_autocast
from ...backend import implementation
from ...dtypes import at_least_float32
from . import torch_impl


def forward(s, t, s_centers, t_centers, backend, need):
    run = _fwd if plain(s, t, s_centers, t_centers) else torch.ops.kdkernels.landmark_similarity_fwd
    return run(s, t, s_centers, t_centers, backend, need)


def backward(grad, s, t, s_centers, t_centers, kept, inverse, backend):
    run = _bwd if plain(grad, s, t, s_centers, t_centers) else torch.ops.kdkernels.landmark_similarity_bwd
    return run(grad, s, t, s_centers, t_centers, kept, inverse, backend)


class LandmarkSimilarity(torch.autograd.Function):
    """The value with the gradient of s; the other inputs are constants."""

    generate_vmap_rule = True

    forward = staticmethod(forward)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.backend, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx, grad, _kept, _inverse):
        if grad is None:  # the value was not used
            return (None,) * 6
        run = LandmarkSimilarityGradient.apply if torch.is_grad_enabled() else backward
        return run(grad, *ctx.saved_tensors, ctx.backend), None, None, None, None, None


class LandmarkSimilarityGradient(NoSecondDerivative):
    forward = staticmethod(backward)


class CompiledRows(torch.autograd.Function):
    """`LandmarkSimilarity` of what most calls on a CPU are, through operators of fewer arguments."""

    @staticmethod
    def forward(ctx, s, t, s_centers, t_centers):
        rows = torch_impl.block_rows(s, s_centers)
        value, *kept = torch.ops.kdkernels.landmark_rows.default(s, t, s_centers, t_centers, rows, True, None)
        ctx.save_for_backward(s, s_centers, *kept)
        return value

    @staticmethod
    def backward(ctx, grad):
        run = CompiledRowsGradient.apply if torch.is_grad_enabled() else _compiled_gradient
        return run(grad, *ctx.saved_tensors), None, None, None


def _compiled_gradient(grad, s, s_centers, kept, inverse):
    return torch.ops.kdkernels.landmark_rows_backward.default(grad, s_centers, kept, inverse)


class CompiledRowsGradient(NoSecondDerivative):
    """Of s as well, which is there for the graph that refuses."""

    forward = staticmethod(_compiled_gradient)


def _direct(*tensors) -> bool:
    """Whether the compiled rows read these as they are, and nobody watches."""
    for tensor in tensors:
        if tensor.dtype != torch.float32:
            return False
    return plain(*tensors)


def differentiable(s, t, s_centers, t_centers, backend):
    if backend == "cpp" and _direct(s, t, s_centers, t_centers):
        return apply(CompiledRows, s, t, s_centers, t_centers)
    return apply(LandmarkSimilarity, s, t, s_centers, t_centers, backend, True)[0]


def of_all_ranks(function):
    class OfAllRanks(function):
        generate_vmap_rule = False

        @staticmethod
        def setup_context(ctx, inputs, output):
            *inputs, ctx.group = inputs
            function.setup_context(ctx, inputs, output)

        @staticmethod
        def backward(ctx, grad, *unused):
            grad = None if grad is None else ctx.group.sum(grad)
            return *function.backward(ctx, grad, *unused), None

    return OfAllRanks


class LandmarkSimilarityOverRanks(of_all_ranks(LandmarkSimilarity)):
    """Both sums travel, and backward one number."""

    @staticmethod
    def forward(s, t, s_centers, t_centers, backend, need, group):
        with without_autocast(device_type(s)):
            sums, kept = implementation(__package__, backend).sums(s, t, s_centers, t_centers, need)
            return torch_impl.finished(group.sum(sums), at_least_float32(s, t), kept)


def over_ranks(s, t, s_centers, t_centers, backend, need, group):
    run = LandmarkSimilarityOverRanks.apply if need else LandmarkSimilarityOverRanks.forward
    return run(s, t, s_centers, t_centers, backend, need, group)[0]


def _fwd(s, t, s_centers, t_centers, backend, need):
    with without_autocast(device_type(s)):
        return implementation(__package__, backend).forward(s, t, s_centers, t_centers, need)


def _bwd(grad, s, t, s_centers, t_centers, kept, inverse, backend):
    with without_autocast(device_type(s)):
        return implementation(__package__, backend).backward(grad, s, t, s_centers, t_centers, kept, inverse)


def _fwd_fake(s, t, s_centers, t_centers, backend, need):
    dtype = at_least_float32(s, t)
    kept = s.new_empty(implementation(__package__, backend).kept_shape(s, t, s_centers, need), dtype=dtype)
    return s.new_empty((), dtype=dtype), kept, s.new_empty((), dtype=dtype)


def _bwd_fake(grad, s, t, s_centers, t_centers, kept, inverse, backend):
    return s.new_empty(s.shape)


def _register():
    tensors = "Tensor s, Tensor t, Tensor s_centers, Tensor t_centers"
    register(
        "landmark_similarity_fwd",
        f"({tensors}, str backend, bool need) -> (Tensor value, Tensor kept, Tensor inverse)",
        _fwd,
        _fwd_fake,
    )
    register(
        "landmark_similarity_bwd",
        f"(Tensor grad, {tensors}, Tensor kept, Tensor inverse, str backend) -> Tensor",
        _bwd,
        _bwd_fake,
    )


_register()
