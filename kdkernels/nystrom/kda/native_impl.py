# SPDX-License-Identifier: Apache-2.0
"""The landmark similarity loss on a CPU through `csrc/nystrom/`, rows to each thread; float64 in PyTorch."""

from __future__ import annotations

import torch

from ...autograd import NoSecondDerivative, applied, at_least_float32, ordinary, plain
from . import torch_impl

__all__ = ["backward", "directly", "forward", "kept_shape", "sums"]


def forward(s, t, s_centers, t_centers, need: bool):
    """As `torch_impl.forward`, but V may lie in memory by columns."""
    if at_least_float32(s, t) != torch.float32:
        return torch_impl.forward(s, t, s_centers, t_centers, need)
    return _rows(s, t, s_centers, t_centers, need, None)


def sums(s, t, s_centers, t_centers, need: bool):
    """As `torch_impl.sums`."""
    if at_least_float32(s, t) != torch.float32:
        return torch_impl.sums(s, t, s_centers, t_centers, need)
    total = torch.zeros(2, dtype=torch.float64, device=s.device)
    return total, _rows(s, t, s_centers, t_centers, need, total)[1]


def _rows(s, t, s_centers, t_centers, need: bool, total):
    tensors = [x if x.dtype == torch.float32 else x.float() for x in (s, t, s_centers, t_centers)]
    return torch.ops.kdkernels.landmark_rows.default(*tensors, torch_impl.block_rows(s, s_centers), need, total)


def backward(grad, s, t, s_centers, t_centers, kept, inverse):
    if kept.dtype != torch.float32:
        return torch_impl.backward(grad, s, t, s_centers, t_centers, kept, inverse)
    return _gradient(grad, s, s_centers, kept, inverse)


def _gradient(grad, s, s_centers, kept, inverse):
    s_centers = s_centers if s_centers.dtype == torch.float32 else s_centers.float()
    ds = torch.ops.kdkernels.landmark_rows_backward.default(grad, s_centers, kept, inverse)
    return ds if s.dtype == torch.float32 else ds.to(s.dtype)


def kept_shape(s, t, s_centers, need: bool) -> tuple[int, ...]:
    return torch_impl.kept_shape(s, t, s_centers, need)


class _Directly(torch.autograd.Function):
    """The operator of what most calls on a CPU are, float32 sums where nobody watches: fewer arguments, less saved."""

    @staticmethod
    def forward(ctx, s, t, s_centers, t_centers):
        value, *kept = _rows(s, t, s_centers, t_centers, True, None)
        ctx.save_for_backward(s, s_centers, *kept)
        return value

    @staticmethod
    def backward(ctx, grad):
        run = _DirectGradient.apply if torch.is_grad_enabled() else _gradient
        return run(grad, *ctx.saved_tensors), None, None, None


class _DirectGradient(NoSecondDerivative):
    """Of s as well, which is there for the graph that refuses."""

    forward = staticmethod(_gradient)


_apply = applied(_Directly)


def directly(s, t, s_centers, t_centers):
    """The value with the gradient of s, or None where the general operator has to do it."""
    tensors = s, t, s_centers, t_centers
    if not torch.is_grad_enabled() or at_least_float32(s, t) != torch.float32 or not plain(*tensors):
        return None
    return _apply(s, t, *ordinary((s_centers,)), t_centers)
