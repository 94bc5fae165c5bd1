# SPDX-License-Identifier: Apache-2.0
"""Kernel maps on tiles of a prepared side: from the tile product t to K^, to dK^/dg^ and to dK^/dsigma^.

t = left_i . right_j is g^ for dot-product kernels and -d2/2 for distances. `stable` problems get K^ with what cancels
already left out: k - exp(level) by expm1, and a polynomial without its constant and additive terms.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..kernels import KernelSpec
from .prepare import Prepared


class Side(NamedTuple):
    """One prepared side, ready to give tiles."""

    P: Prepared
    spec: KernelSpec
    stable: bool
    left: torch.Tensor  # [..., n, p or p + 2]
    right: torch.Tensor
    u: torch.Tensor | None = None  # [..., n]: K^ is used as K^_ij - u_i - u_j

    def group(self, g: int) -> Side:
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


def side_of(P: Prepared, spec: KernelSpec, stable: bool) -> Side:
    if not spec.of_distance:
        return Side(P, spec, stable, P.z, P.z)
    half, one = P.square[..., None] / -2, torch.ones_like(P.square)[..., None]
    return Side(P, spec, stable, torch.cat([P.z, half, one], -1), torch.cat([P.z, one, half], -1))


def product(side: Side, i, j) -> torch.Tensor:
    """t on rows i and columns j (slices or index tensors)."""
    return rounded(side, side.left[..., i, :] @ side.right[..., j, :].mT, i, j)


def product_of(side: Side, zi, zj, i, j) -> torch.Tensor:
    """t of prepared rows that are given; `side` has their vectors, at i and j."""
    t = zi @ zj.mT
    if side.spec.of_distance:
        half = side.P.square / 2
        t = t.sub_(half[..., i][..., None]).sub_(half[..., j][..., None, :])
    return rounded(side, t, i, j)


def rounded(side: Side, t, i, j) -> torch.Tensor:
    """A squared distance is not negative, and that of a row to itself 0."""
    if not side.spec.of_distance:
        return t
    if side.spec.name == "laplacian":  # it has a cusp at 0: what is only the rounding of a zero distance becomes zero
        s = side.P.square
        floor = -16 * torch.finfo(t.dtype).eps * (s[..., i][..., None] + s[..., j][..., None, :])
        t = torch.where(t > floor, torch.zeros_like(t), t)
    else:
        t.clamp_(max=0)
    if isinstance(i, slice) and isinstance(j, slice) and i.start == j.start:
        t.diagonal(dim1=-2, dim2=-1).zero_()
    return t


def kernel(side: Side, t: torch.Tensor, i, j) -> torch.Tensor:
    """K^ of a tile, before u is subtracted; a new tensor except for linear kernels, where it is t itself."""
    name = side.spec.name
    if side.spec.linear:
        return t
    if name == "polynomial":
        return _polynomial(side, t, i, j)
    root = None if name == "rbf" else (t * -2).sqrt_()
    total = None
    for s, level in zip(side.parameters(), side.levels(), strict=True):
        exponent = t / s**2 if root is None else root / -s
        term = exponent.sub_(level).expm1_().mul_(level.exp()) if side.stable else exponent.exp_()
        total = term if total is None else total.add_(term)
    return total


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


def slope(side: Side, t: torch.Tensor, i, j) -> torch.Tensor | None:
    """dK^/dg^ of a tile; None stands for 1."""
    name = side.spec.name
    if side.spec.linear:
        return None
    if name == "polynomial":
        degree, (t0, a) = int(side.spec.params[0]), side.parameters()
        return degree * a * (t0 + _delta(side, t, i, j)) ** (degree - 1)
    if name == "rbf":
        return sum(torch.exp(t / s**2) / s**2 for s in side.parameters())
    d = (t * -2).sqrt()
    safe = torch.where(d == 0, torch.inf, d)
    return sum(torch.exp(-d / s) / (s * safe) for s in side.parameters())


def sigma_slope(side: Side, t: torch.Tensor) -> torch.Tensor:
    """dK^/dsigma^ of a tile, one bandwidth."""
    (s,) = side.parameters()
    if side.spec.name == "rbf":
        return torch.exp(t / s**2) * (t * -2) / s**3
    d = (t * -2).sqrt()
    return torch.exp(-d / s) * d / s**2
