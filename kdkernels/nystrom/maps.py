# SPDX-License-Identifier: Apache-2.0
"""Kernel maps on tiles of rows x_i and landmarks z_j: from t to k, to its slope dk/dg and to dk/dsigma.

t = x_i . z_j, or -d2/2 for distances, where dk/dg is the slope in t as well (MATH.md, section 4).
"""

from __future__ import annotations

import torch

from ..gram.kernels import KernelSpec
from ..gram.torch_impl import prepared


def prepared_rows(spec: KernelSpec, x, shift, dtype):
    """Rows as the tiles take them: unit rows (cosine), minus the landmarks' mean (distances), or as given."""
    if spec.name == "cosine":
        return prepared.unit_rows(x, None, dtype)
    return x.to(dtype) - shift if spec.of_distance else x.to(dtype)


def raw_gradient(spec: KernelSpec, x, gradient):
    """The gradient of prepared rows as one of the rows themselves."""
    return prepared.through_unit_rows(gradient, x) if spec.name == "cosine" else gradient


def tf32_allowed(x) -> bool:
    """Whether PyTorch would round the factors of x's products to 11 bits, which the whitener amplifies."""
    return x.is_cuda and x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def product(a, b):
    """a @ b with float32's digits. The setting is the whole process's: changing it here would reach other threads."""
    if not tf32_allowed(a):
        return a @ b
    # three products of what TF32 holds exactly, and of the rest
    (a_high, a_low), (b_high, b_low) = split(a), split(b)
    return a_high @ b_low + a_low @ b_high + a_high @ b_high


def split(x):
    """(the first 11 bits of x, the rest)."""
    high = (x.contiguous().view(torch.int32) & -(1 << 13)).view(torch.float32)
    return high, x - high


def tile(spec: KernelSpec, x, z, half_x, half_z):
    """t of prepared rows; half_x, half_z = |x_i|^2 / 2, |z_j|^2 / 2 (used for distances)."""
    t = product(x, z.mT)
    if not spec.of_distance:
        return t
    size = (half_x + 0 * half_x)[:, None] + half_z  # NaN where a row is infinite: exp(-inf) = 0 would hide it
    t.sub_(size)
    return prepared.at_the_cusp(t, x, z, half_x, half_z) if spec.name == "laplacian" else t.clamp_(max=0)


def kernel_value(spec: KernelSpec, t, par):
    """k; par: the bandwidths [S] of a distance kernel. Overwrites nothing."""
    if spec.linear:
        return t
    if spec.name == "polynomial":
        degree, scale, coef0 = spec.params
        return (t * scale + coef0) ** int(degree)
    if spec.name == "rbf":
        return prepared.added_up(torch.exp(t / s**2) for s in par.unbind())
    root = (t * -2).sqrt_()
    return prepared.added_up(torch.exp(root / -s) for s in par.unbind())


def kernel_slope(spec: KernelSpec, t, par):
    """dk/dg, None for 1; 0 where a laplacian's distance is 0."""
    if spec.linear:
        return None
    if spec.name == "polynomial":
        degree, scale, coef0 = spec.params
        return (t * scale + coef0) ** (int(degree) - 1) * (degree * scale)
    return prepared.slope_of_distance(spec, t, par.unbind())


def kernel_diagonal(spec: KernelSpec, x, par):
    """k(x_i, x_i) of prepared rows."""
    square = x.square().sum(-1)
    if spec.of_distance:
        return torch.full_like(square, float(par.shape[0]))
    return kernel_value(spec, square, par)
