# SPDX-License-Identifier: Apache-2.0
"""The mixing of rows as a differentiable operator: out_i = weight_i x_i + other_i x_index(i), one pass over x.

Linear in x: its gradient is the operator on the inverse permutation, dx_j = weight_j g_j + other_i g_i with
index(i) = j, and so are all higher ones; its tangent is itself.
"""

from __future__ import annotations

import torch

from ..autograd import apply, in_forward_mode, in_traced_gradient, ordinary, plain, register
from ..backend import implementation
from . import torch_impl


def lerp(x, lam, permutation, backend):
    """lam_i x_i + (1 - lam_i) x_permutation(i), with gradient to x where one is needed."""
    return _lerp(x, lam, 1 - lam, permutation, backend)


def _lerp(x, weight, other, index, backend):
    if in_forward_mode() or in_traced_gradient():  # by products whose derivatives PyTorch has, in every mode
        return torch_impl.lerp_rows(x, weight, other, index)
    if torch.is_grad_enabled() and x.requires_grad:
        return apply(Lerp, x, *ordinary((weight, other, index)), backend)
    return lerp_rows(x, weight, other, index, backend)


def lerp_rows(x, weight, other, index, backend):
    run = _lerp_rows if plain(x, weight, other, index) else torch.ops.kdkernels.mixup_rows
    return run(x, weight, other, index, backend)


class Lerp(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, other, index, backend):
        return lerp_rows(x, weight, other, index, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *tensors, ctx.backend = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        return transposed(grad, *ctx.saved_tensors, ctx.backend), None, None, None, None


def transposed(grad, weight, other, index, backend):
    inverse = index.argsort()
    return _lerp(grad, weight, other[inverse] if other.dim() else other, inverse, backend)


def _lerp_rows(x, weight, other, index, backend):
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    with torch.no_grad():
        return implementation(__package__, backend).lerp_rows(x, weight, other, index)


register(
    "mixup_rows",
    "(Tensor x, Tensor weight, Tensor other, Tensor index, str backend) -> Tensor",
    _lerp_rows,
    lambda x, weight, other, index, backend: x.new_empty(x.shape),
)
