# SPDX-License-Identifier: Apache-2.0
"""The differentiable operators of the family: schemas, fakes, autograd and dispatch to the implementations.

Operators take [..., n] and rank along the last dimension: a reshape made outside would cost a graph node. Their last
argument names the backend, "torch", "cpp" or "cuda"; the reference is plain autograd and needs no operator.
"""

from __future__ import annotations

import torch

from ..autograd import NoSecondDerivative, apply, device_type, plain, register, without_autocast
from ..dtypes import at_least_float32
from . import native_impl, torch_impl

X, STRENGTH = 1, 2  # bits of `need`


def _remember(ctx, inputs, output, tensors):
    """The first output is differentiable; `tensors` are what its backward pass reads."""
    *_, ctx.kl, ctx.descending, ctx.need, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad, differentiable, backward):
    if grad is None:  # the value was not used
        return (None,) * 8
    run = differentiable if torch.is_grad_enabled() else backward
    dx, dstrengths = run(grad, *ctx.saved_tensors, ctx.kl, ctx.descending, ctx.need, ctx.backend)
    return (dx if ctx.need & X else None, dstrengths if ctx.need & STRENGTH else None, *(None,) * 6)


class SoftRank(torch.autograd.Function):
    """Ranks; saved for backward: x, the ranks, block ids (int32), one strength a row. No permutation."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        return rank_forward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _remember(ctx, inputs, output, (*inputs[:2], *output))

    @staticmethod
    def backward(ctx, grad, *_):
        return _gradients(ctx, grad, SoftRankGradient.apply, rank_backward)


class SoftSort(torch.autograd.Function):
    """Sorted values; saved for backward: the sorted rows, their permutation, block starts, one strength a row."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        return sort_forward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _remember(ctx, inputs, output, (inputs[1], *output[1:]))

    @staticmethod
    def backward(ctx, grad, *_):
        return _gradients(ctx, grad, SoftSortGradient.apply, sort_backward)


class SoftRankGradient(NoSecondDerivative):
    @staticmethod
    def forward(*arguments):
        return rank_backward(*arguments)


class SoftSortGradient(NoSecondDerivative):
    @staticmethod
    def forward(*arguments):
        return sort_backward(*arguments)


def soft_rank(x, strength, kl, descending, backend):
    """Soft ranks of x [..., n] under a `strength.Strength`, with gradient where one is needed."""
    need = _need(x, strength.tensor)
    arguments = (x, strength.tensor, strength.number, strength.relative, kl, descending, need, backend)
    return (apply(SoftRank, *arguments) if need else rank_forward(*arguments))[0]


def soft_sort(x, strength, kl, descending, backend):
    need = _need(x, strength.tensor)
    arguments = (x, strength.tensor, strength.number, strength.relative, kl, descending, need, backend)
    return (apply(SoftSort, *arguments) if need else sort_forward(*arguments))[0]


def blocks(x, strength, kl, backend):
    """Block ids of x [..., n], -1 for an element alone; without gradient."""
    return rank_forward(x, strength.tensor, strength.number, strength.relative, kl, False, X, backend)[1]


def _need(x, strengths) -> int:
    if not torch.is_grad_enabled():
        return 0
    return X * x.requires_grad | STRENGTH * (strengths is not None and strengths.requires_grad)


def rank_forward(x, strengths, *rest):
    run = _rank_fwd if plain(x, strengths) else torch.ops.kdkernels.soft_rank_fwd
    return run(x, strengths, *rest)


def rank_backward(grad, x, strengths, *rest):
    run = _rank_bwd if plain(grad, x, strengths) else torch.ops.kdkernels.soft_rank_bwd
    return run(grad, x, strengths, *rest)


def sort_forward(x, strengths, *rest):
    run = _sort_fwd if plain(x, strengths) else torch.ops.kdkernels.soft_sort_fwd
    return run(x, strengths, *rest)


def sort_backward(grad, strengths, *rest):
    run = _sort_bwd if plain(grad, strengths) else torch.ops.kdkernels.soft_sort_bwd
    return run(grad, strengths, *rest)


def _implementation(backend):
    return torch_impl if backend == "torch" else native_impl


def _rank_fwd(x, strengths, strength, relative, kl, descending, need, backend):
    if x.numel() == 0:
        return _rank_fwd_fake(x, strengths, strength, relative, kl, descending, need, backend)
    with without_autocast(device_type(x)):
        run = _implementation(backend).rank_forward
        return run(x, strengths, strength, relative, kl, descending, bool(need))


def _rank_fwd_fake(x, strengths, strength, relative, kl, descending, need, backend):
    blocks = x.new_empty(x.shape if need else 0, dtype=torch.int32)
    eps = x.new_empty(x.shape[:-1], dtype=torch.float64)
    return x.new_empty(x.shape, dtype=at_least_float32(x)), blocks, eps.fill_(1.0)


def _rank_bwd(grad, x, strengths, rank, blocks, eps, kl, descending, need, backend):
    if x.numel() == 0:
        return _rank_bwd_fake(grad, x, strengths, rank, blocks, eps, kl, descending, need, backend)
    with without_autocast(device_type(x)):
        dx = _implementation(backend).rank_backward(grad, x, rank, blocks, eps, kl, descending)
        dstrengths = x.new_empty(0, dtype=torch.float64)
        if need & STRENGTH:
            dstrengths = torch_impl.rank_strength_gradient(dx, grad, x, strengths, rank, blocks, eps, kl, descending)
    return dx, dstrengths


def _rank_bwd_fake(grad, x, strengths, rank, blocks, eps, kl, descending, need, backend):
    dstrengths = torch.zeros_like(strengths) if need & STRENGTH else x.new_empty(0, dtype=torch.float64)
    return x.new_empty(x.shape), dstrengths


def _sort_fwd(x, strengths, strength, relative, kl, descending, need, backend):
    if x.numel() == 0:
        return _sort_fwd_fake(x, strengths, strength, relative, kl, descending, need, backend)
    with without_autocast(device_type(x)):
        if backend == "cpp":
            return native_impl.soft_sort_forward(x, strengths, strength, relative, kl, descending)
        theta = x.contiguous() if descending else torch_impl.negated(x.contiguous())
        s, order = torch_impl.sort_descending(theta)
        value, start, eps = _implementation(backend).sort_forward(s, strengths, strength, relative, kl)
        if not descending:
            value = torch_impl.negated(value)
    return value, s, order, start, eps


def _sort_fwd_fake(x, strengths, strength, relative, kl, descending, need, backend):
    value = x.new_empty(x.shape, dtype=at_least_float32(x))
    order, start = x.new_empty(x.shape, dtype=torch.int64), x.new_empty(x.shape, dtype=torch.int32)
    return value, x.new_empty(x.shape), order, start, x.new_empty(x.shape[:-1], dtype=torch.float64)


def _sort_bwd(grad, strengths, s, order, start, eps, kl, descending, need, backend):
    if s.numel() == 0:
        return _sort_bwd_fake(grad, strengths, s, order, start, eps, kl, descending, need, backend)
    with without_autocast(device_type(s)):
        # value = -f(-x) where ascending: the signs cancel
        if backend == "cpp":
            dx = native_impl.soft_sort_backward(grad, s, order, start, kl)
        else:
            ds = _implementation(backend).sort_backward(grad, s, start, kl)
            dx = torch.empty_like(ds).scatter_(-1, order, ds)
        dstrengths = s.new_empty(0, dtype=torch.float64)
        if need & STRENGTH:
            dstrengths = torch_impl.sort_strength_gradient(grad, strengths, s, start, eps, kl, descending)
    return dx, dstrengths


def _sort_bwd_fake(grad, strengths, s, order, start, eps, kl, descending, need, backend):
    dstrengths = torch.zeros_like(strengths) if need & STRENGTH else s.new_empty(0, dtype=torch.float64)
    return s.new_empty(s.shape), dstrengths


def _register():
    how = "Tensor? strengths, float strength, bool relative, bool kl, bool descending, int need, str backend"
    tail = "Tensor eps, bool kl, bool descending, int need, str backend) -> (Tensor dx, Tensor dstrengths)"
    schemas = {
        "soft_rank_fwd": (f"(Tensor x, {how}) -> (Tensor rank, Tensor blocks, Tensor eps)", _rank_fwd, _rank_fwd_fake),
        "soft_rank_bwd": (
            f"(Tensor grad, Tensor x, Tensor? strengths, Tensor rank, Tensor blocks, {tail}",
            _rank_bwd,
            _rank_bwd_fake,
        ),
        "soft_sort_fwd": (
            f"(Tensor x, {how}) -> (Tensor value, Tensor s, Tensor order, Tensor start, Tensor eps)",
            _sort_fwd,
            _sort_fwd_fake,
        ),
        "soft_sort_bwd": (
            f"(Tensor grad, Tensor? strengths, Tensor s, Tensor order, Tensor start, {tail}",
            _sort_bwd,
            _sort_bwd_fake,
        ),
    }
    for name, entry in schemas.items():
        register(name, *entry)


_register()
