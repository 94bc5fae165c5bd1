# SPDX-License-Identifier: Apache-2.0
"""Correlations of rows as operators: Spearman with its gradient, compiled or in PyTorch, and Pearson in PyTorch.

The fused Spearman reads both sides once and writes its gradient in the forward pass; Pearson saves its inputs and five
numbers a row.
"""

from __future__ import annotations

import math

import torch

from ..autograd import NoSecondDerivative, apply, device_type, plain, register, without_autocast
from ..dtypes import at_least_float32
from . import cpu, metrics, native_impl, torch_impl

X, Y = 1, 2  # bits of `need`


class Spearman(torch.autograd.Function):
    """One value a row; the gradient for an upstream of 1 is computed with the value and kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        return spearman_forward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, *_, ctx.need, _ = inputs
        _, dx, dy = output
        ctx.dtypes = x.dtype, y.dtype
        ctx.mark_non_differentiable(dx, dy)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dx, dy)

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 8
        run = ScaledRows.apply if torch.is_grad_enabled() else ScaledRows.forward
        return *run(grad, *ctx.saved_tensors, ctx.need, *ctx.dtypes), *(None,) * 6


class ScaledRows(NoSecondDerivative):
    @staticmethod
    def forward(grad, dx, dy, need, dtype_x, dtype_y):
        grad = grad[..., None]
        return (dx * grad).to(dtype_x) if need & X else None, (dy * grad).to(dtype_y) if need & Y else None


def spearman(x, y, strength, kl, hard_target, backend):
    """The fused operator; `strength` has no tensor."""
    need = _need(x, y)
    arguments = (x, y, strength.number, strength.relative, kl, hard_target, need, backend)
    return (apply(Spearman, *arguments) if need else spearman_forward(*arguments))[0]


def _need(x, y) -> int:
    return X * x.requires_grad | Y * y.requires_grad if torch.is_grad_enabled() else 0


def spearman_forward(x, y, *rest):
    return (_spearman_fwd if plain(x, y) else torch.ops.kdkernels.spearman_fwd)(x, y, *rest)


def _spearman_fwd(x, y, strength, relative, kl, hard_target, need, backend):
    if x.numel() == 0:
        return tuple(t.zero_() for t in _spearman_fwd_fake(x, y, strength, relative, kl, hard_target, need, backend))
    wide = torch.promote_types(x.dtype, y.dtype)
    both = need & X > 0, need & Y > 0
    x, y = x.to(wide), y.to(wide)
    if backend != "torch":
        return native_impl.spearman_forward(x, y, strength, relative, kl, hard_target, *both)
    with without_autocast(x.device.type):
        return _spearman_rows(x, y, strength, relative, kl, hard_target, *both)


def _spearman_rows(x, y, strength, relative, kl, hard_target, grad_x, grad_y):
    """What `native_impl.SCHEMAS` says of spearman_rows, for rows [..., n]; both sides are ranked in one call.

    Ranks stay float64: under a large strength all are near their mean, and float32 would lose their differences.
    """
    dtype = at_least_float32(x, y)
    R, n = x.shape[:-1].numel(), x.shape[-1]
    sides, valid = torch.cat([x.reshape(R, n), y.reshape(R, n)]), None
    if not (torch_impl.may_wait(x) and math.isfinite(sides.sum(dtype=dtype))):
        *pair, valid = (t.reshape(R, n) for t in metrics.drop_pairs(x, y))
        sides = torch.cat(pair)
    how = None, strength, relative, kl, False
    if hard_target:
        rank, ids, eps = torch_impl.rank_forward(sides[:R], *how, grad_x, torch.float64)
        target = torch_impl.rank_forward(sides[R:], None, 0.0, False, kl, False, False, torch.float64)[0]
        ranks = torch.cat([rank, target])
    else:
        ranks, ids, eps = torch_impl.rank_forward(sides, *how, grad_x or grad_y, torch.float64)
    wanted = range(0 if grad_x else 1, 2 if grad_y and not hard_target else 1)
    if valid is None:
        rho, gradients = cpu.rank_gradients(ranks.view(2, R, n), wanted)
    else:
        rho, gradients = metrics.rank_gradients(ranks.view(2, R, n), valid, wanted)
    if wanted:
        part = slice(wanted.start * R, wanted.stop * R)
        like = torch.empty_like(ranks[part], dtype=dtype)
        g = torch_impl.rank_backward(gradients.view(-1, n), like, ranks[part], ids[part], eps[part], kl, False)
        gradients = g.view(-1, R, n)

    def gradient(k, asked):
        if not asked:
            return x.new_empty(0, dtype=dtype)
        if k not in wanted:  # of hard ranks
            return x.new_zeros(x.shape, dtype=dtype)
        found = gradients[k - wanted.start].reshape(x.shape)
        return found.clone() if len(wanted) == 2 else found  # outputs share no memory

    return rho.to(dtype).reshape(x.shape[:-1]), gradient(0, grad_x), gradient(1, grad_y)


def _spearman_fwd_fake(x, y, strength, relative, kl, hard_target, need, backend):
    dtype = at_least_float32(x, y)
    shapes = x.shape[:-1], x.shape if need & X else 0, y.shape if need & Y else 0
    return tuple(x.new_empty(shape, dtype=dtype) for shape in shapes)


class Pearson(torch.autograd.Function):
    """One value a row; saved: the rows and, in float64, means, inverse norms and the value."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        return pearson_forward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, ctx.need = inputs
        _, moments = output
        ctx.mark_non_differentiable(moments)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, y, moments)

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 3
        run = PearsonGradient.apply if torch.is_grad_enabled() else pearson_backward
        dx, dy = run(grad, *ctx.saved_tensors, ctx.need)
        return dx if ctx.need & X else None, dy if ctx.need & Y else None, None


class PearsonGradient(NoSecondDerivative):
    @staticmethod
    def forward(*arguments):
        return pearson_backward(*arguments)


def pearson(x, y):
    need = _need(x, y)
    return (apply(Pearson, x, y, need) if need else pearson_forward(x, y, need))[0]


def pearson_forward(x, y, need):
    return (_pearson_fwd if plain(x, y) else torch.ops.kdkernels.pearson_fwd)(x, y, need)


def pearson_backward(grad, x, y, moments, need):
    return (_pearson_bwd if plain(grad, x, y) else torch.ops.kdkernels.pearson_bwd)(grad, x, y, moments, need)


def _pearson_fwd(x, y, need):
    if x.numel() == 0:
        return tuple(t.zero_() for t in _pearson_fwd_fake(x, y, need))
    with without_autocast(device_type(x)):
        value, moments = metrics.pearson(x, y)
    return value.to(at_least_float32(x, y)), moments


def _pearson_fwd_fake(x, y, need):
    rows = x.shape[:-1]
    return x.new_empty(rows, dtype=at_least_float32(x, y)), x.new_empty((5, *rows), dtype=torch.float64)


def _pearson_bwd(grad, x, y, moments, need):
    with without_autocast(device_type(x)):
        dx, dy = metrics.pearson_gradient(grad, x, y, moments, need & X, need & Y)
    return dx, dy


def _pearson_bwd_fake(grad, x, y, moments, need):
    return x.new_empty(x.shape if need & X else 0), y.new_empty(y.shape if need & Y else 0)


def _register():
    strength = "float strength, bool relative, bool kl, bool hard_target, int need, str backend"
    schemas = {
        "spearman_fwd": (
            f"(Tensor x, Tensor y, {strength}) -> (Tensor value, Tensor dx, Tensor dy)",
            _spearman_fwd,
            _spearman_fwd_fake,
        ),
        "pearson_fwd": (
            "(Tensor x, Tensor y, int need) -> (Tensor value, Tensor moments)",
            _pearson_fwd,
            _pearson_fwd_fake,
        ),
        "pearson_bwd": (
            "(Tensor grad, Tensor x, Tensor y, Tensor moments, int need) -> (Tensor dx, Tensor dy)",
            _pearson_bwd,
            _pearson_bwd_fake,
        ),
    }
    for name, entry in schemas.items():
        register(name, *entry)


_register()
