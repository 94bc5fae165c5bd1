# SPDX-License-Identifier: Apache-2.0
"""One side: its rows, masked, centred and scaled so that float32 sums do not cancel, and the kernel maps on its tiles.

Centring changes no result where it is applied (MATH.md, "Precision"): a distance never sees it, a centred or unbiased
statistic of a linear kernel does not either, and a polynomial gets the mean back as rank-one terms. The scale is a
power of two, so it rounds nothing; K = unit * K^ connects the kernel matrix of the caller with the prepared one.

Maps go from the tile product t to K^, to dK^/dg^ and to dK^/dsigma^. t = left_i . right_j is g^ for dot-product kernels
and -d2/2 for distances. `stable` problems get K^ with what cancels already left out: k - exp(level) by expm1, and a
polynomial without its constant and additive terms.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ...checks import outside
from ..call import Problem, Side
from ..kernels import KernelSpec

FAR = 16  # |z_i|^2 over sigma^2 from which the rounding of a near pair's distance, a difference of squares, would show
NEAR = 1 / 128  # d2 over |z_i|^2 + |z_j|^2 below which it would show in a laplacian's slope, (z_i - z_j) / d
PAIRS = 1 << 18  # numbers of rows of near pairs at a time


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
    eps = torch.finfo(x.dtype).eps
    spread, *found = _centred(x, mask, spec, problem, over, eps)
    if problem.stat == "mse" or not outside(spread, 1e-30, 1e30):
        return found
    _, z, square, scale, shift, unit, typical = _centred(x.double(), mask, spec, problem, over, eps)
    return z.float(), square.float(), scale.float(), None if shift is None else shift.float(), unit, typical.float()


def _centred(x, mask, spec, problem, over, eps: float):
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
        power = torch.log2(torch.where(spread == 0, scale, spread)).div_(-2).round_()
        # within the powers of two that float32 has
        scale = torch.exp2(power.clamp_(-126, 126) if power.dtype == torch.float64 else power)
    factor = scale
    if centred:
        # rows that differ by less than the rounding of their mean are constant: exact zeros keep CKA's 0/0 recognisable
        constant = spread <= (4 * eps) ** 2 * mean2
        factor, spread = scale.masked_fill(constant, 0), spread.masked_fill(constant, 0)
    if problem.stat != "mse":
        z = z * factor[:, None, None] if z is x else z.mul_(factor[:, None, None])
        square = square.mul_(factor.square()[:, None])
    shift = None if mean is None else mean * scale[:, None, None]
    return spread, z, square, scale, shift, scale.double() ** -2, 2 * spread * scale**2


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
    P = Prepared(z, square, scale, shift, unit, None)
    if spec.name == "polynomial":
        P = _polynomial_of(P, typical * unit / 2, spec, problem.stable)
    # of a sum of kernels, which alone grows as one kernel does: what it is times is brought to the gradient at the end
    return (
        P
        if problem.stat != "sum"
        else P._replace(scale=(P.scale * P.unit).clamp(max=torch.finfo(z.dtype).max).to(z.dtype))
    )


def _as_given(x, mask) -> Prepared:
    """Rows as they are, no pass over them: nothing computed from them needs their mean, their scale or their norms."""
    one = x.new_ones(x.shape[0])
    return Prepared(_masked(x, mask), one[:, None].expand(x.shape[:2]), None, None, one.double(), None)


def bandwidths(spec: KernelSpec, sigma, like) -> torch.Tensor:
    """[1 or G, S]; numbers are filled in on the device, so nothing is copied from the host under a CUDA graph."""
    if not spec.params:
        return sigma.to(like.dtype).reshape(-1, 1)
    return torch.stack([like.new_full((1,), number) for number in spec.params], dim=1)


FLATTEST = 2.0**-40  # slope of a polynomial that is linear to float32


def _polynomial_of(P: Prepared, spread, spec, stable: bool) -> Prepared:
    """(a g + c)^d with g = unit g^ and a mean m: t0 = a |m|^2 + c, everything divided by a bound of |a g + c|.

    Features so small that only the linear term is left of a stable kernel have that one, in its own unit.
    """
    degree, a, c = spec.params
    m2 = torch.zeros_like(spread) if P.shift is None else P.shift.square().sum((1, 2)) * P.unit
    bound = a * (m2 + spread) + abs(c)
    bound = torch.where(bound == 0, torch.ones_like(bound), bound)
    slope, unit = a * P.unit / bound, bound**degree
    if stable and slope.is_cpu and min(slope.tolist()) < FLATTEST:
        unit = unit * slope.clamp(max=FLATTEST) / FLATTEST
        slope = slope.clamp(min=FLATTEST)
    par = torch.stack([(a * m2 + c) / bound, slope], dim=1).to(P.z.dtype)
    alpha = torch.zeros_like(P.square) if P.shift is None else (P.z @ P.shift.mT)[..., 0] * par[:, 1:]
    return P._replace(unit=unit, par=par, alpha=alpha)


def _masked(z, mask):
    return z if mask is None else torch.where(mask[..., None], z, torch.zeros_like(z))


def _norms(z):
    """|z_i| [..., 1] of rows of any size, infinite for a zero row; on a GPU of those whose squares float32 holds."""
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    if z.is_cpu and z.dtype == torch.float32 and norm.numel():
        least, most = (t.item() for t in norm.aminmax())
        if 1e-15 < least and most < 1e15:
            return norm
        plain = (norm > 1e-15) & (norm < 1e15)
        norm = torch.where(plain, norm.double(), torch.linalg.vector_norm(z, dim=-1, keepdim=True, dtype=torch.float64))
    return torch.where(norm == 0, torch.inf, norm)


def unit_rows(x, mask, dtype):
    """Rows divided by their L2 norm; a zero row stays zero."""
    z = _masked(x.to(dtype), mask)
    return (z / _norms(z)).to(dtype)


def through_unit_rows(grad, x, mask=None):
    """The gradient of `unit_rows` as one of the rows x themselves, 0 for a zero row."""
    z = _masked(x.to(grad.dtype), mask)
    norm = _norms(z)
    unit = (z / norm).to(grad.dtype)
    return ((grad - unit * (unit * grad).sum(-1, keepdim=True)) / norm).to(grad.dtype)


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
        dz = through_unit_rows(dz, x, mask)
    return _masked(dz, mask).to(x.dtype)


class Tiled(NamedTuple):
    """One prepared side, ready to give tiles."""

    P: Prepared
    spec: KernelSpec
    stable: bool
    left: torch.Tensor  # [..., n, p or p + 2]
    right: torch.Tensor
    u: torch.Tensor | None = None  # [..., n]: K^ is used as K^_ij - u_i - u_j

    def group(self, g: int) -> Tiled:
        pick = lambda t: None if t is None else t[g]  # noqa: E731
        return self._replace(P=Prepared(*map(pick, self.P)), left=self.left[g], right=self.right[g], u=pick(self.u))

    def parameters(self):
        """Kernel parameters, shaped to broadcast over a tile."""
        return [self.P.par[..., k, None, None] for k in range(self.P.par.shape[-1])]

    def levels(self):
        """The exponent of a typical pair, so that neither k near 1 nor k near 0 loses digits to the constant."""
        typical = self.P.typical[..., None, None]
        if self.spec.name == "rbf":
            return [(typical / (-2 * s**2)).clamp(min=-30) for s in self.parameters()]
        return [(typical.sqrt() / -s).clamp(min=-30) for s in self.parameters()]


def side_of(P: Prepared, spec: KernelSpec, stable: bool) -> Tiled:
    if not spec.of_distance:
        return Tiled(P, spec, stable, P.z, P.z)
    half, one = P.square[..., None] / -2, torch.ones_like(P.square)[..., None]
    return Tiled(P, spec, stable, torch.cat([P.z, half, one], -1), torch.cat([P.z, one, half], -1))


def product(side: Tiled, i, j) -> torch.Tensor:
    """t on rows i and columns j (slices or index tensors)."""
    t = side.left[..., i, :] @ side.right[..., j, :].mT
    return rounded(side, t, side.P.z[..., i, :], side.P.z[..., j, :], i, j)


def product_of(side: Tiled, zi, zj, i, j) -> torch.Tensor:
    """t of prepared rows that are given; `side` has their vectors, at i and j."""
    t = zi @ zj.mT
    if side.spec.of_distance:
        half = side.P.square / 2
        t = t.sub_(half[..., i][..., None]).sub_(half[..., j][..., None, :])
    return rounded(side, t, zi, zj, i, j)


def rounded(side: Tiled, t, zi, zj, i, j) -> torch.Tensor:
    """A squared distance is not negative, and that of a row to itself 0."""
    if not side.spec.of_distance:
        return t
    same = isinstance(i, slice) and isinstance(j, slice) and i.start == j.start
    if same:
        t.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)  # no near pair
    if side.spec.name == "laplacian":
        half = side.P.square / 2
        t = at_the_cusp(t, zi, zj, half[..., i], half[..., j])
    else:
        t.clamp_(max=0)
    if same:
        t.diagonal(dim1=-2, dim2=-1).zero_()
    return t


def at_the_cusp(t, zi, zj, half_i, half_j):
    """t = -d2/2 of a laplacian, which has a cusp at 0, as a difference of half = |z|^2 / 2, in place.

    The CPU subtracts the rows of near pairs. Elsewhere what is only the rounding of a zero distance becomes zero.
    """
    if t.is_cpu and (t.numel() == 0 or t.amax() <= -NEAR * (half_i.amax() + half_j.amax())):
        return t
    size = half_i[..., None] + half_j[..., None, :]
    if not t.is_cpu:
        return t.masked_fill_(t > -16 * torch.finfo(t.dtype).eps * size, 0.0)
    for pairs in (t > -NEAR * size).nonzero().split(max(1, PAIRS // zi.shape[-1])):
        *group, i, j = pairs.unbind(-1)
        t[(*group, i, j)] = (zi[(*group, i)] - zj[(*group, j)]).square().sum(-1) / -2
    return t


def kernel(side: Tiled, t: torch.Tensor, i, j) -> torch.Tensor:
    """K^ of a tile, before u is subtracted; a new tensor except for linear kernels, where it is t itself."""
    name = side.spec.name
    if side.spec.linear:
        return t
    if name == "polynomial":
        return _polynomial(side, t, i, j)
    root = None if name == "rbf" else (t * -2).sqrt_()
    exponents = (t / s**2 if root is None else root / -s for s in side.parameters())
    if not side.stable:
        return added_up(exponent.exp_() for exponent in exponents)
    pairs = zip(exponents, side.levels(), strict=True)
    return added_up(exponent.sub_(level).expm1_().mul_(level.exp()) for exponent, level in pairs)


def _delta(side, t, i, j):
    """a g^ + alpha_i + alpha_j: (t0 + delta)^d is the polynomial of the uncentred rows."""
    alpha = side.P.alpha
    return t * side.parameters()[1] + alpha[..., i][..., None] + alpha[..., j][..., None, :]


def _polynomial(side, t, i, j):
    degree, (t0, a) = int(side.spec.params[0]), side.parameters()
    delta = _delta(side, t, i, j)
    if not side.stable:
        return (delta + t0) ** degree
    # (t0 + delta)^d - t0^d - d t0^(d-1) (alpha_i + alpha_j): what is left out has the form u_i + u_j
    rest = torch.zeros_like(delta)
    for k in range(degree, 1, -1):
        rest = rest * delta + math.comb(degree, k) * t0 ** (degree - k)
    return rest * delta * delta + degree * t0 ** (degree - 1) * a * t


def slope(side: Tiled, t: torch.Tensor, i, j) -> torch.Tensor | None:
    """dK^/dg^ of a tile; None stands for 1."""
    name = side.spec.name
    if side.spec.linear:
        return None
    if name == "polynomial":
        degree, (t0, a) = int(side.spec.params[0]), side.parameters()
        return degree * a * (t0 + _delta(side, t, i, j)) ** (degree - 1)
    return slope_of_distance(side.spec, t, side.parameters())


def slope_of_distance(spec: KernelSpec, t, bandwidths):
    """dk/dt of a distance kernel, t = -d2/2, summed over its bandwidths; 0 where a laplacian's distance is 0."""
    if spec.name == "rbf":
        return added_up(torch.exp(t / s**2) / s**2 for s in bandwidths)
    d = (t * -2).sqrt_()
    safe = torch.where(d == 0, torch.inf, d)
    return added_up(torch.exp(-d / s) / (s * safe) for s in bandwidths)


def sigma_slope(spec: KernelSpec, t, bandwidths):
    """dk/dsigma of a distance kernel, which has one bandwidth."""
    (s,) = bandwidths
    if spec.name == "rbf":
        return torch.exp(t / s**2) * (t * -2) / s**3
    d = (t * -2).sqrt_()
    return torch.exp(-d / s) * d / s**2


def added_up(terms):
    """The sum of new tensors, in the first of them."""
    total = None
    for term in terms:
        total = term if total is None else total.add_(term)
    return total
