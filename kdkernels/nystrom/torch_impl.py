# SPDX-License-Identifier: Apache-2.0
"""Portable PyTorch: chunks of rows, triangular solves, sums of m x m products in float64; nothing [n, m] but Phi.

Every loop here is over chunks of rows; what happens to a chunk is `phi_of` and `pull`, which the backend `triton`
replaces by its kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..autograd import device_type
from ..dtypes import at_least_float32
from . import maps, side
from .problem import Problem
from .side import Side

X, Z, SIGMA = 1, 2, 4  # bits of `need` of one side
CHUNK = 4096  # rows of a chunk on a CPU: 4 MB of features at m = 256 stay in its caches
CHUNK_BYTES = 256 << 20  # of one [rows, m] panel on a GPU


def chunks(x, m: int):
    """Slices of the rows of x."""
    n = x.shape[0]
    rows = CHUNK if device_type(x) == "cpu" else max(CHUNK, CHUNK_BYTES // (4 * max(1, m)) // 1024 * 1024)
    return [slice(start, min(n, start + rows)) for start in range(0, n, rows)]


class Pulled(NamedTuple):
    """What one chunk gives back: dL/dx of prepared rows or None, and its part of the sums over rows."""

    dx: torch.Tensor | None
    dz: torch.Tensor | None  # [m, d]
    product: torch.Tensor | None  # G'Phi or C'G
    dsigma: torch.Tensor | None


def kernel_panel(s: Side, rows):
    """(t, C) of prepared rows."""
    t = maps.tile(s.spec, rows, s.z, rows.square().sum(-1).div_(2) if s.spec.of_distance else None, s.half)
    return t, maps.kernel_value(s.spec, t, s.par)


def whitened(s: Side, C):
    return solved(C, s.whitener, upper=False) if s.whiten == "cholesky" else maps.product(C, s.whitener)


def unwhitened(s: Side, grad):
    """dL/dC from dL/dPhi."""
    return solved(grad, s.whitener.mT, upper=True) if s.whiten == "cholesky" else maps.product(grad, s.whitener)


def solved(rows, R, upper: bool):
    """rows R'^-1, in float64 where the library might solve with TF32."""
    # as R Phi' = C': a transposed row-major matrix is LAPACK's own layout; from the right it takes 3 times as long
    wide = torch.float64 if maps.tf32_allowed(rows) else rows.dtype
    return torch.linalg.solve_triangular(R.to(wide), rows.to(wide).mT, upper=upper).mT.to(rows.dtype)


def phi_of(s: Side, rows):
    """Phi of prepared rows, in the dtype of the work."""
    return whitened(s, kernel_panel(s, rows)[1])


def pull(s: Side, rows, grad, need: int) -> Pulled:
    """From G = dL/dPhi of prepared rows."""
    t, C = kernel_panel(s, rows)
    dC, product = unwhitened(s, grad), None
    if need & (Z | SIGMA):
        product = grad.mT @ whitened(s, C) if s.whiten == "cholesky" else C.mT @ grad
    slope = maps.kernel_slope(s.spec, t, s.par)
    dsigma = (dC * maps.sigma_slope(s.spec, t, s.par)).sum(dtype=torch.float64) if need & SIGMA else None
    return gradients(s, rows, dC if slope is None else slope.mul_(dC), product, dsigma, need)


def gradients(s: Side, rows, V, product, dsigma, need: int) -> Pulled:
    """The matrix products that turn V_ij = dL/dC_ij dk/dg_ij into gradients of prepared rows and landmarks."""
    dx = dz = None
    if need & X:
        dx = V @ s.z
        if s.spec.of_distance:
            dx.addcmul_(V.sum(1, keepdim=True), rows, value=-1)
    if need & Z:
        dz = V.mT @ rows
        if s.spec.of_distance:
            dz.addcmul_(V.sum(0)[:, None], s.z, value=-1)
    return Pulled(dx, dz, product, dsigma)


def tiles_of(problem: Problem):
    """The functions of one chunk: (phi_of, pull)."""
    if problem.backend == "triton":
        from . import triton_impl

        return triton_impl.phi_of, triton_impl.pull
    return phi_of, pull


class Puller:
    """Gradients of one side, summed over chunks: sums over rows in float64, dL/dx written in place."""

    def __init__(self, s: Side, problem: Problem, x, z, need: int):
        self.side, self.problem, self.x, self.z, self.need = s, problem, x, z, need
        self.pull = tiles_of(problem)[1]
        self.dx = x.new_empty(x.shape) if need & X else x.new_empty(0)
        self.sums = [None, None, None]

    def add(self, rows: slice, prepared, grad):
        out = self.pull(self.side, prepared, grad, self.need)
        if self.need & X:
            self.dx[rows] = maps.raw_gradient(self.side.spec, self.x[rows], out.dx)
        for k, part in enumerate(out[1:]):
            if part is not None:
                self.sums[k] = part.double() if self.sums[k] is None else self.sums[k].add_(part)

    def finish(self, sigma):
        """(dx, dz, dsigma), empty where nobody asked; an operator's outputs may not alias."""
        dz, dsigma = self.x.new_empty(0), self.x.new_empty(0)
        if self.x.shape[0] == 0:  # a rank that has no rows
            dz, dsigma = torch.zeros_like(self.z), dsigma if sigma is None else torch.zeros_like(sigma)
        elif self.need & (Z | SIGMA):
            through, product, direct = self.sums
            weight = side.factor_gradient(self.side, product, self.problem)
            want_sigma = bool(self.need & SIGMA)
            more, more_sigma = side.landmark_gradient(self.side, self.z, weight, want_sigma)
            if self.need & Z:
                dz = maps.raw_gradient(self.side.spec, self.z, through + more).to(self.z.dtype)
            if want_sigma:
                dsigma = (direct + more_sigma).reshape(sigma.shape).to(sigma.dtype)
        return self.dx, dz, dsigma


def features_forward(x, z, sigma, problem: Problem):
    """Phi [n, m] in x's dtype (the promoted one of x and the landmarks), and the factor of W."""
    dtype = at_least_float32(x, z)
    s = side.prepare(z, sigma, problem.kx, problem, dtype)
    make = tiles_of(problem)[0]
    phi = x.new_empty((x.shape[0], z.shape[0]), dtype=torch.promote_types(x.dtype, z.dtype))
    for rows in chunks(x, z.shape[0]):
        phi[rows] = make(s, maps.prepared_rows(s.spec, x[rows], s.shift, dtype))
    return phi, s.factor, s.spectrum


def features_backward(grad, x, z, sigma, factor, spectrum, problem: Problem, need: int):
    dtype = at_least_float32(x, z)
    s = side.prepare(z, sigma, problem.kx, problem, dtype, factor, spectrum)
    puller = Puller(s, problem, x, z, need)
    for rows in chunks(x, z.shape[0]):
        prepared = maps.prepared_rows(s.spec, x[rows], s.shift, dtype)
        puller.add(rows, prepared, grad[rows].to(dtype))
    return puller.finish(sigma)
