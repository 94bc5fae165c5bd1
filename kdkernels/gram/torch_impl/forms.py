# SPDX-License-Identifier: Apache-2.0
"""Portable PyTorch with the good algebra: feature space or tiles, whichever is cheaper; memory linear in n. Any device.

Feature space, for kernels linear in the rows: every sum over pairs is a p x q matrix product, and n x n never exists.
With X, Y the prepared rows sum_ij f_i h_i K_ij L_ij = <X' diag(f h) Y, X'Y>, row i of it x_i'(X'Y)y_i, row sums
x_i'(sum_j x_j). The diagonal, where it is left out, is subtracted row by row: k_i = |x_i|^2. Tiles: `panels`.

Also what `native_impl` leaves to it: there the row moments of a tile, centred rows and the weights are compiled steps.
"""

from __future__ import annotations

import math

import torch

from ...autograd import at_least_float32
from ...checks import outside
from ..call import Call, Problem, Steps
from . import panels, prepared
from .combine import SIDE_ROWS, RowStats, Weights, combine, pack_rows, unpack_weights
from .panels import Gradient, Pairs, Sums


def in_feature_space(problem: Problem, n: int, p: int, q: int) -> bool:
    """Whether p x q products beat n x n tiles (MATH.md, "Which form"): both kernels linear, and fewer operations.

    An element of a tile costs its product, p + q, and about 40 operations' worth of memory traffic. K - L itself is
    better conditioned than its expansion, so mse and row_mse stay in Gram space while that is kept anyway.
    """
    if not (problem.kx.linear and problem.ky.linear):
        return False
    if problem.stat == "row_mse" and n <= panels.SMALL:
        return False
    return p * p + q * q + p * q < n * (p + q + 40)


def forward(call: Call, steps: Steps | None = None):
    """value [G], row vectors and products for `backward` (shapes: `kept`)."""
    problem, steps = call.problem, steps or STEPS
    if too_few(problem, call):
        return in_float64(call, steps)
    pairs = panels.build(call, call.dtype, steps)
    if far_apart(pairs):
        return in_float64(call, steps)
    if in_feature_space(problem, *call.sizes):
        sums = Sums(feature_sums(pairs))
    else:
        sums = panels.row_sums(pairs, steps.moments)
    value, rows = steps.weights(call, pairs, sums)
    if outgrown(call, value, sums):
        return in_float64(call, steps)
    kept = torch.stack(sums.products) if sums.products is not None and call.need else rows.new_empty(0)
    return value.to(at_least_float32(*(side.features for side in call.sides))), rows, kept


FEW = 5  # rows of which the terms of HSIC_1 cancel further than float32 kernels go


def too_few(problem: Problem, call: Call) -> bool:
    """On the CPU, where float64 costs so few rows nothing."""
    few = problem.unbiased and problem.stat in ("cka", "hsic") and call.x.features.shape[1] <= FEW
    return few and call.dtype == torch.float32 and call.x.features.is_cpu


def far_apart(pairs: Pairs) -> bool:
    """Whether near pairs lie far from other rows under a narrow kernel: float32 squares have lost their distance."""
    return any(side.P is not None and side.spec.of_distance and _narrow(side.P) for side in (pairs.x, pairs.y))


def _narrow(P) -> bool:
    if not P.z.is_cpu or P.z.dtype != torch.float32:
        return False
    least = prepared.FAR * min(map(min, P.par.tolist())) ** 2
    return least < P.z.shape[1] and P.square.max().item() > least  # their mean is about 1


def outgrown(call: Call, value, sums: Sums) -> bool:
    """Whether squares of rows as given have left float32: infinity less infinity is NaN, of finite rows alone."""
    if call.problem.stat != "mse":
        return sums.scale is not None and outside(sums.scale.flatten(), 1e-30, 1e30)
    lost = value.is_cpu and value.dtype == torch.float32 and not all(map(math.isfinite, value.tolist()))
    return lost and all(bool(side.features.isfinite().all()) for side in call.sides)


def in_float64(call: Call, steps: Steps):
    """`forward` where float32 does not do; rows as given are scaled where they may be, and the means that they do not
    have say so to `backward`."""
    value, rows, kept = forward(call._replace(dtype=torch.float64), steps._replace(rescale=True))
    if call.need and call.problem.as_given(call.sizes[0]):
        rows[:, 0] = 1
    return value, rows.to(call.dtype), kept.to(call.dtype)


def backward_in_float64(call: Call, saved, grad, steps: Steps):
    rows, kept = saved
    kept = kept.new_empty(0) if call.problem.stat == "mse" else kept  # those products may have left float32
    call, saved = call._replace(dtype=torch.float64), (rows.double(), kept.double())
    return backward(call, saved, grad, steps._replace(rescale=True))


def kept(call: Call):
    """Shapes of what `forward` returns for the backward pass, row vectors and the kept products of each side; dtype."""
    n, p, q = call.sizes
    if not call.need:
        return ((0,), (0,)), call.dtype
    G, products = call.x.features.shape[0], n <= panels.SMALL and not in_feature_space(call.problem, n, p, q)
    return ((G, 2 * SIDE_ROWS, n), (2, G, n, n) if products else (0,)), call.dtype


def weights(call: Call, pairs: Pairs, sums: Sums):
    """The value, and what `backward` reads of every row."""
    problem, mask = call.problem, call.mask
    count = pairs.n if mask is None else mask.sum(1)
    rho = (panels.rho_of(pairs.x), panels.rho_of(pairs.y)) if problem.row_normalize else None
    units, eps = (pairs.x.P.unit, pairs.y.P.unit), torch.finfo(call.dtype).eps
    value, sides = combine(problem, sums.stats, count, eps, units, rho, call.sides_asked)
    if sums.scale is not None:  # d(scale K)/dK
        pairs_of = zip(sides, sums.scale.double()[..., None], strict=True)
        sides = [side._replace(p=side.p * factor, q=side.q * factor) for side, factor in pairs_of]
    return pack_rows(value, sides, sums.u, count, problem, call.need, call.dtype)


STEPS = Steps(prepared.centre, panels.moments, weights)


def backward(call: Call, saved, grad, steps: Steps | None = None):
    """dx, dy, dsigma_x, dsigma_y (None where bit 0, 1, 2, 3 of `need` is not set); saved: `forward`'s; grad [G]."""
    (rows, kept), problem, need, steps = saved, call.problem, call.need, steps or STEPS
    if too_few(problem, call):
        return backward_in_float64(call, saved, grad, steps)
    in_features = in_feature_space(problem, *call.sizes)
    products = kept.unbind(0) if kept.dim() == 4 else None
    asked = call.sides_asked
    skip = [products is not None and side.spec.linear and not asked[k] for k, side in enumerate(call.sides)]
    pairs = panels.build(call, call.dtype, steps, skip)
    told = call.dtype == torch.float32 and problem.as_given(call.sizes[0]) and rows.is_cpu and rows.view(-1)[0].item()
    if told or far_apart(pairs):
        return backward_in_float64(call, saved, grad, steps)
    if problem.stable and not in_features:
        u = [None if spec.linear else rows[:, SIDE_ROWS * k] for k, spec in enumerate(problem.specs)]
        pairs = pairs._replace(x=pairs.x._replace(u=u[0]), y=pairs.y._replace(u=u[1]))
    out = [None] * 4
    for k, (features, spec, sigma) in enumerate(call.sides):
        if not asked[k]:
            continue
        side = pairs if k == 0 else Pairs(problem.swapped(), pairs.y, pairs.x, pairs.weight)
        weights = unpack_weights(rows, grad.to(call.dtype), k, problem)
        want_sigma = bool(need & (0b100 << k))
        if in_features:
            gradient = feature_gradient(side, weights)
        else:
            own = products if products is None or k == 0 else products[::-1]
            gradient = panels.apply(side, weights, own, want_sigma)
        if need & (1 << k):
            out[k] = prepared.unprepare_gradient(*gradient[:2], features, side.x.P, spec, call.mask)
        if want_sigma:
            out[2 + k] = sigma_gradient(gradient.dsigma * side.x.P.scale, sigma)
    return tuple(out)


def sigma_gradient(per_group, sigma):
    total = per_group if sigma.numel() == len(per_group) else per_group.sum()
    return total.reshape(sigma.shape).to(sigma.dtype)


def feature_sums(pairs: Pairs) -> RowStats:
    """RowStats from three products (X'X, X'Y, Y'Y), with sums per row only where the problem needs them."""
    X, Y = pairs.x.P.z, pairs.y.P.z
    k, l = pairs.x.P.square.double(), pairs.y.P.square.double()
    a, b = _times_sum(X, X.sum(-2)), _times_sum(Y, Y.sum(-2))
    columns = (None, None)
    if pairs.problem.row_normalize and pairs.problem.center:
        columns = [_times_sum(s.P.z, (panels.rho_of(s)[..., None] * s.P.z).sum(-2)) for s in (pairs.x, pairs.y)]
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


def difference_and_sum(X, Y):
    """D = X - Y and M = X + Y; zero columns, which change no Gram matrix, pad the narrower."""
    width = max(X.shape[-1], Y.shape[-1])
    X, Y = (torch.nn.functional.pad(Z, (0, width - Z.shape[-1])) for Z in (X, Y))
    return X - Y, X + Y


def _difference(X, Y, like):
    """|XX' - YY'|^2 = 1/2 [<D'D, M'M> + tr(D'M D'M)]: nothing cancels as X nears Y."""
    D, M = difference_and_sum(X, Y)
    DD, MM, DM = ((A.mT @ B).double() for A, B in ((D, D), (M, M), (D, M)))
    total = ((DD * MM).sum((-2, -1)) + (DM * DM.mT).sum((-2, -1))) / 2
    return (total / like.shape[-1])[..., None].expand_as(like)


def feature_gradient(pairs: Pairs, weights: Weights) -> Gradient:
    """dz = sum_j (c_ij + c_ji) x_j, matrix-free."""
    X, Y = pairs.x.P.z, pairs.y.P.z
    none = X.new_zeros(X.shape[:-1])
    if pairs.problem.stat == "mse":
        D, M = difference_and_sum(X, Y)  # X drops the padded columns of the result
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
