# SPDX-License-Identifier: Apache-2.0
"""CKA of logits Z = h W' from [H, H] moments of the hidden states and of the head: no logits, whatever N and C are.

Linear and biased, of rows (samples) and of columns (classes). kdkernels/logits/MATH.md, section 13.
"""

from __future__ import annotations

import torch

from ..autograd import at_least_float32
from .base import zero_where_masked


def pays(*heads) -> bool:
    """Whether moments are the smaller way: of more rows than a head is wide, and of logits that are linear."""
    rows = heads[0].hidden.shape[:-1].numel()
    return all(head.softcap is None and max(head.hidden.shape[-1] + 1, 2) < min(rows, head.vocab) for head in heads)


def factors(head, rows, kept):
    """h [N, H] and W [C, H] with Z = h W', a bias as a column; masked rows are 0."""
    dtype = at_least_float32(rows, head.weight)
    h, W = zero_where_masked(rows, kept).to(dtype), head.weight[: head.vocab].to(dtype)
    if head.bias is None:
        return h, W
    ones = torch.ones_like(h[:, :1]) if kept is None else kept[:, None].to(dtype)
    return torch.cat([h, ones], 1), torch.cat([W, head.bias[: head.vocab, None].to(dtype)], 1)


def alignment(student, teacher, center: bool, kept=None):
    """CKA between the samples of X G X' and Y F Y', X [n, p] and G = A' A of `student` = (X, A), and so of `teacher`.

    Gram rows are divided by sqrt(K_ii), or, with `center`, X and Y centred over the rows kept.
    """
    (X, A), (Y, B) = student, teacher
    # of at most [p, q], where digits are lost: in float64
    G, F = (T.mT @ T for T in (A, B))
    if center:
        X, Y = (_centred(T, kept) for T in (X, Y))
        r = s = None
    else:
        r, s = (_inverse_root(((T @ M) * T).sum(1)) for T, M in ((X, G), (Y, F)))
    G, F = G.double(), F.double()
    xx, yy, xy = (_inner(*pair) for pair in (((X, G, r), (X, G, r)), ((Y, F, s), (Y, F, s)), ((X, G, r), (Y, F, s))))
    square = xx * yy
    nothing = square <= 0
    return torch.where(nothing, 0, xy / torch.where(nothing, 1, square).sqrt()).to(X.dtype)


def _inner(one, other):
    """sum_ij r_i s_i K_ij L_ij = <G (X' Y) F, X' diag(r s) Y>."""
    (X, G, r), (Y, F, s) = one, other
    between = (X.mT @ Y).double()
    weighed = between if r is None else (X.mT @ (Y * (r * s)[:, None])).double()
    return ((G @ between @ F) * weighed).sum()


def _inverse_root(square):
    return torch.where(square > 0, torch.where(square > 0, square, 1).rsqrt(), 0)


def _centred(X, kept):
    if kept is None:
        return X - X.mean(0)
    return torch.where(kept[:, None], X - X.sum(0) / kept.sum().clamp_min(1), 0)
