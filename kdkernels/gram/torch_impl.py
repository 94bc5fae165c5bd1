# SPDX-License-Identifier: Apache-2.0
"""Portable PyTorch with the good algebra: feature space or tiles, whichever is cheaper; memory linear in n. Any device.

Also what `native_impl` leaves to it: there the row moments of a tile, centred rows and the weights are compiled steps.
"""

from __future__ import annotations

import torch

from ..dtypes import at_least_float32
from . import feature, panels
from .combine import Weights, combine
from .panels import Pairs
from .prepare import unprepare_gradient
from .problem import Problem

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


def saved_shapes(problem: Problem, G: int, n: int, p: int, q: int, need: int, dtype: torch.dtype = torch.float32):
    """Shapes of what `forward` returns for the backward pass: row vectors, and the kept products of each side."""
    if not need:
        return (0,), (0,)
    kept = n <= panels.SMALL and not in_feature_space(problem, n, p, q)
    return (G, 2 * SIDE_ROWS, n), ((2, G, n, n) if kept else (0,))


def saved_dtype(problem: Problem, x, y):
    """The dtype of the work and of what is saved: float64 where row norms meet centring, as `prepare` may then not
    centre the features and float32 sums would cancel down to nothing under a large mean."""
    return torch.float64 if problem.row_normalize and problem.center else at_least_float32(x, y)


def forward(x, y, mask, sigma_x, sigma_y, problem: Problem, need: int):
    """value [G], row vectors and products for `backward` (shapes: `saved_shapes`)."""
    dtype = saved_dtype(problem, x, y)
    G, n, p = x.shape
    pairs = panels.build(x, y, mask, sigma_x, sigma_y, problem, dtype)
    kept, u, scale = None, [None, None], None
    if in_feature_space(problem, n, p, y.shape[2]):
        stats = feature.row_stats(pairs)
    else:
        stats, u, kept, scale = panels.row_stats(pairs)
    count = n if mask is None else mask.sum(1)
    units = (pairs.x.P.unit, pairs.y.P.unit)
    eps = torch.finfo(dtype).eps
    if problem.backend == "cpp" and problem.stat in ("cka", "hsic") and not problem.row_normalize:
        value, rows = _compiled_weights(problem, stats, u, units, mask, count, eps, need, dtype)
    else:
        rho = (panels.rho_of(pairs.x), panels.rho_of(pairs.y)) if problem.row_normalize else None
        asked = (bool(need & 0b101), bool(need & 0b1010))
        value, sides = combine(problem, stats, count, eps, units, rho, asked)
        if scale is not None:  # d(scale K)/dK
            pairs_of = zip(sides, scale.double()[..., None], strict=True)
            sides = [side._replace(p=side.p * factor, q=side.q * factor) for side, factor in pairs_of]
        value, rows = pack_rows(value, sides, u, count, problem, need, dtype)
    kept = rows.new_empty(0) if kept is None or not need else torch.stack(kept)
    return value.to(at_least_float32(x, y)), rows, kept


def _compiled_weights(problem: Problem, stats, u, units, mask, count, eps, need, dtype):
    """`combine` and `pack_rows` in one call."""
    count = None if mask is None else count
    how = (problem.stat == "cka", problem.unbiased, problem.center, need, problem.minimum, eps)
    like = torch.empty(0, dtype=dtype, device="cpu")
    return torch.ops.kdkernels.weigh_rows(torch.stack(stats[:5]), count, *units, *u, like, *how)


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


def backward(grad, x, y, mask, sigma_x, sigma_y, rows, kept, problem: Problem, need: int):
    """dx, dy, dsigma_x, dsigma_y (None where bit 0, 1, 2, 3 of `need` is not set); grad [G]."""
    dtype = saved_dtype(problem, x, y)
    in_features = in_feature_space(problem, x.shape[1], x.shape[2], y.shape[2])
    products = kept.unbind(0) if kept.dim() == 4 else None
    skip = [products is not None and spec.linear and not need & (0b101 << k) for k, spec in enumerate(problem[1:3])]
    pairs = panels.build(x, y, mask, sigma_x, sigma_y, problem, dtype, skip)
    if problem.stable and not in_features:
        u = [None if spec.linear else rows[:, SIDE_ROWS * k] for k, spec in enumerate(problem[1:3])]
        pairs = pairs._replace(x=pairs.x._replace(u=u[0]), y=pairs.y._replace(u=u[1]))
    out = [None] * 4
    for k, features in enumerate((x, y)):
        if not need & (0b101 << k):
            continue
        side = pairs if k == 0 else Pairs(problem.swapped(), pairs.y, pairs.x, pairs.weight)
        weights = unpack_weights(rows, grad.to(dtype), k, problem)
        want_sigma = bool(need & (0b100 << k))
        if in_features:
            gradient = feature.apply(side, weights)
        else:
            own = products if products is None or k == 0 else products[::-1]
            gradient = panels.apply(side, weights, own, want_sigma)
        if need & (1 << k):
            spec = side.x.spec
            out[k] = unprepare_gradient(gradient.dz, gradient.row_sums, features, side.x.P, spec, mask)
        if want_sigma:
            out[2 + k] = sigma_gradient(gradient.dsigma * side.x.P.scale, (sigma_x, sigma_y)[k])
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
