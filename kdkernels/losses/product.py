# SPDX-License-Identifier: Apache-2.0
"""Matrix products of losses that no op computes: autocast rounds neither direction."""

from __future__ import annotations

import torch

from ..autograd import apply, device_type, ordinary, without_autocast


class _Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a, b):
        return a @ b

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        with without_autocast(device_type(grad)):
            return grad @ b.mT, a.mT @ grad

    @staticmethod
    def jvp(ctx, da, db):
        a, b = ctx.saved_tensors
        return (0 if da is None else da @ b) + (0 if db is None else a @ db)


def product(a, b):
    """a @ b of matrices, or batches of them, whose backward pass autocast does not round: PyTorch's own runs under
    whatever holds where it is called. A compiler traces both passes where the product stands."""
    return a @ b if torch.compiler.is_compiling() else apply(_Product, *ordinary((a, b)))
