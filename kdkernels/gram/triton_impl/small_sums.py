# SPDX-License-Identifier: Apache-2.0
"""Up to 1024 samples: from products of pairs to the value and the pair weights of the gradient.

`row_sums` adds the splits in a fixed order, keeps t, and writes float64 row statistics of blocks of columns. `finish`
turns them into the value and the weights (`combine.py`, in Triton); where a program holds a group they are one launch.
Shapes as in `small_kernels.py`.
"""

import triton
import triton.language as tl

from ...triton_tf32 import INTERPRETED
from ..torch_impl import combine
from .maps import (
    LAPLACIAN,
    POLYNOMIAL,
    RBF,
    alpha_of,
    counting,
    kernel_argument,
    kernel_value,
    parameter,
    power,
    vector,
)
from .matrices import row_step
from .small_kernels import CKA, MSE, ROW_MSE, SAVED, SUM, TYPICAL, UNIT, Y_SIDE, E, F, P, Q, U, counted_pairs

# the arithmetic of `combine.py`, line for line; the interpreter calls Python as it is
_compiled = (lambda function: function) if INTERPRETED.value else triton.jit
_coefficients, _centred = _compiled(combine.coefficients), _compiled(combine.centred)
_plain_weights, _row_weights = _compiled(combine.plain_weights), _compiled(combine.row_weights)
AT_ONCE = tl.constexpr(8)  # splits that are read before any is added
STAT_ROWS = tl.constexpr(7)  # a, b, kk, kl, ll, rho_x, rho_y of `combine.py`


@triton.jit
def _sum_splits(ptr, step, offsets, mask, SPLITS: tl.constexpr):
    """In an order of its own, the same for every run; AT_ONCE loads do not wait for each other."""
    total = tl.load(ptr + offsets, mask=mask, other=0)
    for s in tl.static_range(1, min(SPLITS, AT_ONCE)):
        total += tl.load(ptr + s * step + offsets, mask=mask, other=0)
    if SPLITS > AT_ONCE:
        for first in range(AT_ONCE, SPLITS, AT_ONCE):
            part = tl.load(ptr + first * step + offsets, mask=mask, other=0)
            for s in tl.static_range(1, AT_ONCE):
                part += tl.load(ptr + (first + s) * step + offsets, mask=mask, other=0)
            total += part
    return total


@triton.jit
def _typical(side, g, square, count):
    """The mean squared distance from the reference row: where in k's range the pairs lie. 0 where no one asks."""
    total = 0.0
    if side.typical is not None:
        total = tl.load(side.typical + g)
    elif side.map.kind >= RBF:
        total = tl.sum(square) / count
    return total


@triton.jit
def _fold(x):
    """[M, N] as sums [M, N / 4] of what a thread holds: to the other lanes they go once, after the last tile."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 4, 4]), axis=2)


@triton.jit
def _rho(of, g, square):
    """1 / sqrt(K^_ii), 0 for a zero row."""
    k = square
    if of.kind >= RBF:
        k = square * 0 + of.count
    elif of.kind == POLYNOMIAL:
        k = power(parameter(of, g, 0) + parameter(of, g, 1) * square, of.degree)
    return tl.where(k == 0, 0.0, 1 / tl.sqrt(tl.where(k == 0, 1.0, k))).to(tl.float64)


@triton.jit(do_not_specialize=["G"])
def row_sums(
    x, y,  # Side
    part_ptr, square_ptr, keep_ptr,
    kept_ptr,  # [2, G, n, w] float32; part itself where there is one split
    stats_ptr,  # [column blocks, G, 7, n] float64; None: this program holds its group and finishes it
    value_ptr,  # [G] float32
    saved_ptr,  # [G, 14, n] float32
    unit_ptr,  # [2, G] float64 of prepared sides
    n, G,
    asked,  # Asked
    BM: tl.constexpr, BN: tl.constexpr, COLUMNS: tl.constexpr,  # of a program; BN at a time
    ROWS: tl.constexpr,  # a power of two from n on
    SPLITS: tl.constexpr,  # a power of two
):  # fmt: skip
    blocks, across = tl.cdiv(n, BM), tl.cdiv(n, COLUMNS)
    g = (tl.program_id(0) // (blocks * across)).to(tl.int64)
    block = tl.program_id(0) % (blocks * across)
    o_i, column = block // across * BM + tl.arange(0, BM), block % across
    m_i = o_i < n
    o_n = tl.arange(0, ROWS)
    keep_i, count = m_i, n * 1.0
    if keep_ptr is not None:
        keep_i = counting(keep_ptr + g * n, o_i, m_i)
        count = tl.maximum(tl.sum(vector(keep_ptr + g * n, o_n, o_n < n).to(tl.float32)), 1.0)
    width = row_step(n)
    nn = tl.cast(n, tl.int64) * width
    step, step_square = G * nn, tl.cast(G, tl.int64) * n
    part_x, part_y = part_ptr + g * nn, part_ptr + (SPLITS * G + g) * nn
    square_x, square_y = square_ptr + g * n, square_ptr + (SPLITS * G + g) * n
    typical_x, typical_y = 0.0, 0.0
    if x.map.kind >= RBF:
        typical_x = _typical(x, g, _sum_splits(square_x, step_square, o_n, o_n < n, SPLITS), count)
    if y.map.kind >= RBF:
        typical_y = _typical(y, g, _sum_splits(square_y, step_square, o_n, o_n < n, SPLITS), count)
    if saved_ptr is not None:
        if block == 0:
            tl.store(saved_ptr + (g * SAVED + TYPICAL) * n, typical_x)
            tl.store(saved_ptr + (g * SAVED + TYPICAL + 1) * n, typical_y)
    sx_i = _sum_splits(square_x, step_square, o_i, m_i, SPLITS)
    sy_i = _sum_splits(square_y, step_square, o_i, m_i, SPLITS)
    ax_i, ay_i = alpha_of(x, g, n, o_i, m_i), alpha_of(y, g, n, o_i, m_i)
    a = tl.zeros([BM, BN // 4], tl.float64)
    b, kk, kl, ll = a, a, a, a
    # all loads at once, but where square roots and exponentials want the registers
    SHORT: tl.constexpr = x.map.kind == LAPLACIAN or y.map.kind == LAPLACIAN
    for start in tl.range(0, COLUMNS, BN, loop_unroll_factor=1 if SHORT else COLUMNS // BN):
        o_j = column * COLUMNS + start + tl.arange(0, BN)
        m_j = o_j < n
        inside = m_i[:, None] & (o_j < width)[None, :]
        diagonal = o_i[:, None] == o_j[None, :]
        o_ij = o_i[:, None] * width + o_j[None, :]  # n <= 1024: one matrix fits 32 bits
        t_x = _sum_splits(part_x, step, o_ij, inside, SPLITS)
        t_y = _sum_splits(part_y, step, o_ij, inside, SPLITS)
        if x.map.kind >= RBF:
            sx_j = _sum_splits(square_x, step_square, o_j, m_j, SPLITS)
            t_x = kernel_argument(x.map, t_x, sx_i, sx_j, diagonal)
        if y.map.kind >= RBF:
            sy_j = _sum_splits(square_y, step_square, o_j, m_j, SPLITS)
            t_y = kernel_argument(y.map, t_y, sy_i, sy_j, diagonal)
        if kept_ptr is not None:  # which may be part: a linear t then stands there
            if SPLITS > 1 or x.map.kind >= RBF:
                tl.store(kept_ptr + g * nn + o_ij, t_x, mask=inside)
            if SPLITS > 1 or y.map.kind >= RBF:
                tl.store(kept_ptr + (G + g) * nn + o_ij, t_y, mask=inside)
        K = kernel_value(x.map, g, t_x, ax_i, alpha_of(x, g, n, o_j, m_j), typical_x, asked.stable)
        L = kernel_value(y.map, g, t_y, ay_i, alpha_of(y, g, n, o_j, m_j), typical_y, asked.stable)
        counted = counted_pairs(keep_ptr, g, n, o_j, m_j, keep_i, diagonal, asked)
        K = tl.where(counted, K, 0.0).to(tl.float64)
        L = tl.where(counted, L, 0.0).to(tl.float64)
        a += _fold(K)
        b += _fold(L)
        kk += _fold(K * K)
        kl += _fold((K - L) * (K - L)) if asked.stat == MSE else _fold(K * L)
        ll += _fold(L * L)
    a, b, kk, kl, ll = tl.sum(a, 1), tl.sum(b, 1), tl.sum(kk, 1), tl.sum(kl, 1), tl.sum(ll, 1)
    rho_x, rho_y = a, b
    if asked.row_norm:
        rho_x, rho_y = _rho(x.map, g, sx_i), _rho(y.map, g, sy_i)
    sums = a, b, kk, kl, ll, rho_x, rho_y
    if stats_ptr is None:
        _finish(sums, keep_i, keep_ptr is not None, o_i, m_i, g, n, G, value_ptr, saved_ptr, unit_ptr, asked)
    else:
        at = stats_ptr + (column * tl.cast(G, tl.int64) + g) * STAT_ROWS * n + o_i
        for k in tl.static_range(STAT_ROWS if asked.row_norm else STAT_ROWS - 2):
            tl.store(at + k * n, sums[k], mask=m_i)


@triton.jit
def _across(at, step, blocks, BLOCKS: tl.constexpr, o, m):
    """The sum over the column blocks of `row_sums`: as many as n rows have, BLOCKS at most."""
    total = vector(at, o, m)
    for k in tl.static_range(1, BLOCKS):
        total += vector(at + k * step, o, m & (k < blocks))
    return total


@triton.jit(do_not_specialize=["G"])
def finish(
    stats_ptr, keep_ptr, value_ptr, saved_ptr, unit_ptr, n, G, asked, BLOCK: tl.constexpr, COLUMNS: tl.constexpr
):
    g = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    m = o < n
    at, step = stats_ptr + g * STAT_ROWS * n, tl.cast(G, tl.int64) * STAT_ROWS * n
    keep = m if keep_ptr is None else counting(keep_ptr + g * n, o, m)
    most: tl.constexpr = (BLOCK + COLUMNS - 1) // COLUMNS
    blocks = tl.cdiv(n, COLUMNS)
    a, b = _across(at, step, blocks, most, o, m), _across(at + n, step, blocks, most, o, m)
    kk, kl = _across(at + 2 * n, step, blocks, most, o, m), _across(at + 3 * n, step, blocks, most, o, m)
    ll = _across(at + 4 * n, step, blocks, most, o, m)
    rho_x, rho_y = a, b
    if asked.row_norm:
        rho_x, rho_y = vector(at + 5 * n, o, m), vector(at + 6 * n, o, m)
    sums = a, b, kk, kl, ll, rho_x, rho_y
    _finish(sums, keep, keep_ptr is not None, o, m, g, n, G, value_ptr, saved_ptr, unit_ptr, asked)


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
def _added(a, b, c, d, e, f, g, h, a_, b_, c_, d_, e_, f_, g_, h_):
    return a + a_, b + b_, c + c_, d + d_, e + e_, f + f_, g + g_, h + h_


@triton.jit
def _finish(sums, keep, MASKED: tl.constexpr, o, m, g, n, G, value_ptr, saved_ptr, unit_ptr, asked):
    """`combine.combine` for one group held by one program; the letters and the order are the same."""
    a, b, kk, kl, ll, rho_x, rho_y = sums
    kept = tl.sum(keep.to(tl.float64)) if MASKED else tl.cast(n, tl.float64)
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
        if asked.row_norm:
            kl, kk, ll = rho_x * rho_y * kl, rho_x * rho_x * kk, rho_y * rho_y * ll
        # in one go, as each waits for all warps
        totals = tl.reduce((a, b, kl, kk, ll, a * b, a * a, b * b), 0, _added)
        total_a, total_b, s_kl, s_kk, s_ll, s_ab, s_aa, s_bb = totals
        h_kl = _centred(c, r, s, s_kl, s_ab, total_a, total_b)
        alpha, beta_x, beta_y = unit, nf * 0, nf * 0
        if asked.stat == CKA:
            h_kk = _centred(c, r, s, s_kk, s_aa, total_a, total_a)
            h_ll = _centred(c, r, s, s_ll, s_bb, total_b, total_b)
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
            u_x = a * (1 / others) - 0.5 * total_a / (others * nf)
            u_y = b * (1 / others) - 0.5 * total_b / (others * nf)
            e_x += 2 * p_x * u_y + 2 * q_x * u_x
            e_y += 2 * p_y * u_x + 2 * q_y * u_y
        f_x = rho_x if asked.row_norm else zero
        f_y = rho_y if asked.row_norm else zero
        at = saved_ptr + g * SAVED * n + o
        live = tl.where(enough, 1.0, 0.0).to(tl.float64)
        largest = tl.reduce((_size(keep, p_x, q_x, e_x), _size(keep, p_y, q_y, e_y)), 0, _larger)
        _save_side(at, at + UNIT * n, n, m, keep, u_x, p_x, q_x, e_x, f_x, live, largest[0])
        _save_side(at + Y_SIDE * n, at + (UNIT + 1) * n, n, m, keep, u_y, p_y, q_y, e_y, f_y, live, largest[1])


@triton.jit
def _size(keep, p, q, e):
    return tl.where(keep, 2 * tl.abs(p) + 2 * tl.abs(q) + 2 * tl.abs(e), 0.0)


@triton.jit
def _larger(a, b, a_, b_):
    return tl.maximum(a, a_), tl.maximum(b, b_)


@triton.jit
def _save_side(at, at_unit, n, m, keep, u, p, q, e, f, live, largest):
    """Weights divided by their largest, so that half-precision products of V neither overflow nor vanish."""
    unit = tl.where(largest == 0, 1.0, largest)
    tl.store(at + U * n, tl.where(keep, u, 0.0).to(tl.float32), mask=m)
    over = live / unit
    tl.store(at + P * n, (p * over).to(tl.float32), mask=m)
    tl.store(at + Q * n, (q * over).to(tl.float32), mask=m)
    tl.store(at + E * n, (e * over).to(tl.float32), mask=m)
    tl.store(at + F * n, f.to(tl.float32), mask=m)
    tl.store(at_unit, (tl.zeros_like(p) + unit).to(tl.float32), mask=m)
