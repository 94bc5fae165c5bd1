# SPDX-License-Identifier: Apache-2.0
"""Above 1024 samples: tiles of both Gram matrices live in registers, and only sums or the gradient leave them.

`tile_sums` visits each unordered pair of row blocks once and writes its row and column sums to slots that PyTorch adds
in a fixed order, in float64. `gradient_rows` is the flash-style backward pass for p <= 256: tiles are computed again,
dz stays in registers. `weight_panel` writes the pair weights V of a few rows for a matrix product, for wider features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...triton_tf32 import to_tf32
from .maps import (
    RBF,
    Map,
    alpha_of,
    counting,
    kernel_argument,
    kernel_slope,
    kernel_value,
    pair_weights,
    sigma_slope,
    vector,
)

ROW_SUMS = tl.constexpr(5)  # of a row: the sums of K, L, K^2, KL or (K - L)^2, L^2
# rows of `weights` [G, 3, n], and of what a gradient leaves beside dz: row sums of V, sum_j c_ij K_ij, that of sigma
P, Q, E = (tl.constexpr(k) for k in range(3))
WEIGHTS = tl.constexpr(3)
ROW_SUM, NORM, SIGMA = (tl.constexpr(k) for k in range(3))
EXTRA = tl.constexpr(3)


class Side(NamedTuple):
    """Prepared rows and what belongs to them; None where the kernel function has no use for it."""

    z: torch.Tensor  # [G, n, width] float32 or half
    width: int
    map: Map
    square: torch.Tensor  # [G, n] |z_i|^2
    u: torch.Tensor | None  # [G, n] what is subtracted from K^ as u_i + u_j
    alpha: torch.Tensor | None  # [G, n] of a polynomial
    typical: torch.Tensor | None  # [G] of a distance

    def group(self, g: int) -> Side:
        """As the first group of what is left from group g on."""
        parts = (part[g:] if isinstance(part, torch.Tensor) else part for part in self)
        kernel = self.map if self.map.par is None else self.map._replace(par=self.map.par[g:])
        return Side(*parts)._replace(map=kernel)


class Asked(NamedTuple):
    """The problem of a call, compiled in."""

    stable: tl.constexpr
    unbiased: tl.constexpr
    mse: tl.constexpr
    rowwise: tl.constexpr
    row_norm: tl.constexpr


@triton.jit
def _products(
    side, g, n, i, j, m_i, m_j, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    """z_i . z_j of the tile that starts at rows i and j: a 64-bit start, 32-bit offsets inside.

    Nystrom kernels and those of landmark similarity have loops of their own: one for all of them costs registers.
    """
    acc = tl.zeros([BM, BN], tl.float32)
    z, p, o_k = side.z + g * n * side.width, side.width, tl.arange(0, BK)
    at_i = z + i * p + tl.arange(0, BM)[:, None] * p + o_k[None, :]
    at_j = z + j * p + tl.arange(0, BN)[:, None] * p + o_k[None, :]
    for k in range(0, p, BK):
        m_k = (o_k < p - k)[None, :]
        b_i = tl.load(at_i, mask=m_i[:, None] & m_k, other=0)
        b_j = tl.load(at_j, mask=m_j[:, None] & m_k, other=0)
        b_i, b_j = to_tf32(b_i, PRECISION), to_tf32(b_j, PRECISION)
        acc = tl.dot(b_i, tl.trans(b_j), acc, input_precision=PRECISION)
        at_i += BK
        at_j += BK
    return acc


@triton.jit
def _typical(side, g):
    """A squared distance of the group, read before its tiles are."""
    if side.typical is None:
        return 0.0
    else:
        return tl.load(side.typical + g)


@triton.jit
def _kernel_tile(product, side, typical, g, n, o_i, o_j, m_i, m_j, asked):
    """(t, K^ - u_i - u_j) of a tile from its products g^."""
    square = side.square + g * n
    square_i, square_j = vector(square, o_i, m_i), vector(square, o_j, m_j)
    t = kernel_argument(side.map, product, square_i, square_j, o_i[:, None] == o_j[None, :])
    a_i, a_j = alpha_of(side, g, n, o_i, m_i), alpha_of(side, g, n, o_j, m_j)
    K = kernel_value(side.map, g, t, a_i, a_j, typical, asked.stable)
    if side.u is not None:
        K -= vector(side.u + g * n, o_i, m_i)[:, None] + vector(side.u + g * n, o_j, m_j)[None, :]
    return t, K


@triton.jit
def _counted(keep_ptr, g, n, o_i, o_j, m_i, m_j, asked):
    """Which pairs of a tile enter the sums."""
    pairs = m_i[:, None] & m_j[None, :]
    if keep_ptr is not None:
        pairs = counting(keep_ptr + g * n, o_i, m_i)[:, None] & counting(keep_ptr + g * n, o_j, m_j)[None, :]
    if asked.unbiased:
        pairs = pairs & (o_i[:, None] != o_j[None, :])
    return pairs


@triton.jit(do_not_specialize=["G", "first", "band"])
def tile_sums(
    x, y,  # Side
    keep_ptr,  # [G, n] uint8
    row_ptr,  # [T, G, 5, band * BM] float32: sums over the columns of tile j
    column_ptr,  # [band, G, 5, n] float32: sums over the rows of tile i
    n, G, first, band,
    asked,  # Asked
    BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(n, BM)
    pid = tl.program_id(0)
    local, j, g = pid % band, (pid // band) % tiles, (pid // band // tiles).to(tl.int64)
    i = first + local
    start_i, start_j = i.to(tl.int64) * BM, j.to(tl.int64) * BM
    o_i = i * BM + tl.arange(0, BM)
    o_j = j * BM + tl.arange(0, BM)
    m_i, m_j = o_i < n, o_j < n
    rows = row_ptr + ((j.to(tl.int64) * G + g) * ROW_SUMS) * band * BM + local * BM + tl.arange(0, BM)
    columns = column_ptr + ((local.to(tl.int64) * G + g) * ROW_SUMS) * n + o_j
    step = band * BM
    if i >= tiles:
        return
    if j < i:  # the mirror image is summed by tile (j, i): these slots count nothing
        zero = tl.zeros([BM], tl.float32)
        for k in tl.static_range(ROW_SUMS):
            tl.store(rows + k * step, zero)
            tl.store(columns + k * n, zero, mask=m_j)
        return
    typical_x, typical_y = _typical(x, g), _typical(y, g)
    of_x = _products(x, g, n, start_i, start_j, m_i, m_j, BM, BM, BK, PRECISION)
    _, K = _kernel_tile(of_x, x, typical_x, g, n, o_i, o_j, m_i, m_j, asked)
    of_y = _products(y, g, n, start_i, start_j, m_i, m_j, BM, BM, BK, PRECISION)
    _, L = _kernel_tile(of_y, y, typical_y, g, n, o_i, o_j, m_i, m_j, asked)
    counted = _counted(keep_ptr, g, n, o_i, o_j, m_i, m_j, asked)
    K, L = tl.where(counted, K, 0.0), tl.where(counted, L, 0.0)
    KL = (K - L) * (K - L) if asked.mse else K * L
    mirrored = tl.where(i == j, 0.0, 1.0)
    # where only totals are asked for, the mirrored half of the squares is added to the rows
    factor = 1.0 if asked.rowwise else 1.0 + mirrored
    tl.store(rows, tl.sum(K, 1))
    tl.store(rows + step, tl.sum(L, 1))
    tl.store(rows + 2 * step, factor * tl.sum(K * K, 1))
    tl.store(rows + 3 * step, factor * tl.sum(KL, 1))
    tl.store(rows + 4 * step, factor * tl.sum(L * L, 1))
    tl.store(columns, mirrored * tl.sum(K, 0), mask=m_j)
    tl.store(columns + n, mirrored * tl.sum(L, 0), mask=m_j)
    if asked.rowwise:
        tl.store(columns + 2 * n, mirrored * tl.sum(K * K, 0), mask=m_j)
        tl.store(columns + 3 * n, mirrored * tl.sum(KL, 0), mask=m_j)
        tl.store(columns + 4 * n, mirrored * tl.sum(L * L, 0), mask=m_j)


@triton.jit
def _tile_weights(K, L, t, x, weights_ptr, g, n, o_i, o_j, m_i, m_j, counted, asked):
    """(W, V, sum_j c_ij K_ij): the pair weights, times dK^/dg^, and the row norm's own sum."""
    weights = weights_ptr + g * WEIGHTS * n
    if asked.rowwise:
        p_i, p_j = vector(weights + P * n, o_i, m_i), vector(weights + P * n, o_j, m_j)
        q_i, q_j = vector(weights + Q * n, o_i, m_i), vector(weights + Q * n, o_j, m_j)
    else:  # the same for every row: two scalars
        p_i, q_i = tl.load(weights + P * n), tl.load(weights + Q * n)
        p_j, q_j = p_i, q_i
    e_i, e_j = vector(weights + E * n, o_i, m_i), vector(weights + E * n, o_j, m_j)
    W = pair_weights(K, L, p_i, q_i, e_i, p_j, q_j, e_j, asked.rowwise)
    W = tl.where(counted, W, 0.0)
    V = W * kernel_slope(x.map, g, t, alpha_of(x, g, n, o_i, m_i), alpha_of(x, g, n, o_j, m_j))
    if x.map.kind >= RBF:
        V = tl.where(o_i[:, None] == o_j[None, :], 0.0, V)
    norm = tl.zeros_like(e_i)
    if asked.row_norm:
        c_ij = p_i[:, None] * L + q_i[:, None] * K + e_i[:, None]
        norm = tl.sum(tl.where(counted, c_ij * K, 0.0), axis=1)
    return W, V, norm


@triton.jit
def _row_sum(V, side):
    """Row sums of V: of the rounded V for distances, whose two terms cancel; exact where a mean multiplies them."""
    if side.map.kind >= RBF:
        return tl.sum(V.to(side.z.dtype.element_ty).to(tl.float32), axis=1)
    else:
        return tl.sum(V, axis=1)


@triton.jit
def gradient_rows(
    x, y,  # Side: the one whose gradient this is, and the other one
    keep_ptr,
    weights_ptr,  # [G, 3, n] float32
    dz_ptr,  # [G, n, p] float32
    extra_ptr,  # [G, 3, n] float32
    n,
    asked,  # Asked
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr, OF_SIGMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(n, BM)
    g = (tl.program_id(0) // tiles).to(tl.int64)
    start_i = (tl.program_id(0) % tiles).to(tl.int64) * BM
    o_i = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    o_p = tl.arange(0, BP)
    m_i, m_p = o_i < n, o_p < x.width
    typical_x, typical_y = _typical(x, g), _typical(y, g)
    inside = tl.arange(0, BM)[:, None] * x.width + o_p[None, :]
    z = x.z + g * n * x.width
    b_i = to_tf32(tl.load(z + start_i * x.width + inside, mask=m_i[:, None] & m_p[None, :], other=0), PRECISION)
    acc = tl.zeros([BM, BP], tl.float32)
    sums = tl.zeros([BM], tl.float32)
    norms = tl.zeros([BM], tl.float32)
    dsigma = tl.zeros([BM], tl.float32)
    for start in range(0, n, BN):
        o_j = start + tl.arange(0, BN)
        m_j = o_j < n
        start_j = tl.cast(start, tl.int64)
        at_j = z + start_j * x.width + tl.arange(0, BN)[:, None] * x.width + o_p[None, :]
        b_j = to_tf32(tl.load(at_j, mask=m_j[:, None] & m_p[None, :], other=0), PRECISION)
        of_x = tl.dot(b_i, tl.trans(b_j), input_precision=PRECISION)
        t, K = _kernel_tile(of_x, x, typical_x, g, n, o_i, o_j, m_i, m_j, asked)
        of_y = _products(y, g, n, start_i, start_j, m_i, m_j, BM, BN, BK, PRECISION)
        _, L = _kernel_tile(of_y, y, typical_y, g, n, o_i, o_j, m_i, m_j, asked)
        counted = _counted(keep_ptr, g, n, o_i, o_j, m_i, m_j, asked)
        W, V, norm = _tile_weights(K, L, t, x, weights_ptr, g, n, o_i, o_j, m_i, m_j, counted, asked)
        V = to_tf32(V, PRECISION)
        sums += _row_sum(V, x)
        norms += norm
        if OF_SIGMA:
            dsigma += 0.5 * tl.sum(W * sigma_slope(x.map, g, t), axis=1)
        acc = tl.dot(V.to(x.z.dtype.element_ty), b_j, acc, input_precision=PRECISION)
    tl.store(dz_ptr + (g * n + start_i) * x.width + inside, acc, mask=m_i[:, None] & m_p[None, :])
    extra = extra_ptr + g * EXTRA * n
    tl.store(extra + ROW_SUM * n + o_i, sums, mask=m_i)
    tl.store(extra + NORM * n + o_i, norms, mask=m_i)
    tl.store(extra + SIGMA * n + o_i, dsigma, mask=m_i)


@triton.jit(do_not_specialize=["first", "rows"])
def weight_panel(
    x, y,  # Side
    keep_ptr, weights_ptr,
    panel_ptr,  # [rows, n] V of rows first .. first + rows of one group, in z's dtype
    extra_ptr,  # [T, 3, rows] float32, by column tile
    n, first, rows,
    asked,  # Asked
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, OF_SIGMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All pointers are those of the group; row tiles run fastest so that a column tile is read once by all of them."""
    blocks = tl.cdiv(rows, BM)
    local, j = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    start_i, start_j = (first + local * BM).to(tl.int64), (j * BN).to(tl.int64)
    o_r = local * BM + tl.arange(0, BM)
    o_i = first + o_r
    o_j = j * BN + tl.arange(0, BN)
    m_i, m_j = (o_r < rows) & (o_i < n), o_j < n
    of_x = _products(x, 0, n, start_i, start_j, m_i, m_j, BM, BN, BK, PRECISION)
    t, K = _kernel_tile(of_x, x, _typical(x, 0), 0, n, o_i, o_j, m_i, m_j, asked)
    of_y = _products(y, 0, n, start_i, start_j, m_i, m_j, BM, BN, BK, PRECISION)
    _, L = _kernel_tile(of_y, y, _typical(y, 0), 0, n, o_i, o_j, m_i, m_j, asked)
    counted = _counted(keep_ptr, 0, n, o_i, o_j, m_i, m_j, asked)
    W, V, norm = _tile_weights(K, L, t, x, weights_ptr, 0, n, o_i, o_j, m_i, m_j, counted, asked)
    out = panel_ptr + (local * BM).to(tl.int64) * n + j * BN
    out += tl.arange(0, BM)[:, None] * n + tl.arange(0, BN)[None, :]
    tl.store(out, V.to(panel_ptr.dtype.element_ty), mask=(o_r < rows)[:, None] & m_j[None, :])
    extra = extra_ptr + j * EXTRA * rows + o_r
    tl.store(extra + ROW_SUM * rows, _row_sum(V, x), mask=o_r < rows)
    if asked.row_norm:
        tl.store(extra + NORM * rows, norm, mask=o_r < rows)
    if OF_SIGMA:
        tl.store(extra + SIGMA * rows, 0.5 * tl.sum(W * sigma_slope(x.map, 0, t), axis=1), mask=o_r < rows)
