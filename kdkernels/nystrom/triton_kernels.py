# SPDX-License-Identifier: Apache-2.0
"""Kernel rows times the whitener in one pass: tiles of X Z' become kernel values in registers and leave as features.

Reads X and Z, writes Phi once; C is never stored (m <= 256). A triangular whitener is applied by block substitution,
which keeps float32's digits where the product with an explicit inverse loses three: earlier column blocks of a row tile
are read back from Phi, which the same program has just written; a diagonal block is solved by its inverse, twice, as
one product loses the condition of a block in which the rank of W runs out. `pull_rows` is the same for the gradient,
backwards.

Shapes: those of `Operands`; R [M, M] padded to whole blocks by the identity, inverse [M, BN] its inverted diagonal
blocks; all float32 and contiguous.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..gram.triton_impl.maps import (
    LAPLACIAN,
    LINEAR,
    RBF,
    ROUNDING,
    Map,
    kernel_slope,
    kernel_value,
    sigma_slope,
    vector,
)

# what happens to the tiles of C: nothing, substitution by a triangle, a product with a square root
PANEL, TRIANGLE, ROOT = (tl.constexpr(k) for k in range(3))


class Operands(NamedTuple):
    """Rows, landmarks and their kernel function: what every kernel here takes first."""

    x: torch.Tensor  # [n, d]
    half_x: torch.Tensor | None  # [n] |x_i|^2 / 2 under a distance
    z: torch.Tensor  # [m, d]
    half_z: torch.Tensor  # [m]
    n: int
    m: int
    d: int
    map: Map


@triton.jit
def _tile(
    of, rows_x, o_i, o_j, m_i, m_j, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    """t of a tile: x_i . z_j, or -|x_i - z_j|^2 / 2."""
    t, d = tl.zeros([BM, BN], tl.float32), of.d
    o_k = tl.arange(0, BK)
    at_x = rows_x + tl.arange(0, BM)[:, None] * d + o_k[None, :]
    at_z = of.z + o_j[:, None] * d + o_k[None, :]
    for k in range(0, d, BK):
        m_k = (o_k < d - k)[None, :]
        b_x = tl.load(at_x, mask=m_i[:, None] & m_k, other=0)
        b_z = tl.load(at_z, mask=m_j[:, None] & m_k, other=0)
        t = tl.dot(b_x, tl.trans(b_z), t, input_precision=PRECISION)
        at_x += BK
        at_z += BK
    if of.map.kind >= RBF:
        size = vector(of.half_x, o_i, m_i)[:, None]
        size += vector(of.half_z, o_j, m_j)[None, :]
        t -= size
        t = tl.where(t > 0, 0.0, t)  # keeps NaN
        if of.map.kind == LAPLACIAN:
            t = tl.where(t > size * -ROUNDING, 0.0, t)
    return t


@triton.jit
def _values(
    of, rows_x, o_i, o_j, m_i, m_j, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    """A tile of C, 0 beyond the last landmark."""
    t = _tile(of, rows_x, o_i, o_j, m_i, m_j, BM, BN, BK, PRECISION)
    return tl.where(m_j[None, :], kernel_value(of.map, 0, t, None, None, None, False), 0.0)


@triton.jit
def _solved(c, factor, inverse, PRECISION: tl.constexpr):
    """c factor^-1: by the rounded inverse, and once more for what that leaves over."""
    total, left = tl.zeros_like(c), c
    for _ in range(0, 2):  # one code: one set of registers
        total += tl.dot(left, tl.load(inverse), input_precision=PRECISION)
        left = c - tl.dot(total, tl.load(factor), input_precision=PRECISION)
    return total


@triton.jit
def feature_rows(
    of,  # Operands
    r_ptr, inverse_ptr,
    phi_ptr,  # [n, m]
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n, m = of.n, of.m
    start = tl.program_id(0).to(tl.int64) * BM
    local = tl.arange(0, BM)
    o_i = start + local
    m_i = o_i < n
    rows_x, rows_phi = of.x + start * of.d, phi_ptr + start * m
    o_n = tl.arange(0, BN)
    width = tl.cdiv(m, BN) * BN
    for first in range(0, m, BN):
        o_j = first + o_n
        m_j = o_j < m
        c = _values(of, rows_x, o_i, o_j, m_i, m_j, BM, BN, BK, PRECISION)
        if MODE == TRIANGLE:
            # phi_b = (c_b - sum_{a < b} phi_a R_ba') R_bb'^-1
            for before in range(0, first, BN):
                at = rows_phi + local[:, None] * m + (before + o_n)[None, :]
                b_phi = tl.load(at, mask=m_i[:, None], other=0)
                b_r = tl.load(r_ptr + o_j[:, None] * width + (before + o_n)[None, :])
                c -= tl.dot(b_phi, tl.trans(b_r), input_precision=PRECISION)
            factor = r_ptr + o_j[None, :] * width + o_j[:, None]
            inverse = inverse_ptr + o_j[None, :] * BN + o_n[:, None]
            c = _solved(c, factor, inverse, PRECISION)
        tl.store(rows_phi + local[:, None] * m + o_j[None, :], c, mask=m_i[:, None] & m_j[None, :])
        if MODE == TRIANGLE:
            tl.debug_barrier()  # the next block reads what other threads of this program have written


@triton.jit
def root_rows(
    of,  # Operands
    a_ptr,  # [M, MP] the inverse root, zero beyond m
    phi_ptr,  # [n, m]
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, MP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All m columns of a row tile stay in registers."""
    n, m = of.n, of.m
    start = tl.program_id(0).to(tl.int64) * BM
    local, o_n, o_m = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, MP)
    o_i = start + local
    m_i = o_i < n
    rows_x, phi = of.x + start * of.d, tl.zeros([BM, MP], tl.float32)
    for first in range(0, m, BN):
        o_j = first + o_n
        m_j = o_j < m
        c = _values(of, rows_x, o_i, o_j, m_i, m_j, BM, BN, BK, PRECISION)
        b_a = tl.load(a_ptr + o_j[:, None] * MP + o_m[None, :])
        phi = tl.dot(c, b_a, phi, input_precision=PRECISION)
    # sum_a c_a A_a
    tl.store(phi_ptr + start * m + local[:, None] * m + o_m[None, :], phi, mask=m_i[:, None] & (o_m < m)[None, :])


@triton.jit
def pull_rows(
    of,  # Operands
    r_ptr, inverse_ptr,
    grad_ptr,  # [n, m] dL/dPhi, or dL/dC under PANEL
    dc_ptr,  # [n, m] dL/dC, written under TRIANGLE
    v_ptr,  # [n, m] dL/dC dk/dg
    dsigma_ptr,  # [n] row sums of dL/dC dk/dsigma, or None
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Under ROOT, r is the inverse root itself, padded by zeros."""
    n, m = of.n, of.m
    start = tl.program_id(0).to(tl.int64) * BM
    local, o_n = tl.arange(0, BM), tl.arange(0, BN)
    o_i = start + local
    m_i = o_i < n
    rows_x, rows_g = of.x + start * of.d, grad_ptr + start * m
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
            factor = r_ptr + o_j[:, None] * width + o_j[None, :]
            inverse = inverse_ptr + o_j[:, None] * BN + o_n[None, :]
            dc = _solved(dc, factor, inverse, PRECISION)
            tl.store(rows_dc + at_j, dc, mask=inside)
            tl.debug_barrier()
        v = dc
        if of.map.kind != LINEAR:
            t = _tile(of, rows_x, o_i, o_j, m_i, m_j, BM, BN, BK, PRECISION)
            v = dc * kernel_slope(of.map, 0, t, None, None)
            if dsigma_ptr is not None:
                dsigma += tl.sum(tl.where(inside, dc * sigma_slope(of.map, 0, t), 0.0), axis=1)
        # dc_ij dk/dg_ij
        tl.store(rows_v + at_j, v, mask=inside)
    if dsigma_ptr is not None:
        tl.store(dsigma_ptr + o_i, dsigma, mask=m_i)
