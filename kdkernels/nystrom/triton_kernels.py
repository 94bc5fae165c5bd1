# SPDX-License-Identifier: Apache-2.0
"""Kernel rows times the whitener in one pass: tiles of X Z' become kernel values in registers and leave as features.

Reads X and Z, writes Phi once; C is never stored (m <= 256). A triangular whitener is applied by block substitution,
which keeps float32's digits where the product with an explicit inverse loses three: earlier column blocks of a row tile
are read back from Phi, which the same program has just written. `pull_rows` is the same for the gradient, backwards.

Shapes: x [n, d], z [m, d] prepared rows, half_x = |x_i|^2/2 [n], half_z [m], par = bandwidths [S]; R [M, M] padded to
whole blocks by the identity, inverse [M, BN] its inverted diagonal blocks; all float32 and contiguous.
"""

import triton
import triton.language as tl

from ..gram.triton_impl.maps import (
    LAPLACIAN,
    LINEAR,
    POLYNOMIAL,
    RBF,
    ROUNDING,
    kernel_slope,
    kernel_value,
    power,
    sigma_slope,
)

# what happens to the tiles of C: nothing, substitution by a triangle, a product with a square root
PANEL, TRIANGLE, ROOT = (tl.constexpr(k) for k in range(3))


@triton.jit
def _tile(
    rows_x, half_x_ptr, z_ptr, half_z_ptr, o_i, o_j, m_i, m_j, d,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """t of a tile: x_i . z_j, or -|x_i - z_j|^2 / 2."""
    t = tl.zeros([BM, BN], tl.float32)
    o_k = tl.arange(0, BK)
    at_x = rows_x + tl.arange(0, BM)[:, None] * d + o_k[None, :]
    at_z = z_ptr + o_j[:, None] * d + o_k[None, :]
    for k in range(0, d, BK):
        m_k = (o_k < d - k)[None, :]
        b_x = tl.load(at_x, mask=m_i[:, None] & m_k, other=0)
        b_z = tl.load(at_z, mask=m_j[:, None] & m_k, other=0)
        t = tl.dot(b_x, tl.trans(b_z), t, input_precision=PRECISION)
        at_x += BK
        at_z += BK
    if KIND >= RBF:
        size = tl.load(half_x_ptr + o_i, mask=m_i, other=0)[:, None]
        size += tl.load(half_z_ptr + o_j, mask=m_j, other=0)[None, :]
        t -= size
        t = tl.where(t > 0, 0.0, t)  # keeps NaN
        if KIND == LAPLACIAN:
            t = tl.where(t > size * -ROUNDING, 0.0, t)
    return t


@triton.jit
def _value(t, par_ptr, scale, coef0, KIND: tl.constexpr, DEGREE: tl.constexpr, S: tl.constexpr):
    if KIND == POLYNOMIAL:  # its parameters are numbers, and no mean has been taken from its rows
        return power(t * scale + coef0, DEGREE)
    else:
        return kernel_value(t, 0.0, 0.0, par_ptr, 1.0, 0.0, KIND, DEGREE, S, True, False)


@triton.jit
def _slope(t, par_ptr, scale, coef0, KIND: tl.constexpr, DEGREE: tl.constexpr, S: tl.constexpr):
    if KIND == POLYNOMIAL:
        return DEGREE * scale * power(t * scale + coef0, DEGREE - 1)
    else:
        return kernel_slope(t, 0.0, 0.0, par_ptr, 1.0, KIND, DEGREE, S, True)


@triton.jit
def feature_rows(
    x_ptr, half_x_ptr, z_ptr, half_z_ptr, par_ptr, r_ptr, inverse_ptr,
    phi_ptr,  # [n, m]
    n, m, d, scale, coef0,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr, DEGREE: tl.constexpr, S: tl.constexpr,
    MODE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BM
    local = tl.arange(0, BM)
    o_i = start + local
    m_i = o_i < n
    rows_x, rows_phi = x_ptr + start * d, phi_ptr + start * m
    o_n = tl.arange(0, BN)
    width = tl.cdiv(m, BN) * BN
    for first in range(0, m, BN):
        o_j = first + o_n
        m_j = o_j < m
        t = _tile(rows_x, half_x_ptr, z_ptr, half_z_ptr, o_i, o_j, m_i, m_j, d, BM, BN, BK, KIND, PRECISION)
        # c_b
        c = tl.where(m_j[None, :], _value(t, par_ptr, scale, coef0, KIND, DEGREE, S), 0.0)
        if MODE == TRIANGLE:
            # phi_b = (c_b - sum_{a < b} phi_a R_ba') R_bb'^-1
            for before in range(0, first, BN):
                at = rows_phi + local[:, None] * m + (before + o_n)[None, :]
                b_phi = tl.load(at, mask=m_i[:, None], other=0)
                b_r = tl.load(r_ptr + o_j[:, None] * width + (before + o_n)[None, :])
                c -= tl.dot(b_phi, tl.trans(b_r), input_precision=PRECISION)
            b_inverse = tl.load(inverse_ptr + o_j[:, None] * BN + o_n[None, :])
            c = tl.dot(c, tl.trans(b_inverse), input_precision=PRECISION)
        tl.store(rows_phi + local[:, None] * m + o_j[None, :], c, mask=m_i[:, None] & m_j[None, :])
        if MODE == TRIANGLE:
            tl.debug_barrier()  # the next block reads what other threads of this program have written


@triton.jit
def root_rows(
    x_ptr, half_x_ptr, z_ptr, half_z_ptr, par_ptr,
    a_ptr,  # [M, MP] the inverse root, zero beyond m
    phi_ptr,  # [n, m]
    n, m, d, scale, coef0,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, MP: tl.constexpr, KIND: tl.constexpr,
    DEGREE: tl.constexpr, S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All m columns of a row tile stay in registers."""
    start = tl.program_id(0).to(tl.int64) * BM
    local, o_n, o_m = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, MP)
    o_i = start + local
    m_i = o_i < n
    phi = tl.zeros([BM, MP], tl.float32)
    for first in range(0, m, BN):
        o_j = first + o_n
        m_j = o_j < m
        t = _tile(x_ptr + start * d, half_x_ptr, z_ptr, half_z_ptr, o_i, o_j, m_i, m_j, d, BM, BN, BK, KIND, PRECISION)
        c = tl.where(m_j[None, :], _value(t, par_ptr, scale, coef0, KIND, DEGREE, S), 0.0)
        b_a = tl.load(a_ptr + o_j[:, None] * MP + o_m[None, :])
        phi = tl.dot(c, b_a, phi, input_precision=PRECISION)
    # sum_a c_a A_a
    tl.store(phi_ptr + start * m + local[:, None] * m + o_m[None, :], phi, mask=m_i[:, None] & (o_m < m)[None, :])


@triton.jit
def pull_rows(
    x_ptr, half_x_ptr, z_ptr, half_z_ptr, par_ptr, r_ptr, inverse_ptr,
    grad_ptr,  # [n, m] dL/dPhi, or dL/dC under PANEL
    dc_ptr,  # [n, m] dL/dC, written under TRIANGLE
    v_ptr,  # [n, m] dL/dC dk/dg
    dsigma_ptr,  # [n] row sums of dL/dC dk/dsigma (SIGMA)
    n, m, d, scale, coef0,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr, DEGREE: tl.constexpr, S: tl.constexpr,
    MODE: tl.constexpr, SIGMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Under ROOT, r is the inverse root itself, padded by zeros."""
    start = tl.program_id(0).to(tl.int64) * BM
    local, o_n = tl.arange(0, BM), tl.arange(0, BN)
    o_i = start + local
    m_i = o_i < n
    rows_x, rows_g = x_ptr + start * d, grad_ptr + start * m
    rows_dc, rows_v = dc_ptr + start * m, v_ptr + start * m
    blocks = tl.cdiv(m, BN)
    width = blocks * BN
    dsigma = tl.zeros([BM], tl.float32)
    for back in range(0, blocks):
        first = (blocks - 1 - back) * BN
        o_j = first + o_n
        m_j = o_j < m
        inside = m_i[:, None] & m_j[None, :]
        at_j = local[:, None] * m + o_j[None, :]
        if MODE == ROOT:
            # sum_a G_a A_ab
            dc = tl.zeros([BM, BN], tl.float32)
            for other in range(0, m, BN):
                o_a = other + o_n
                b_g = tl.load(
                    rows_g + local[:, None] * m + o_a[None, :], mask=m_i[:, None] & (o_a < m)[None, :], other=0
                )
                b_r = tl.load(r_ptr + o_a[:, None] * width + o_j[None, :])
                dc = tl.dot(b_g, b_r, dc, input_precision=PRECISION)
        else:
            dc = tl.load(rows_g + at_j, mask=inside, other=0)
        if MODE == TRIANGLE:
            # dc_b = (G_b - sum_{a > b} dc_a R_ab) R_bb^-1
            for after in range(first + BN, width, BN):
                o_a = after + o_n
                b_dc = tl.load(
                    rows_dc + local[:, None] * m + o_a[None, :], mask=m_i[:, None] & (o_a < m)[None, :], other=0
                )
                b_r = tl.load(r_ptr + o_a[:, None] * width + o_j[None, :])
                dc -= tl.dot(b_dc, b_r, input_precision=PRECISION)
            b_inverse = tl.load(inverse_ptr + o_j[:, None] * BN + o_n[None, :])
            dc = tl.dot(dc, b_inverse, input_precision=PRECISION)
            tl.store(rows_dc + at_j, dc, mask=inside)
            tl.debug_barrier()
        v = dc
        if KIND != LINEAR:
            t = _tile(rows_x, half_x_ptr, z_ptr, half_z_ptr, o_i, o_j, m_i, m_j, d, BM, BN, BK, KIND, PRECISION)
            v = dc * _slope(t, par_ptr, scale, coef0, KIND, DEGREE, S)
            if SIGMA:
                dsigma += tl.sum(tl.where(inside, dc * sigma_slope(t, par_ptr, 0.0, KIND, True), 0.0), axis=1)
        # dc_ij dk/dg_ij
        tl.store(rows_v + at_j, v, mask=inside)
    if SIGMA:
        tl.store(dsigma_ptr + o_i, dsigma, mask=m_i)
