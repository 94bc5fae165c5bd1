# SPDX-License-Identifier: Apache-2.0
"""The landmarks of one side, prepared: W formed, factored and differentiated in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import checks
from ..gram.kernels import KernelSpec
from ..gram.torch_impl.prepared import sigma_slope
from . import maps
from .call import Question, Side


class Landmarks(NamedTuple):
    spec: KernelSpec
    whiten: str
    jitter: float
    shift: torch.Tensor  # [d] the landmarks' mean, subtracted under a distance kernel
    z: torch.Tensor  # [m, d] prepared landmarks
    half: torch.Tensor  # [m] |z_j|^2 / 2
    par: torch.Tensor  # [S] bandwidths, or empty
    factor: torch.Tensor  # [m, m] float64: R of W + jitter = R R', or the eigenvectors U
    spectrum: torch.Tensor  # [2, m] float64: eigenvalues and their inverse roots, 0 where dropped; [2, 0] for cholesky
    whitener: torch.Tensor  # [m, m]: R, or the inverse root


def factor_shapes(whiten: str, m: int):
    return (m, m), ((2, m) if whiten == "sqrt" else (2, 0))


def bandwidths(spec: KernelSpec, sigma, like) -> torch.Tensor:
    """[S]; numbers are filled in on the device: nothing is copied from the host."""
    if not spec.of_distance:
        return like.new_empty(0)
    if not spec.params:
        return sigma.to(like.dtype).reshape(1)
    return torch.cat([like.new_full((1,), number) for number in spec.params])


def prepare(side: Side, question: Question, dtype, factor=None, spectrum=None) -> Landmarks:
    """The landmarks of a side; factored here unless the factor of the forward pass is given."""
    spec, wide = side.kernel, side.landmarks.to(dtype)
    shift = wide.mean(0)
    prepared = maps.prepared_rows(spec, wide, shift, dtype)
    half = prepared.square().sum(-1).div_(2)
    par = bandwidths(spec, side.sigma, wide)
    s = Landmarks(
        spec, question.whiten, question.jitter, shift, prepared, half, par, factor, spectrum, whitener=prepared
    )
    if factor is None:
        W = maps.kernel_value(spec, _w_tile(s, _double(s, side.landmarks)), par.double())
        factor, spectrum = _factored(W, s.whiten, s.jitter)
        s = s._replace(factor=factor, spectrum=spectrum)
    if s.whiten == "cholesky":
        return s._replace(whitener=s.factor.to(dtype))
    root = (s.factor * s.spectrum[1]) @ s.factor.mT
    return s._replace(whitener=root.to(dtype))


def _double(s: Landmarks, z):
    """The landmarks in float64, prepared again: their unit rows keep float64's digits."""
    return maps.prepared_rows(s.spec, z, s.shift.double(), torch.float64)


def _w_tile(s: Landmarks, z):
    """t of W; the diagonal of a distance is 0 itself, not its rounding."""
    half = z.square().sum(-1) / 2
    t = maps.tile(s.spec, z, z, half, half)
    if s.spec.of_distance:
        t.diagonal().zero_()
    return t


def _factored(W, whiten: str, jitter: float):
    m = len(W)
    mean = W.diagonal().mean()
    scale = jitter * torch.where(mean == 0, torch.ones_like(mean), mean)  # all-zero landmarks: Phi is 0
    if whiten == "cholesky":
        shifted = W + scale * torch.eye(m, dtype=W.dtype, device=W.device)
        R, info = torch.linalg.cholesky_ex(shifted)
        failed = (info != 0) | ~torch.isfinite(R).all()
        _explain_failure(W, failed, jitter)
        return torch.where(failed, torch.nan, R).contiguous(), W.new_empty(2, 0)
    finite = torch.isfinite(W).all()  # eigh refuses anything else
    lam, U = torch.linalg.eigh(torch.where(finite, W, torch.eye(m, dtype=W.dtype, device=W.device)))
    keep = lam > torch.maximum(scale, m * torch.finfo(lam.dtype).eps * lam[-1])
    root = torch.where(keep, torch.where(keep, lam, torch.ones_like(lam)).rsqrt(), torch.zeros_like(lam))
    root = torch.where(finite, root, torch.nan)
    return U.contiguous(), torch.stack([lam, root])


def _explain_failure(W, failed, jitter: float):
    """Where values may be read: a W that is finite and yet has no factor is the caller's to mend."""
    if not checks.may_read(W) or not bool(failed) or not bool(torch.isfinite(W).all()):
        return
    smallest, mean = float(torch.linalg.eigvalsh(W)[0]), float(W.diagonal().mean())
    raise ValueError(
        f"landmarks: their kernel matrix has no Cholesky factor: smallest eigenvalue {smallest:.3g}, mean diagonal "
        f"{mean:.3g}, jitter {jitter:g} of it. Raise jitter (1e-6 lets duplicate landmarks pass), drop "
        "duplicates, or pass whiten='sqrt', which leaves eigenvalues below jitter out"
    )


def factor_gradient(s: Landmarks, product):
    """dL/dW, symmetric float64, from G'Phi (cholesky) or C'G (sqrt), G = dL/dPhi (MATH.md, section 3)."""
    product = product.double()
    if s.whiten == "cholesky":
        low = product.tril()
        low = low + product.tril(-1).mT  # the symmetric matrix that the lower triangle stands for
        half = torch.linalg.solve_triangular(s.factor.mT, low, upper=True)
        weight = torch.linalg.solve_triangular(s.factor, half, upper=False, left=False) / -2
        slope = s.jitter / len(weight) * weight.trace()
        return weight + slope * torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    U, (lam, root) = s.factor, s.spectrum.unbind()
    inner = U.mT @ (product + product.mT) @ U / 2
    keep = root != 0
    kept = -root[:, None] * root * (root[:, None] * root / (root[:, None] + root).clamp(min=1e-300))
    # one kept, one dropped: (f(a) - 0) / (a - b)
    gap = lam[:, None] - lam
    mixed = (root[:, None] - root) / torch.where(gap == 0, torch.ones_like(gap), gap)
    both = keep[:, None] & keep
    one = keep[:, None] ^ keep
    quotient = torch.where(both, kept, torch.where(one, mixed, torch.zeros_like(kept)))
    return U @ (quotient * inner) @ U.mT


def landmark_gradient(s: Landmarks, z, weight, want_sigma: bool):
    """(dL/dz of prepared landmarks, dL/dsigma) through W, from weight = dL/dW; float64."""
    z = _double(s, z)
    t = _w_tile(s, z)
    par = s.par.double()
    slope = maps.kernel_slope(s.spec, t, par)
    V = 2 * weight if slope is None else 2 * weight * slope
    dsigma = (weight * sigma_slope(s.spec, t, par.unbind())).sum() if want_sigma else None
    if s.spec.of_distance:
        V.diagonal().zero_()
        return V @ z - V.sum(1, keepdim=True) * z, dsigma
    return V @ z, dsigma
