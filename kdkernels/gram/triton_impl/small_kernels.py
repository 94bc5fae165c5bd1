# SPDX-License-Identifier: Apache-2.0
"""Up to 1024 samples: both sides' Gram matrices in one split-K launch, then one or two launches to value and weights.

1. `split_gram` reads x and y once and writes partial products t of both sides (no atomics).
2. `row_sums` adds the partials in a fixed order, keeps t, and writes float64 row statistics.
3. `finish` turns them into the value and the pair weights of the gradient (`combine.py`, in Triton); up to 128 samples
   one program holds a group and launches 2 and 3 are one. Backward: `small_gradient.py`.
Shapes: x [G, n, p], part [2, splits, G, n, w], square [2, splits, G, n], kept t [2, G, n, w], stats [G, 7, n] float64,
saved [G, 14, n] float32: the rows named below; w is n rounded up by `row_step`, and what lies beyond n is finite where
the rest of its row is. A pointer is None where there is nothing to read or to write.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...triton_tf32 import INTERPRETED, to_tf32
from ..torch_impl import combine
from .maps import POLYNOMIAL, RBF, Map, alpha_of, counting, kernel_argument, kernel_value, parameter, power, vector
from .matrices import row_step

CKA, HSIC, MSE, ROW_MSE, SUM = (tl.constexpr(k) for k in range(5))
STATS = {"cka": CKA, "hsic": HSIC, "mse": MSE, "row_mse": ROW_MSE, "sum": SUM}
# the arithmetic of `combine.py`, line for line; the interpreter calls Python as it is
_compiled = (lambda function: function) if INTERPRETED.value else triton.jit
_coefficients, _centred = _compiled(combine.coefficients), _compiled(combine.centred)
_plain_weights, _row_weights = _compiled(combine.plain_weights), _compiled(combine.row_weights)
STAT_ROWS = tl.constexpr(7)  # a, b, kk, kl, ll, rho_x, rho_y of `combine.py`
# rows of `saved`: five of x, the same five of y; then of x and of y the unit of the weights and a typical distance
SAVED = tl.constexpr(14)
U, P, Q, E, F = (tl.constexpr(k) for k in range(5))
Y_SIDE, UNIT, TYPICAL = tl.constexpr(5), tl.constexpr(10), tl.constexpr(12)


class Rows(NamedTuple):
    """Features of one side: the caller's own, or prepared ones."""

    ptr: torch.Tensor  # [G, n, width]
    step_g: int  # strides
    step_n: int
    step_p: int
    width: int
    shift: tl.constexpr  # the reference row is subtracted from all others


class Side(NamedTuple):
    map: Map
    alpha: torch.Tensor | None  # [G, n] of a polynomial
    typical: torch.Tensor | None  # [G] of a prepared distance


class Asked(NamedTuple):
    """The problem of a call, compiled in."""

    stat: tl.constexpr
    stable: tl.constexpr
    unbiased: tl.constexpr
    center: tl.constexpr
    row_norm: tl.constexpr
    mean: tl.constexpr
    minimum: tl.constexpr


@triton.jit
def load_rows(tile_ptr, ref_ptr, step_n, step_p, o_n, o_p, keep, m_p, SHIFT: tl.constexpr):
    """Rows as float32 z = x - x_ref (if SHIFT), halved for float16 so that no difference overflows.

    tile_ptr and ref_ptr are the tile's first element and the reference row at the tile's first column: the offsets
    inside a tile then fit 32 bits (the launcher sees to it), which is what leaves registers for the products.
    """
    b_x = tl.load(tile_ptr + o_n[:, None] * step_n + o_p[None, :] * step_p, mask=keep[:, None] & m_p[None, :], other=0)
    b_z = b_x.to(tl.float32)
    if SHIFT:
        half: tl.constexpr = tile_ptr.dtype.element_ty == tl.float16
        if half:
            b_z *= 0.5
        b_ref = tl.load(ref_ptr + o_p * step_p, mask=m_p, other=0).to(tl.float32)
        if half:
            b_ref *= 0.5
        b_z = tl.where(keep[:, None], b_z - b_ref[None, :], 0.0)
    return b_z


@triton.jit
def two_terms(b_z, like_ptr):
    """z as the sum of two half-precision terms: one alone would round a difference of rows, which no input holds."""
    b_high = b_z.to(like_ptr.dtype.element_ty)
    return b_high, (b_z - b_high.to(tl.float32)).to(like_ptr.dtype.element_ty)


@triton.jit
def _partial_product(
    x_ptr, step_n, step_p, i, j, keep_i, keep_j, ref, p, start, stop,
    BM: tl.constexpr, BK: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros([BM, BM], tl.float32)
    o_n, o_k = tl.arange(0, BM), tl.arange(0, BK)
    first = x_ptr + start.to(tl.int64) * step_p
    rows_i = first + (i * BM).to(tl.int64) * step_n
    rows_j = first + (j * BM).to(tl.int64) * step_n
    row_ref = first + ref.to(tl.int64) * step_n
    for k in range(start, stop, BK):
        m_k = k + o_k < p
        b_i = load_rows(rows_i, row_ref, step_n, step_p, o_n, o_k, keep_i, m_k, SHIFT)
        b_j = load_rows(rows_j, row_ref, step_n, step_p, o_n, o_k, keep_j, m_k, SHIFT)
        dtype = x_ptr.dtype.element_ty
        if SHIFT and dtype != tl.float32:
            high_i, low_i = two_terms(b_i, x_ptr)
            high_j, low_j = two_terms(b_j, x_ptr)
            acc = tl.dot(high_i, tl.trans(high_j), acc)
            acc = tl.dot(high_i, tl.trans(low_j), acc)
            acc = tl.dot(low_i, tl.trans(high_j), acc)
        else:
            b_i, b_j = to_tf32(b_i.to(dtype), PRECISION), to_tf32(b_j.to(dtype), PRECISION)
            acc = tl.dot(b_i, tl.trans(b_j), acc, input_precision=PRECISION)
        rows_i += BK * step_p
        rows_j += BK * step_p
        row_ref += BK * step_p
    if SHIFT and x_ptr.dtype.element_ty == tl.float16:
        acc *= 4
    return acc


@triton.jit(do_not_specialize=["G", "splits"])
def split_gram(
    x_ptr,  # [G, n, p], any strides; no tuples: with them the float16 kernel of sm_100 spills 48 bytes
    y_ptr,  # [G, n, q]
    part_ptr, square_ptr,
    keep_ptr,  # [G, n] uint8
    ref_ptr,  # [G] int64, the row subtracted from all others: the first that counts
    n, p, q, G, splits, x_g, x_n, x_p, y_g, y_n, y_p,
    per_x, per_y,  # columns of a split
    BM: tl.constexpr, BK: tl.constexpr, SHIFT_X: tl.constexpr, SHIFT_Y: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n, BM)
    tile, sg = tl.program_id(0) % (blocks * blocks), tl.program_id(0) // (blocks * blocks)
    i, j = tile // blocks, tile % blocks
    split = tl.program_id(1)
    side, g = sg // G, (sg % G).to(tl.int64)
    if j < i:
        return
    o_i = i * BM + tl.arange(0, BM)
    o_j = j * BM + tl.arange(0, BM)
    m_i, m_j = o_i < n, o_j < n
    keep_i, keep_j, ref = m_i, m_j, i * 0
    if keep_ptr is not None:
        keep_i, keep_j = counting(keep_ptr + g * n, o_i, m_i), counting(keep_ptr + g * n, o_j, m_j)
        ref = tl.load(ref_ptr + g)
    if side == 0:
        acc = _partial_product(
            x_ptr + g * x_g, x_n, x_p, i, j, keep_i, keep_j, ref, p, split * per_x,
            tl.minimum(split * per_x + per_x, p), BM, BK, SHIFT_X, PRECISION,
        )  # fmt: skip
    else:
        acc = _partial_product(
            y_ptr + g * y_g, y_n, y_p, i, j, keep_i, keep_j, ref, q, split * per_y,
            tl.minimum(split * per_y + per_y, q), BM, BK, SHIFT_Y, PRECISION,
        )  # fmt: skip
    slot = (side.to(tl.int64) * splits + split) * G + g
    width = row_step(n)
    out = part_ptr + slot * n * width
    tl.store(out + o_i[:, None] * width + o_j[None, :], acc, mask=m_i[:, None] & (o_j < width)[None, :])
    if i == j:
        square = tl.sum(tl.where(o_i[:, None] == o_j[None, :], acc, 0.0), axis=1)
        tl.store(square_ptr + slot * n + o_i, square, mask=m_i)
    else:
        tl.store(out + o_j[:, None] * width + o_i[None, :], tl.trans(acc), mask=m_j[:, None] & (o_i < width)[None, :])


@triton.jit
def _sum_splits(ptr, step, splits, offsets, mask):
    total = tl.load(ptr + offsets, mask=mask, other=0)
    for s in range(1, splits):
        total += tl.load(ptr + s * step + offsets, mask=mask, other=0)
    return total


@triton.jit
def _typical(side, g, square_ptr, step, splits, count, n, BN: tl.constexpr):
    """The mean squared distance from the reference row: where in k's range the pairs lie. 0 where no one asks."""
    total = 0.0
    if side.typical is not None:
        total = tl.load(side.typical + g)
    elif side.map.kind >= RBF:
        for start in range(0, n, BN):
            o_j = start + tl.arange(0, BN)
            total += tl.sum(_sum_splits(square_ptr, step, splits, o_j, o_j < n))
        total = total / count
    return total


@triton.jit
def _rho(of, g, square):
    """1 / sqrt(K^_ii), 0 for a zero row."""
    k = square
    if of.kind >= RBF:
        k = square * 0 + of.count
    elif of.kind == POLYNOMIAL:
        k = power(parameter(of, g, 0) + parameter(of, g, 1) * square, of.degree)
    return tl.where(k == 0, 0.0, 1 / tl.sqrt(tl.where(k == 0, 1.0, k))).to(tl.float64)


@triton.jit(do_not_specialize=["G", "splits"])
def row_sums(
    x, y,  # Side
    part_ptr, square_ptr, keep_ptr,
    kept_ptr,  # [2, G, n, w] float32
    stats_ptr,  # [G, 7, n] float64; None: this program holds its group and finishes it
    value_ptr,  # [G] float32
    saved_ptr,  # [G, 14, n] float32
    unit_ptr,  # [2, G] float64 of prepared sides
    n, G, splits,
    asked,  # Asked
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n, BM)
    g = (tl.program_id(0) // blocks).to(tl.int64)
    o_i = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    m_i = o_i < n
    keep_i = m_i
    count = n * 1.0
    if keep_ptr is not None:
        keep_i = counting(keep_ptr + g * n, o_i, m_i)
        count = 0.0
        for start in range(0, n, BN):
            o_j = start + tl.arange(0, BN)
            count += tl.sum(vector(keep_ptr + g * n, o_j, o_j < n).to(tl.float32))
        count = tl.maximum(count, 1.0)
    width = row_step(n)
    nn = tl.cast(n, tl.int64) * width
    step, step_square = G * nn, tl.cast(G, tl.int64) * n
    part_x, part_y = part_ptr + g * nn, part_ptr + (splits * G + g) * nn
    square_x, square_y = square_ptr + g * n, square_ptr + (splits * G + g) * n
    typical_x = _typical(x, g, square_x, step_square, splits, count, n, BN)
    typical_y = _typical(y, g, square_y, step_square, splits, count, n, BN)
    if saved_ptr is not None:
        if tl.program_id(0) % blocks == 0:
            tl.store(saved_ptr + (g * SAVED + TYPICAL) * n, typical_x)
            tl.store(saved_ptr + (g * SAVED + TYPICAL + 1) * n, typical_y)
    sx_i = _sum_splits(square_x, step_square, splits, o_i, m_i)
    sy_i = _sum_splits(square_y, step_square, splits, o_i, m_i)
    ax_i, ay_i = alpha_of(x, g, n, o_i, m_i), alpha_of(y, g, n, o_i, m_i)
    a = tl.zeros([BM], tl.float64)
    b, kk, kl, ll = a, a, a, a
    for start in range(0, n, BN):
        o_j = start + tl.arange(0, BN)
        m_j = o_j < n
        inside = m_i[:, None] & (o_j < width)[None, :]
        diagonal = o_i[:, None] == o_j[None, :]
        o_ij = o_i[:, None] * width + o_j[None, :]  # n <= 1024: one matrix fits 32 bits
        sx_j = _sum_splits(square_x, step_square, splits, o_j, m_j)
        sy_j = _sum_splits(square_y, step_square, splits, o_j, m_j)
        t_x = kernel_argument(x.map, _sum_splits(part_x, step, splits, o_ij, inside), sx_i, sx_j, diagonal)
        t_y = kernel_argument(y.map, _sum_splits(part_y, step, splits, o_ij, inside), sy_i, sy_j, diagonal)
        if saved_ptr is not None:
            tl.store(kept_ptr + g * nn + o_ij, t_x, mask=inside)
            tl.store(kept_ptr + (G + g) * nn + o_ij, t_y, mask=inside)
        K = kernel_value(x.map, g, t_x, ax_i, alpha_of(x, g, n, o_j, m_j), typical_x, asked.stable)
        L = kernel_value(y.map, g, t_y, ay_i, alpha_of(y, g, n, o_j, m_j), typical_y, asked.stable)
        counted = counted_pairs(keep_ptr, g, n, o_j, m_j, keep_i, diagonal, asked)
        K = tl.where(counted, K, 0.0).to(tl.float64)
        L = tl.where(counted, L, 0.0).to(tl.float64)
        a += tl.sum(K, axis=1)
        b += tl.sum(L, axis=1)
        kk += tl.sum(K * K, axis=1)
        kl += tl.sum((K - L) * (K - L), axis=1) if asked.stat == MSE else tl.sum(K * L, axis=1)
        ll += tl.sum(L * L, axis=1)
    rho_x, rho_y = a, b
    if asked.row_norm:
        rho_x, rho_y = _rho(x.map, g, sx_i), _rho(y.map, g, sy_i)
    sums = a, b, kk, kl, ll, rho_x, rho_y
    if stats_ptr is None:
        _finish(sums, keep_i, o_i, m_i, g, n, G, value_ptr, saved_ptr, unit_ptr, asked)
    else:
        for k in tl.static_range(STAT_ROWS if asked.row_norm else STAT_ROWS - 2):
            tl.store(stats_ptr + (g * STAT_ROWS + k) * n + o_i, sums[k], mask=m_i)


@triton.jit
def counted_pairs(keep_ptr, g, n, o_j, m_j, keep_i, diagonal, asked):
    """Which pairs of a tile enter the sums."""
    keep_j = m_j if keep_ptr is None else counting(keep_ptr + g * n, o_j, m_j)
    counted = keep_i[:, None] & keep_j[None, :]
    if asked.unbiased:
        counted = counted & (diagonal == 0)
    return counted


@triton.jit(do_not_specialize=["G"])
def finish(stats_ptr, keep_ptr, value_ptr, saved_ptr, unit_ptr, n, G, asked, BLOCK: tl.constexpr):
    g = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    m = o < n
    at = stats_ptr + g * STAT_ROWS * n
    keep = m if keep_ptr is None else counting(keep_ptr + g * n, o, m)
    a, b = vector(at, o, m), vector(at + n, o, m)
    kk, kl, ll = vector(at + 2 * n, o, m), vector(at + 3 * n, o, m), vector(at + 4 * n, o, m)
    rho_x, rho_y = a, b
    if asked.row_norm:
        rho_x, rho_y = vector(at + 5 * n, o, m), vector(at + 6 * n, o, m)
    _finish((a, b, kk, kl, ll, rho_x, rho_y), keep, o, m, g, n, G, value_ptr, saved_ptr, unit_ptr, asked)


@triton.jit
def _weights(c, r, s, alpha, beta, own, other, own_total, other_total, rho_own, rho_other, asked):
    """(p, q, e) of one side."""
    if asked.row_norm:  # never centred here: no additive terms
        p, q = _row_weights(c, alpha, beta, rho_own, rho_other)
        e = tl.zeros_like(own)
    else:
        p, q, e = _plain_weights(c, r, s, alpha, beta, own, other, own_total, other_total)
        p, q = tl.zeros_like(own) + p, tl.zeros_like(own) + q
    return p, q, e


@triton.jit
def _finish(sums, keep, o, m, g, n, G, value_ptr, saved_ptr, unit_ptr, asked):
    """`combine.combine` for one group held by one program; the letters and the order are the same."""
    a, b, kk, kl, ll, rho_x, rho_y = sums
    kept = tl.sum(keep.to(tl.float64))
    nf = tl.maximum(kept, asked.minimum * 1.0)
    unit = nf * 0 + 1.0
    if unit_ptr is not None:
        unit_x, unit_y = tl.load(unit_ptr + g), tl.load(unit_ptr + G + g)
        unit = tl.sqrt(unit_x) * tl.sqrt(unit_y) if asked.row_norm else unit_x * unit_y
    zero = tl.zeros_like(a)
    one = zero + 1.0
    q_x, e_x, q_y, e_y = zero, zero, zero, zero
    if asked.stat == MSE or asked.stat == ROW_MSE:
        w = one / (nf * nf) if asked.mean else one
        cross, q_x, q_y = one, 2 * w, 2 * w
        if asked.stat == MSE:
            value = tl.sum(w * kl)
        else:
            kk_safe = tl.where(kk == 0, 1.0, kk)
            ll_safe = tl.where(ll == 0, 1.0, ll)
            cross = tl.where((kk == 0) | (ll == 0), 0.0, 1 / (tl.sqrt(kk_safe) * tl.sqrt(ll_safe)))
            cos = kl * cross
            value = tl.sum(w * (tl.where(kk > 0, 1.0, 0.0) + tl.where(ll > 0, 1.0, 0.0) - 2 * cos))
            q_x, q_y = 2 * w * cos / kk_safe, 2 * w * cos / ll_safe
        p_x = -2 * w * cross
        p_y = p_x
    elif asked.stat == SUM:
        value = tl.sum(kl) * unit
        p_x = one if unit_ptr is None else one * unit_y  # unit_x is in the scale of x's gradient: `prepare`
        p_y = p_x
    else:
        c, r, s = _coefficients(tl.maximum(nf, 2.0), asked.unbiased, asked.center)
        total_a, total_b = tl.sum(a), tl.sum(b)
        s_kl, s_kk, s_ll = tl.sum(kl), tl.sum(kk), tl.sum(ll)
        if asked.row_norm:
            s_kl, s_kk, s_ll = tl.sum(rho_x * rho_y * kl), tl.sum(rho_x * rho_x * kk), tl.sum(rho_y * rho_y * ll)
        h_kl = _centred(c, r, s, s_kl, tl.sum(a * b), total_a, total_b)
        alpha, beta_x, beta_y = unit, nf * 0, nf * 0
        if asked.stat == CKA:
            h_kk = _centred(c, r, s, s_kk, tl.sum(a * a), total_a, total_a)
            h_ll = _centred(c, r, s, s_ll, tl.sum(b * b), total_b, total_b)
            floor = 9.094947017729282e-13 * c  # (8 eps)^2 of float32
            undefined = (h_kk <= floor * s_kk) | (h_ll <= floor * s_ll)
            h_kk, h_ll = tl.where(undefined, 1.0, h_kk), tl.where(undefined, 1.0, h_ll)
            alpha = tl.where(undefined, 0.0, 1 / (tl.sqrt(h_kk) * tl.sqrt(h_ll)))
            beta_x, beta_y = -h_kl * alpha / h_kk, -h_kl * alpha / h_ll
        value = h_kl * alpha
        p_x, q_x, e_x = _weights(c, r, s, alpha, beta_x, a, b, total_a, total_b, rho_x, rho_y, asked)
        p_y, q_y, e_y = _weights(c, r, s, alpha, beta_y, b, a, total_b, total_a, rho_y, rho_x, asked)
    enough = kept >= asked.minimum
    tl.store(value_ptr + g, tl.where(enough, value, 0.0).to(tl.float32))
    if saved_ptr is not None:
        u_x, u_y = zero, zero
        if asked.stable:  # the weights then act on K - u_i - u_j, with u the row means: nothing is left to cancel
            others = nf - 1 if asked.unbiased else nf
            u_x = a / others - 0.5 * tl.sum(a) / (others * nf)
            u_y = b / others - 0.5 * tl.sum(b) / (others * nf)
            e_x += 2 * p_x * u_y + 2 * q_x * u_x
            e_y += 2 * p_y * u_x + 2 * q_y * u_y
        f_x = rho_x if asked.row_norm else zero
        f_y = rho_y if asked.row_norm else zero
        at = saved_ptr + g * SAVED * n + o
        live = tl.where(enough, 1.0, 0.0).to(tl.float64)
        _save_side(at, at + UNIT * n, n, m, keep, u_x, p_x, q_x, e_x, f_x, live)
        _save_side(at + Y_SIDE * n, at + (UNIT + 1) * n, n, m, keep, u_y, p_y, q_y, e_y, f_y, live)


@triton.jit
def _save_side(at, at_unit, n, m, keep, u, p, q, e, f, live):
    """Weights divided by their largest, so that half-precision products of V neither overflow nor vanish."""
    size = 2 * tl.abs(p) + 2 * tl.abs(q) + 2 * tl.abs(e)
    largest = tl.max(tl.where(keep, size, 0.0))
    unit = tl.where(largest == 0, 1.0, largest)
    tl.store(at + U * n, tl.where(keep, u, 0.0).to(tl.float32), mask=m)
    tl.store(at + P * n, (p / unit * live).to(tl.float32), mask=m)
    tl.store(at + Q * n, (q / unit * live).to(tl.float32), mask=m)
    tl.store(at + E * n, (e / unit * live).to(tl.float32), mask=m)
    tl.store(at + F * n, f.to(tl.float32), mask=m)
    tl.store(at_unit, (tl.zeros_like(p) + unit).to(tl.float32), mask=m)
