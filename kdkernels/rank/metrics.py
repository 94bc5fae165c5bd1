# SPDX-License-Identifier: Apache-2.0
"""Correlations of rows: Pearson's with a written-out gradient, Spearman's as Pearson's of ranks with an exact mean."""

from __future__ import annotations

import math

import torch

from .checks import absent


def drop_pairs(x, y):
    """An entry absent on either side is absent on both, whatever the other side holds; NaN or +inf elsewhere
    makes both rows NaN."""
    gone = absent(x) | absent(y)
    x, y = x.masked_fill(gone, -math.inf), y.masked_fill(gone, -math.inf)
    wrong = (x.detach().amax(-1, keepdim=True) + y.detach().amax(-1, keepdim=True)) if x.shape[-1] else x
    # NaN where a maximum is NaN or +inf; -inf + -inf stays, an empty row of pairs is no error
    poison = torch.where(wrong < math.inf, 0.0, math.nan).to(x.dtype)
    return x + poison, y + poison, ~gone


def correlation(a, b, valid):
    """<a, b> / (|a| |b|) of centred rows [..., n] in float64; 0, with zero gradient, where a side is constant."""
    a, b = (t.double().masked_fill(~valid, 0.0) for t in (a, b))
    aa, bb, ab = (a * a).sum(-1), (b * b).sum(-1), (a * b).sum(-1)
    constant = (aa == 0) | (bb == 0)
    norms = (aa.masked_fill(constant, 1.0) * bb.masked_fill(constant, 1.0)).sqrt()
    return ab.masked_fill(constant, 0.0) / norms


def rank_gradients(ranks, valid, wanted):
    """Spearman's correlation [R] of float64 ranks [2, R, n] of two sides, and the gradients to the sides `wanted`
    (a range), [sides, R, n]. 0, with zero gradient, where a side is constant.
    """
    c = (ranks - (valid.sum(-1, keepdim=True) + 1) / 2).masked_fill_(~valid, 0.0)
    inverse = torch.linalg.vecdot(c, c).rsqrt_()[..., None]
    inverse.masked_fill_(inverse == math.inf, 0.0)
    both = inverse[0] * inverse[1]
    rho = torch.linalg.vecdot(c[0], c[1])[:, None] * both
    share = rho * inverse.square_()
    gradients = ranks.new_empty(len(wanted), *ranks.shape[1:])
    for k, gradient in zip(wanted, gradients, strict=True):
        torch.mul(c[1 - k], both, out=gradient).addcmul_(c[k], share[k], value=-1)
    return rho[:, 0], gradients


def of_ranks(r, t, valid, dtype):
    """Spearman's correlation from ranks: their mean is (n_valid + 1) / 2 exactly."""
    m = (valid.sum(-1, keepdim=True) + 1) / 2
    return correlation(r.double() - m, t.double() - m, valid).to(dtype)


def pearson(x, y):
    """The correlation float64 [...] and, float64 [5, ...]: means, inverse norms (0 for a constant side), the value."""
    keep = ~(absent(x) | absent(y))
    count = keep.sum(-1).clamp(min=1)
    centred, means, inverse = [], [], []
    for t in (x, y):
        # centred at the maximum first: a constant side is then exactly 0
        top = t.masked_fill(~keep, -math.inf).amax(-1).double()
        d = (t - top[..., None]).masked_fill_(~keep, 0.0)
        mean = d.sum(-1) / count
        d = d.sub_(mean[..., None]).masked_fill_(~keep, 0.0)
        squares = d.square().sum(-1)
        inverse.append(torch.where(squares == 0, 0.0, squares.rsqrt()))
        centred.append(d)
        means.append(top + mean)
    rho = (centred[0] * centred[1]).sum(-1) * inverse[0] * inverse[1]
    return rho, torch.stack([*means, *inverse, rho])


def pearson_gradient(grad, x, y, moments, need_x, need_y):
    """d rho / dx = (y^ - rho x^) / |x|, with centred unit vectors x^, y^; dy likewise."""
    keep = ~(absent(x) | absent(y))
    mean_x, mean_y, inverse_x, inverse_y, rho = (m[..., None] for m in moments)
    a = (x - mean_x).masked_fill_(~keep, 0.0) * inverse_x
    b = (y - mean_y).masked_fill_(~keep, 0.0) * inverse_y
    grad = grad[..., None]

    def of(own, other, inverse, like, needed):
        if not needed:
            return like.new_empty(0)
        return ((other - rho * own) * (grad * inverse)).masked_fill_(~keep, 0.0).to(like.dtype).contiguous()

    return of(a, b, inverse_x, x, need_x), of(b, a, inverse_y, y, need_y)


def diagnose(x, ids):
    """Fraction pooled and number of blocks of each row from its block ids."""
    valid = (~absent(x)).sum(-1)
    pooled = (ids >= 0).sum(-1)
    s = ids.sort(-1).values
    first = (s >= 0) & torch.nn.functional.pad(s[..., 1:] != s[..., :-1], (1, 0), value=True)
    return (pooled / valid.clamp(min=1)).float(), valid - pooled + first.sum(-1)
