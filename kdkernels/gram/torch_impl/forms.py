# SPDX-License-Identifier: Apache-2.0
"""Portable PyTorch with the good algebra: feature space or tiles, whichever is cheaper; memory linear in n. Any device.

Also what `native_impl` leaves to it: there the row moments of a tile, centred rows and the weights are compiled steps.
"""

from __future__ import annotations

import torch

from ...dtypes import at_least_float32
from ..call import Call, Problem, Steps
from . import feature, panels, prepare
from .combine import Weights, combine
from .panels import Pairs, Sums

SIDE_ROWS = 6  # vectors a side that the backward pass reads: u, p, q, e, f, h


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
    pairs = panels.build(call, call.dtype, steps)
    if in_feature_space(problem, *call.sizes):
        sums = Sums(feature.row_stats(pairs))
    else:
        sums = panels.row_sums(pairs, steps.moments)
    value, rows = steps.weights(call, pairs, sums)
    kept = torch.stack(sums.products) if sums.products is not None and call.need else rows.new_empty(0)
    return value.to(at_least_float32(*(side.features for side in call.sides))), rows, kept


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


STEPS = Steps(prepare.centre, panels.moments, weights)


def pack_rows(value, sides, u, count, problem: Problem, need: int, dtype):
    """The value and [G, 12, n] = u, p, q, e, f, h of x and of y; both 0 for a group whose mask leaves too few rows."""
    if isinstance(count, torch.Tensor):
        enough = count >= problem.minimum
        value = torch.where(enough, value, torch.zeros_like(value))
    if not need:
        return value.to(dtype), value.new_empty(0, dtype=dtype)
    some = next(side for side in sides if side is not None)
    rows = some.e.new_zeros((some.e.shape[0], 2 * SIDE_ROWS, some.e.shape[1]), dtype=dtype)
    for k, (means, side) in enumerate(zip(u, sides, strict=True)):
        for place, vector in enumerate((means, *(side or ()))):
            if vector is not None and vector.shape[-1]:
                rows[:, SIDE_ROWS * k + place] = vector
    if isinstance(count, torch.Tensor):
        rows = torch.where(enough[:, None, None], rows, torch.zeros_like(rows))
    return value.to(dtype), rows


def backward(call: Call, saved, grad, steps: Steps | None = None):
    """dx, dy, dsigma_x, dsigma_y (None where bit 0, 1, 2, 3 of `need` is not set); saved: `forward`'s; grad [G]."""
    (rows, kept), problem, need, steps = saved, call.problem, call.need, steps or STEPS
    in_features = in_feature_space(problem, *call.sizes)
    products = kept.unbind(0) if kept.dim() == 4 else None
    asked = call.sides_asked
    skip = [products is not None and side.spec.linear and not asked[k] for k, side in enumerate(call.sides)]
    pairs = panels.build(call, call.dtype, steps, skip)
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
            gradient = feature.apply(side, weights)
        else:
            own = products if products is None or k == 0 else products[::-1]
            gradient = panels.apply(side, weights, own, want_sigma)
        if need & (1 << k):
            out[k] = prepare.unprepare_gradient(*gradient[:2], features, side.x.P, spec, call.mask)
        if want_sigma:
            out[2 + k] = sigma_gradient(gradient.dsigma * side.x.P.scale, sigma)
    return tuple(out)


def sigma_gradient(per_group, sigma):
    total = per_group if sigma.numel() == len(per_group) else per_group.sum()
    return total.reshape(sigma.shape).to(sigma.dtype)


def unpack_weights(rows, grad, side: int, problem: Problem) -> Weights:
    """One side's weights times the upstream gradient [G]: multiplying n-vectors here spares a pass over n x p later."""
    p, q, e, f, h = rows[:, SIDE_ROWS * side + 1 : SIDE_ROWS * (side + 1)].unbind(1)
    p, q, e, h = (v * grad[:, None] for v in (p, q, e, h))
    none = f[:, :0]
    return Weights(p, q, e, f, h) if problem.row_normalize else Weights(p, q, e, none, none)
