# SPDX-License-Identifier: Apache-2.0
"""One chunk of rows in portable PyTorch: Phi by triangular solve, and what pulls its gradient back.

`triton_impl` has kernels in the place of both functions, `phi_of` and `pull`, and takes the rest from here.
"""

from __future__ import annotations

import torch

from ..gram.torch_impl.prepared import sigma_slope
from . import maps
from .chunks import SIGMA, Pulled, X, Z
from .landmarks import Landmarks

TAKES_ANY_DTYPE = True  # so that the work may be float64 where the inputs are not


def kernel_panel(s: Landmarks, rows):
    """(t, C) of prepared rows."""
    t = maps.tile(s.spec, rows, s.z, rows.square().sum(-1).div_(2) if s.spec.of_distance else None, s.half)
    return t, maps.kernel_value(s.spec, t, s.par)


def whitened(s: Landmarks, C):
    return solved(C, s.whitener, upper=False) if s.whiten == "cholesky" else maps.product(C, s.whitener)


def unwhitened(s: Landmarks, grad):
    """dL/dC from dL/dPhi."""
    return solved(grad, s.whitener.mT, upper=True) if s.whiten == "cholesky" else maps.product(grad, s.whitener)


def solved(rows, R, upper: bool):
    """rows R'^-1, in float64 where the library might solve with TF32."""
    # as R Phi' = C': a transposed row-major matrix is LAPACK's own layout; from the right it takes 3 times as long
    wide = torch.float64 if maps.tf32_allowed(rows) else rows.dtype
    return torch.linalg.solve_triangular(R.to(wide), rows.to(wide).mT, upper=upper).mT.to(rows.dtype)


def phi_of(s: Landmarks, rows):
    """Phi of prepared rows, in the dtype of the work."""
    return whitened(s, kernel_panel(s, rows)[1])


def pull(s: Landmarks, rows, grad, need: int) -> Pulled:
    """From G = dL/dPhi of prepared rows."""
    t, C = kernel_panel(s, rows)
    dC, product = unwhitened(s, grad), None
    if need & (Z | SIGMA):
        product = grad.mT @ whitened(s, C) if s.whiten == "cholesky" else C.mT @ grad
    slope = maps.kernel_slope(s.spec, t, s.par)
    dsigma = (dC * sigma_slope(s.spec, t, s.par.unbind())).sum(dtype=torch.float64) if need & SIGMA else None
    return gradients(s, rows, dC if slope is None else slope.mul_(dC), product, dsigma, need)


def gradients(s: Landmarks, rows, V, product, dsigma, need: int) -> Pulled:
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
