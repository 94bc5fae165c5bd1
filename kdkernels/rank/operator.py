# SPDX-License-Identifier: Apache-2.0
"""The differentiable operators of soft ranks and soft sorts of rows [..., n], along the last dimension.

A reshape made outside would cost a graph node. The reference is plain autograd and needs no operator.
"""

from __future__ import annotations

import torch

from ..autograd import at_least_float32
from ..backend import implementation
from ..differentiable import operator
from . import torch_impl

X, STRENGTHS = 1, 2  # bits of `need`
HOW = "float strength, bool relative, bool kl, bool descending, str backend"


def _rank_forward(x, strengths, *how):
    if x.numel() == 0:
        rank, blocks, eps = _rank_fake(x, strengths, *how)
        return rank, blocks, eps.fill_(1.0)
    *how, backend, need = how
    return implementation(__package__, backend).rank_forward(x, strengths, *how, bool(need))


def _rank_fake(x, strengths, *how):
    blocks = x.new_empty(x.shape if how[-1] else 0, dtype=torch.int32)
    eps = x.new_empty(x.shape[:-1], dtype=torch.float64)
    return x.new_empty(x.shape, dtype=at_least_float32(x)), blocks, eps


def _rank_backward(grad, x, strengths, rank, blocks, eps, *how):
    *_, kl, descending, backend, need = how
    if x.numel() == 0:
        return x.new_empty(x.shape), torch.zeros_like(strengths) if need & STRENGTHS else None
    run, how = implementation(__package__, backend).rank_backward, (blocks, eps, kl, descending)
    dx = dstrengths = None
    if need & X:
        dx = run(grad, x, rank, *how)
    if need & STRENGTHS:
        dstrengths = torch_impl.rank_strength_gradient(run, grad, x, strengths, rank, *how)
    return dx, dstrengths


def _rank_tangent(run, moved, value, saved, how):
    """J t with J symmetric. Ranks depend on x / eps alone: a strength that grows by a share does to x the opposite."""
    x, strengths, *kept = saved
    along, growth = moved
    along = torch.zeros_like(value) if along is None else along.to(value.dtype)
    if growth is not None:
        share = growth / strengths
        share = share if share.numel() == 1 else share.reshape(x.shape[:-1])[..., None]
        along = along - torch_impl.centred(x, value.dtype) * share
    return run(along.to(value.dtype), x.to(value.dtype), None, *kept, *how[:-1], X)[0]


# no permutation is kept: the ranks, block ids and one strength a row will do
soft_rank = operator(
    "soft_rank",
    "x strengths?",
    HOW,
    "value blocks eps",
    wanted="x strengths",
    read="x strengths~",
    forward=_rank_forward,
    backward=_rank_backward,
    fake=_rank_fake,
    tangent=_rank_tangent,
)


def _sort_forward(x, strengths, *how):
    if x.numel() == 0:
        *made, eps = _sort_fake(x, strengths, *how)
        return *made, eps.fill_(1.0)
    *how, backend, _ = how
    return implementation(__package__, backend).soft_sort_forward(x, strengths, *how)


def _sort_fake(x, strengths, *how):
    value = x.new_empty(x.shape, dtype=at_least_float32(x))
    order, start = x.new_empty(x.shape, dtype=torch.int64), x.new_empty(x.shape, dtype=torch.int32)
    return value, x.new_empty(x.shape), order, start, x.new_empty(x.shape[:-1], dtype=torch.float64)


def _sort_backward(grad, strengths, s, order, start, eps, *how):
    *_, kl, descending, backend, need = how
    if s.numel() == 0:
        return s.new_empty(s.shape), torch.zeros_like(strengths) if need & STRENGTHS else None
    dx = dstrengths = None
    if need & X:
        # value = -f(-x) where ascending: the signs cancel
        dx = implementation(__package__, backend).soft_sort_backward(grad, s, order, start, kl)
    if need & STRENGTHS:
        dstrengths = torch_impl.sort_strength_gradient(grad, strengths, s, start, eps, kl, descending)
    return dx, dstrengths


def _sort_tangent(run, moved, value, saved, how):
    """Where x moves. A block's gradient is p sum(u), with p = 1 / size under l2, so its tangent is sum(p t)."""
    _, s, order, start, eps = saved
    t, growth = moved
    if growth is not None:
        return None
    strength, relative, kl, *rest, _ = how

    def gradient(u, kl):
        g = run(u, None, s.to(value.dtype), order, start, eps, strength, relative, kl, *rest, X)[0]
        return g.gather(-1, order)

    t = t.to(value.dtype).gather(-1, order)
    if kl:
        n = s.shape[-1]
        first = (start == torch.arange(n, device=s.device)).to(value.dtype)  # sums to 1 in each block
        t = t * gradient(first, True) / gradient(first, False).clamp_min(1 / n)
    return gradient(t, False)


soft_sort = operator(
    "soft_sort",
    "x strengths?",
    HOW,
    "s order start eps",
    wanted="x:s strengths",
    read="strengths~",
    forward=_sort_forward,
    backward=_sort_backward,
    fake=_sort_fake,
    tangent=_sort_tangent,
)
