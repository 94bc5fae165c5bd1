# SPDX-License-Identifier: Apache-2.0
"""Feature space: for kernels linear in the rows every sum over pairs is a p x q matrix product, and n x n never exists.

With X, Y the prepared rows: sum_ij f_i h_i K_ij L_ij = <X' diag(f h) Y, X'Y>, row i of it x_i'(X'Y)y_i, row sums
x_i'(sum_j x_j). The diagonal, where it is left out, is subtracted row by row: k_i = |x_i|^2.
"""

from __future__ import annotations

import torch

from .combine import RowStats, Weights
from .panels import Gradient, Pairs, rho_of


def row_stats(pairs: Pairs) -> RowStats:
    """RowStats from three products (X'X, X'Y, Y'Y), with sums per row only where the problem needs them."""
    X, Y = pairs.x.P.z, pairs.y.P.z
    k, l = pairs.x.P.square.double(), pairs.y.P.square.double()
    a, b = _times_sum(X, X.sum(-2)), _times_sum(Y, Y.sum(-2))
    columns = (None, None)
    if pairs.problem.row_normalize and pairs.problem.center:
        columns = [_times_sum(s.P.z, (rho_of(s)[..., None] * s.P.z).sum(-2)) for s in (pairs.x, pairs.y)]
    if pairs.problem.rowwise:
        kk, kl, ll = (_row_sums(A, B) for A, B in ((X, X), (X, Y), (Y, Y)))
    else:
        kk, kl, ll = (_total(A, B, k) for A, B in ((X, X), (X, Y), (Y, Y)))
    if pairs.problem.unbiased:
        a, b, kk, kl, ll = a - k, b - l, kk - k * k, kl - k * l, ll - l * l
    if pairs.problem.stat == "mse":
        kl = _difference(X, Y, k)
    return RowStats(a, b, kk, kl, ll, *columns)


def _times_sum(X, s):
    return (X.double() * s[..., None, :].double()).sum(-1)


def _row_sums(A, B):
    """sum_j (a_i.a_j)(b_i.b_j) = a_i'(A'B)b_i."""
    return ((A @ (A.mT @ B)).double() * B.double()).sum(-1)


def _total(A, B, like):
    """The same, only its total is right: |A'B|^2 spread evenly over the rows."""
    total = (A.mT @ B).double().square().sum((-2, -1))
    return (total / like.shape[-1])[..., None].expand_as(like)


def _pad(X, Y):
    """Zero columns change no Gram matrix and give both sides one width."""
    width = max(X.shape[-1], Y.shape[-1])
    return [torch.nn.functional.pad(Z, (0, width - Z.shape[-1])) for Z in (X, Y)]


def _difference(X, Y, like):
    """|XX' - YY'|^2 = 1/2 [<D'D, M'M> + tr(D'M D'M)], D = X - Y, M = X + Y: nothing cancels as X nears Y."""
    X, Y = _pad(X, Y)
    D, M = X - Y, X + Y
    DD, MM, DM = ((A.mT @ B).double() for A, B in ((D, D), (M, M), (D, M)))
    total = ((DD * MM).sum((-2, -1)) + (DM * DM.mT).sum((-2, -1))) / 2
    return (total / like.shape[-1])[..., None].expand_as(like)


def apply(pairs: Pairs, weights: Weights) -> Gradient:
    """dz = sum_j (c_ij + c_ji) x_j, matrix-free."""
    X, Y = pairs.x.P.z, pairs.y.P.z
    none = X.new_zeros(X.shape[:-1])
    if pairs.problem.stat == "mse":
        D, M = (A for A in _difference_pair(X, Y))
        dz = (D @ (M.mT @ X) + M @ (D.mT @ X)) * weights.q[..., :1, None]
        return Gradient(dz, none, none[..., 0])
    p, q, e, f, h = (None if v.shape[-1] == 0 else v[..., None] for v in weights)
    if not pairs.problem.rowwise:
        dz = Y @ (Y.mT @ X) * (2 * p[..., :1, :]) + X @ (X.mT @ X) * (2 * q[..., :1, :])
        dz += e * X.sum(-2, keepdim=True) + (e * X).sum(-2, keepdim=True)
    else:
        forward = p * (Y @ (Y.mT @ X)) + q * (X @ (X.mT @ X)) + e * X.sum(-2, keepdim=True)
        backward = Y @ (Y.mT @ (p * X)) + X @ (X.mT @ (q * X)) + (e * X).sum(-2, keepdim=True)
        if f is not None:
            forward = forward + f * (h * X).sum(-2, keepdim=True)
            backward = backward + h * (f * X).sum(-2, keepdim=True)
            forward = forward - f.square() * (X * forward).sum(-1, keepdim=True) * X
        dz = forward + backward
    if pairs.problem.unbiased:
        k, l = pairs.x.P.square[..., None], pairs.y.P.square[..., None]
        own = p * l + q * k + e
        dz = dz - 2 * own * X
    return Gradient(dz, none, none[..., 0])


def _difference_pair(X, Y):
    """D and M of `_difference`; the padded columns of the result would be dropped by X anyway."""
    X, Y = _pad(X, Y)
    return X - Y, X + Y
