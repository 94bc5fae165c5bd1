# SPDX-License-Identifier: Apache-2.0
"""The mixing of rows as a differentiable operator: out_i = weight_i x_i + other_i x_index(i), one pass over x.

Its gradient is the operator on the inverse permutation: dx_j = lam_j g_j + (1 - lam_i) g_i with permutation(i) = j.
"""

from __future__ import annotations

import torch

from ..autograd import apply, plain, register
from ..backend import implementation


def lerp(x, lam, permutation, backend):
    """lam_i x_i + (1 - lam_i) x_permutation(i), with gradient to x where one is needed."""
    if torch.is_grad_enabled() and x.requires_grad:
        return apply(Lerp, x, lam, permutation, backend)
    return lerp_rows(x, lam, 1 - lam, permutation, backend)


def lerp_rows(x, weight, other, index, backend):
    run = _lerp_rows if plain(x, weight, other, index) else torch.ops.kdkernels.mixup_rows
    return run(x, weight, other, index, backend)


class Lerp(torch.autograd.Function):
    """Linear in x: its backward pass is itself, and so are all higher ones."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, lam, permutation, backend):
        return lerp_rows(x, lam, 1 - lam, permutation, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, lam, permutation, ctx.backend = inputs
        ctx.save_for_backward(lam, permutation)

    @staticmethod
    def backward(ctx, grad):
        lam, permutation = ctx.saved_tensors
        inverse = permutation.argsort()
        run = Transposed.apply if torch.is_grad_enabled() else Transposed.forward
        return run(grad, lam, permutation, inverse, ctx.backend), None, None, None


class Transposed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(grad, lam, permutation, inverse, backend):
        other = 1 - lam
        return lerp_rows(grad, lam, other[inverse] if lam.dim() else other, inverse, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, lam, permutation, _, ctx.backend = inputs
        ctx.save_for_backward(lam, permutation)

    @staticmethod
    def backward(ctx, grad):
        lam, permutation = ctx.saved_tensors
        return lerp(grad, lam, permutation, ctx.backend), None, None, None, None


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
