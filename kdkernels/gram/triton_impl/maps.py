# SPDX-License-Identifier: Apache-2.0
"""The kernel maps of `prepared.py` on Triton tiles: g^ -> t -> K^, dK^/dg^, dK^/dsigma^; and what tiles are made from.

Letters as there; tiles are [BM, BN] float32. NaN stays NaN.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...backend import matmul_precision

LINEAR, POLYNOMIAL, RBF, LAPLACIAN = (tl.constexpr(k) for k in range(4))
KINDS = {"linear": LINEAR, "cosine": LINEAR, "polynomial": POLYNOMIAL, "rbf": RBF, "laplacian": LAPLACIAN}
# in units of |z_i|^2 + |z_j|^2: 16 eps, the rounding of a zero distance
ROUNDING = tl.constexpr(16 * 2.0**-23)
NAN = tl.constexpr(tl.PropagateNan.ALL)  # of minimum and maximum, which would drop it


@lru_cache(maxsize=None, typed=True)
def constant(value) -> tl.constexpr:
    """One object for each value: a launch looks its kernel up by comparing them, which Python is slow at."""
    return tl.constexpr(value)


class Map(NamedTuple):
    """A kernel function as the argument of a Triton kernel."""

    kind: tl.constexpr
    degree: tl.constexpr  # of a polynomial
    count: tl.constexpr  # bandwidths that are added up
    par: torch.Tensor | None  # parameters of each group: bandwidths, or t0 and a of (t0 + a t)^degree
    stride: int  # from one group's parameters to the next; a number, as Triton 3.6 loses a tuple of constants
    numbers: tuple[float, ...]  # where par is None: the parameters themselves, of which none recompiles


def map_of(spec, par=None, numbers=()) -> Map:
    """par [1 or G, parameters]; spec: `kernels.KernelSpec`."""
    stride = 0 if par is None or par.shape[0] == 1 else par.stride(0)
    degree = int(spec.params[0]) if spec.name == "polynomial" else 1
    count = 1 if not spec.of_distance else len(numbers) if par is None else par.shape[-1]
    return Map(KINDS[spec.name], constant(degree), constant(count), par, stride, tuple(numbers))


def precision(*tensors, exact: str = "ieee") -> str:
    """float32 products as the user set them for matmul: as `exact` says (default) or "tf32"."""
    if matmul_precision() == "tf32" and any(t.dtype == torch.float32 for t in tensors):
        return "tf32"
    return exact


@triton.jit
def vector(ptr, o, m):
    return tl.load(ptr + o, mask=m, other=0)


@triton.jit
def counting(keep_ptr, o, m):
    """Which rows count: all of them where there is no mask."""
    if keep_ptr is None:
        return m
    else:
        return tl.load(keep_ptr + o, mask=m, other=0) != 0


@triton.jit
def alpha_of(side, g, n, o, m):
    """The rank-one terms of a polynomial; of any other kernel no one asks."""
    if side.map.kind == POLYNOMIAL:
        return vector(side.alpha + g * n, o, m)
    else:
        return 0.0  # Triton 3.6 returns no None


@triton.jit
def expm1(x):
    # below 1/2 Taylor to x^9, relative error < 1e-9; elsewhere exp(x) - 1 keeps its digits
    s = 1 / 5040 + x * (1 / 40320 + x * (1 / 362880))
    s = 1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * s)))
    s = x * (1 + x * (0.5 + x * s))
    return tl.where(tl.abs(x) < 0.5, s, tl.exp(x) - 1)


@triton.jit
def power(x, N: tl.constexpr):
    y = tl.full(x.shape, 1.0, x.dtype)
    for _ in tl.static_range(N):
        y = y * x
    return y


@triton.jit
def parameter(of, g, k: tl.constexpr):
    if of.par is None:
        return tl.cast(of.numbers[k], tl.float32)
    else:
        return tl.load(of.par + g * of.stride + k)


@triton.jit
def spoilt(square):
    """NaN where a row is infinite: exp(-inf) = 0 would hide it."""
    return square + 0 * square


@triton.jit
def kernel_argument(of, product, square_i, square_j, diagonal):
    """t from g^ = z_i . z_j: g^ itself, or -d2/2 <= 0 and exactly 0 on the diagonal."""
    if of.kind >= RBF:
        s = spoilt(square_i)[:, None] + spoilt(square_j)[None, :]
        t = tl.minimum(product - 0.5 * s, 0.0, propagate_nan=NAN)
        if of.kind == LAPLACIAN:
            t = tl.where(t > s * -ROUNDING, 0.0, t)
        return tl.where(diagonal, 0.0, t)
    else:
        return product


@triton.jit
def kernel_value(of, g, t, alpha_i, alpha_j, typical, STABLE: tl.constexpr):
    """K^, or under STABLE K^ without what has the form u_i + u_j; `typical` is a squared distance."""
    if of.kind == LINEAR:
        return t
    elif of.kind == POLYNOMIAL:
        t0, a = parameter(of, g, 0), parameter(of, g, 1)
        delta = a * t
        if alpha_i is not None:
            delta = delta + alpha_i[:, None] + alpha_j[None, :]
        if STABLE:  # (t0 + delta)^d without t0^d and without d t0^(d-1) (alpha_i + alpha_j)
            rest, binomial, t0k = tl.zeros_like(delta), 1.0, 1.0
            for m in tl.static_range(of.degree - 1):
                rest = rest * delta + binomial * t0k
                binomial = binomial * (of.degree - m) / (m + 1)
                t0k = t0k * t0
            return rest * delta * delta + binomial * t0k * a * t
        else:
            return power(t0 + delta, of.degree)
    else:
        total = tl.zeros_like(t)
        for k in tl.static_range(of.count):
            s = parameter(of, g, k)
            x = t / (s * s) if of.kind == RBF else tl.sqrt(-2 * t) / (-s)
            if STABLE:
                level = typical / (-2 * s * s) if of.kind == RBF else tl.sqrt(typical) / (-s)
                level = tl.maximum(level, -30.0, propagate_nan=NAN)
                total += tl.exp(level) * expm1(x - level)
            else:
                total += tl.exp(x)
        return total


@triton.jit
def kernel_slope(of, g, t, alpha_i, alpha_j):
    """dK^/dg^"""
    if of.kind == LINEAR:
        return 1.0
    elif of.kind == POLYNOMIAL:
        t0, a = parameter(of, g, 0), parameter(of, g, 1)
        slope, base = of.degree * a, t0 + a * t  # in an order that costs no spills
        if alpha_i is not None:
            base = base + alpha_i[:, None] + alpha_j[None, :]
        return slope * power(base, of.degree - 1)
    else:
        total = tl.zeros_like(t)
        d = tl.sqrt(-2 * t)
        for k in tl.static_range(of.count):
            s = parameter(of, g, k)
            if of.kind == RBF:
                total += tl.exp(t / (s * s)) / (s * s)
            else:
                total += tl.where(d == 0, 0.0, tl.exp(-d / s) / (s * tl.where(d == 0, 1.0, d)))
        return total


@triton.jit
def sigma_slope(of, g, t):
    """dK^/dsigma^, one bandwidth."""
    s = parameter(of, g, 0)
    if of.kind == RBF:
        return tl.exp(t / (s * s)) * (-2 * t) / (s * s * s)
    else:
        d = tl.sqrt(-2 * t)
        return tl.exp(-d / s) * d / (s * s)


@triton.jit
def pair_weights(K, L, p_i, q_i, e_i, p_j, q_j, e_j, ROWWISE: tl.constexpr):
    """c_ij + c_ji with c_ij = p_i L_ij + q_i K_ij + e_i; p and q are the same for every row unless ROWWISE.

    (The term f_i h_j of MATH.md belongs to row-normalised and centred statistics, which run in PyTorch.)
    """
    if ROWWISE:
        return (p_i[:, None] + p_j[None, :]) * L + (q_i[:, None] + q_j[None, :]) * K + e_i[:, None] + e_j[None, :]
    else:
        return 2 * p_i * L + 2 * q_i * K + e_i[:, None] + e_j[None, :]
