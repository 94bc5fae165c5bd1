# SPDX-License-Identifier: Apache-2.0
"""One pass over the features of one side: float32 rows, masked, centred and scaled so that float32 sums do not cancel.

Centring changes no result where it is applied (MATH.md, "Precision"): a distance never sees it, a centred or unbiased
statistic of a linear kernel does not either, and a polynomial gets the mean back as rank-one terms. The scale is a
power of two, so it rounds nothing; K = unit * K^ connects the kernel matrix of the caller with the prepared one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..call import Problem, Side
from ..kernels import KernelSpec


class Prepared(NamedTuple):
    z: torch.Tensor  # [G, n, p] prepared rows, 0 where masked
    square: torch.Tensor  # [G, n] |z_i|^2; ones where no one asks, for its shape
    scale: torch.Tensor | None  # [G] z = scale * (x - mean), a power of two; None is 1
    shift: torch.Tensor | None  # [G, 1, p] scale * mean, where a mean was subtracted
    unit: torch.Tensor  # [G] float64, K = unit * K^
    par: torch.Tensor | None  # rbf, laplacian: bandwidths in units of z [G, S]; polynomial: (t0, a) [G, 2]
    alpha: torch.Tensor | None = None  # [G, n] polynomial: the rank-one terms of the mean
    typical: torch.Tensor | None = None  # [G] rbf, laplacian: the mean squared distance in units of z


def of_these_rows(total):
    return total


def centre(x, mask, spec: KernelSpec, problem: Problem, over=of_these_rows):
    """z, |z_i|^2, the scale, the shift or None, the unit, and twice the mean |z_i|^2.

    over: from a sum over these rows to the one over all rows, where x is only a part of them (`ring.py`).
    """
    z = _masked(x, mask)
    count = over(z.shape[1]) if mask is None else over(mask.sum(1)).clamp(min=1)[:, None, None]
    centred = problem.stable or spec.of_distance
    mean = None
    if centred:
        mean = over(z.sum(1, keepdim=True)) / count
        z = _masked(z - mean, mask)
        mean2 = mean.square().sum((1, 2))
    square = torch.linalg.vector_norm(z, dim=-1).square_()
    spread = over(square.sum(1)) / (count if mask is None else count[:, 0, 0])
    scale = torch.ones_like(spread)
    if problem.stat != "mse":  # there K - L needs both sides in one unit
        scale = torch.exp2(torch.log2(torch.where(spread == 0, scale, spread)).div_(-2).round_())
    factor = scale
    if centred:
        # rows that differ by less than the rounding of their mean are constant: exact zeros keep CKA's 0/0 recognisable
        varies = ~(spread <= (4 * torch.finfo(z.dtype).eps) ** 2 * mean2)
        factor, spread = scale * varies, spread * varies
    if problem.stat != "mse":
        z = z * factor[:, None, None] if z is x else z.mul_(factor[:, None, None])
        square = square.mul_(factor.square()[:, None])
    shift = None if mean is None else mean * scale[:, None, None]
    return z, square, scale, shift, scale.double() ** -2, 2 * spread * scale**2


def prepare(side: Side, mask, problem: Problem, dtype, centre=centre, rescale: bool = False) -> Prepared:
    """mask [G, n] bool or None; centre, rescale: as in `call.Steps`."""
    x, spec, sigma = side
    z = unit_rows(x, mask, dtype) if spec.name == "cosine" else x.to(dtype)
    if problem.as_given(x.shape[1]) and not rescale:
        return _as_given(z, mask)
    z, square, scale, shift, unit, typical = centre(z, mask, spec, problem)
    if spec.of_distance:
        par = bandwidths(spec, sigma, z) * scale[:, None]
        return Prepared(z, square, scale, shift, torch.ones_like(unit), par, typical=typical)
    if spec.name != "polynomial":
        return Prepared(z, square, scale, shift, unit, None)
    return _polynomial(z, square, scale, shift, typical / (2 * scale.square()), spec)


def _as_given(x, mask) -> Prepared:
    """Rows as they are, no pass over them: nothing computed from them needs their mean, their scale or their norms."""
    one = x.new_ones(x.shape[0])
    return Prepared(_masked(x, mask), one[:, None].expand(x.shape[:2]), None, None, one.double(), None)


def bandwidths(spec: KernelSpec, sigma, like) -> torch.Tensor:
    """[1 or G, S]; numbers are filled in on the device, so nothing is copied from the host under a CUDA graph."""
    if not spec.params:
        return sigma.to(like.dtype).reshape(-1, 1)
    return torch.stack([like.new_full((1,), number) for number in spec.params], dim=1)


def _polynomial(z, square, scale, shift, spread, spec) -> Prepared:
    """(a g + c)^d with g = g^/scale^2 and a mean m: t0 = a |m|^2 + c, everything divided by a bound of |a g + c|."""
    degree, a, c = spec.params
    m2 = torch.zeros_like(spread) if shift is None else shift.square().sum((1, 2)) / scale**2
    bound = a * (m2 + spread) + abs(c)
    bound = torch.where(bound == 0, torch.ones_like(bound), bound)
    slope = a / (scale**2 * bound)
    par = torch.stack([(a * m2 + c) / bound, slope], dim=1)
    alpha = torch.zeros_like(square) if shift is None else (z @ shift.mT)[..., 0] * slope[:, None]
    return Prepared(z, square, scale, shift, bound.double() ** degree, par, alpha)


def _masked(z, mask):
    return z if mask is None else torch.where(mask[..., None], z, torch.zeros_like(z))


def unit_rows(x, mask, dtype):
    """Rows divided by their L2 norm; a zero row stays zero."""
    z = _masked(x.to(dtype), mask)
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    return z / torch.where(norm == 0, torch.ones_like(norm), norm)


def diagonal(P: Prepared, spec: KernelSpec) -> torch.Tensor:
    """K^_ii [G, n] of a problem that is not `stable` (nothing was subtracted)."""
    if spec.of_distance:
        return torch.full_like(P.square, float(P.par.shape[-1]))
    if spec.name == "polynomial":
        return (P.par[..., :1] + P.par[..., 1:] * P.square) ** int(spec.params[0])
    return P.square


def unprepare_gradient(dz, row_sums, x, P: Prepared, spec: KernelSpec, mask):
    """dL/dx from dz_i = sum_j V_ij z_j (overwritten) and V's row sums, V = pair weights times dK^/dg^ (MATH.md)."""
    if spec.of_distance:
        dz = dz.addcmul_(row_sums[..., None], P.z, value=-1)
    elif spec.name == "polynomial" and P.shift is not None:
        dz = dz.addcmul_(row_sums[..., None], P.shift)
    if P.scale is not None:
        dz = dz.mul_(P.scale[:, None, None])
    if spec.name == "cosine":
        norm = torch.linalg.vector_norm(_masked(x.to(dz.dtype), mask), dim=-1, keepdim=True)
        unit = unit_rows(x, mask, dz.dtype)
        dz = (dz - unit * (unit * dz).sum(-1, keepdim=True)) / torch.where(norm == 0, torch.inf, norm)
    return _masked(dz, mask).to(x.dtype)
