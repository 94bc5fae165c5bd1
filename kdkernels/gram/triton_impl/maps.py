# SPDX-License-Identifier: Apache-2.0
"""The kernel maps of `prepared.py` on Triton tiles: t -> K^, dK^/dg^, dK^/dsigma^, and pair weights of the gradient.

Letters as there; tiles are [BM, BN] float32. A side's bandwidths come from `par` [S] or, for one known number, from the
scalar `sigma`: a temperature never recompiles.
"""

import torch
import triton
import triton.language as tl

LINEAR, POLYNOMIAL, RBF, LAPLACIAN = (tl.constexpr(k) for k in range(4))
KINDS = {"linear": 0, "cosine": 0, "polynomial": 1, "rbf": 2, "laplacian": 3}
# in units of |z_i|^2 + |z_j|^2: 16 eps, the rounding of a zero distance
ROUNDING = tl.constexpr(16 * 2.0**-23)
NAN = tl.constexpr(tl.PropagateNan.ALL)  # minimum and maximum would drop it


def precision(*tensors) -> str:
    """float32 products as the user set them for matmul: "ieee" (default) or "tf32"."""
    if any(t.dtype == torch.float32 for t in tensors) and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


@triton.jit
def expm1(x):
    # below 1/2 Taylor to x^9, relative error < 1e-9; elsewhere exp(x) - 1 keeps its digits
    s = 1 / 5040 + x * (1 / 40320 + x * (1 / 362880))
    s = 1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * s)))
    s = x * (1 + x * (0.5 + x * s))
    return tl.where(tl.abs(x) < 0.5, s, tl.exp(x) - 1)


@triton.jit
def bandwidth(par, sigma, k: tl.constexpr, HAS_PAR: tl.constexpr):
    if HAS_PAR:
        return tl.load(par + k)
    else:
        return sigma


@triton.jit
def spoilt(square):
    """NaN where a row is infinite: exp(-inf) = 0 would hide it."""
    return square + 0 * square


@triton.jit
def tile_product(g, square_i, square_j, diagonal, KIND: tl.constexpr):
    """t from g^ = z_i . z_j: g^ itself, or -d2/2 <= 0 and exactly 0 on the diagonal."""
    if KIND >= RBF:
        s = spoilt(square_i)[:, None] + spoilt(square_j)[None, :]
        t = tl.minimum(g - 0.5 * s, 0.0, propagate_nan=NAN)
        if KIND == LAPLACIAN:
            t = tl.where(t > s * -ROUNDING, 0.0, t)
        return tl.where(diagonal, 0.0, t)
    else:
        return g


@triton.jit
def power(x, N: tl.constexpr):
    y = tl.full(x.shape, 1.0, tl.float32)
    for _ in tl.static_range(N):
        y = y * x
    return y


@triton.jit
def kernel_value(
    t, alpha_i, alpha_j, par, sigma, typical,
    KIND: tl.constexpr, DEGREE: tl.constexpr, S: tl.constexpr, HAS_PAR: tl.constexpr, STABLE: tl.constexpr,
):  # fmt: skip
    if KIND == LINEAR:
        return t
    elif KIND == POLYNOMIAL:
        t0, a = tl.load(par), tl.load(par + 1)
        delta = a * t + alpha_i[:, None] + alpha_j[None, :]
        if STABLE:  # (t0 + delta)^d without t0^d and without d t0^(d-1) (alpha_i + alpha_j)
            rest, binomial, t0k = tl.zeros_like(delta), 1.0, 1.0
            for m in tl.static_range(DEGREE - 1):
                rest = rest * delta + binomial * t0k
                binomial = binomial * (DEGREE - m) / (m + 1)
                t0k = t0k * t0
            return rest * delta * delta + binomial * t0k * a * t
        else:
            return power(t0 + delta, DEGREE)
    else:
        total = tl.zeros_like(t)
        for k in tl.static_range(S):
            s = bandwidth(par, sigma, k, HAS_PAR)
            x = t / (s * s) if KIND == RBF else tl.sqrt(-2 * t) / (-s)
            if STABLE:
                level = typical / (-2 * s * s) if KIND == RBF else tl.sqrt(typical) / (-s)
                level = tl.maximum(level, -30.0, propagate_nan=NAN)
                total += tl.exp(level) * expm1(x - level)
            else:
                total += tl.exp(x)
        return total


@triton.jit
def kernel_slope(
    t, alpha_i, alpha_j, par, sigma,
    KIND: tl.constexpr, DEGREE: tl.constexpr, S: tl.constexpr, HAS_PAR: tl.constexpr,
):  # fmt: skip
    if KIND == LINEAR:
        return 1.0
    elif KIND == POLYNOMIAL:
        t0, a = tl.load(par), tl.load(par + 1)
        return DEGREE * a * power(t0 + a * t + alpha_i[:, None] + alpha_j[None, :], DEGREE - 1)
    else:
        total = tl.zeros_like(t)
        d = tl.sqrt(-2 * t)
        for k in tl.static_range(S):
            s = bandwidth(par, sigma, k, HAS_PAR)
            if KIND == RBF:
                total += tl.exp(t / (s * s)) / (s * s)
            else:
                total += tl.where(d == 0, 0.0, tl.exp(-d / s) / (s * tl.where(d == 0, 1.0, d)))
        return total


@triton.jit
def sigma_slope(t, par, sigma, KIND: tl.constexpr, HAS_PAR: tl.constexpr):
    s = bandwidth(par, sigma, 0, HAS_PAR)
    if KIND == RBF:
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
