# SPDX-License-Identifier: Apache-2.0
"""Correlations of rows: Pearson's with a written-out gradient, Spearman's as Pearson's of ranks with an exact mean."""

from __future__ import annotations

import math

import torch

from .torch_impl import compute_dtype


def drop_pairs(x, y):
    """An entry absent (-inf) on either side is absent on both, whatever the other side holds; NaN or +inf elsewhere
    makes both rows NaN."""
    gone = (x == -math.inf) | (y == -math.inf)
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


def of_ranks(r, t, valid, dtype):
    """Spearman's correlation from ranks: their mean is (n_valid + 1) / 2 exactly."""
    m = (valid.sum(-1, keepdim=True) + 1) / 2
    return correlation(r.double() - m, t.double() - m, valid).to(dtype)


def pearson(x, y):
    x, y, valid = drop_pairs(x, y)
    sides = []
    for t in (x, y):
        t = t.double().masked_fill(~valid, 0.0)
        sides.append(t - t.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1))
    return correlation(*sides, valid).to(torch.promote_types(compute_dtype(x), compute_dtype(y)))


def value_dtype(x, y) -> torch.dtype:
    return torch.promote_types(compute_dtype(x), compute_dtype(y))


def diagnose(x, ids):
    """Fraction pooled and number of blocks of each row from its block ids."""
    valid = (x != -math.inf).sum(-1)
    pooled = (ids >= 0).sum(-1)
    s = ids.sort(-1).values
    first = (s >= 0) & torch.nn.functional.pad(s[..., 1:] != s[..., :-1], (1, 0), value=True)
    return (pooled / valid.clamp(min=1)).float(), valid - pooled + first.sum(-1)
