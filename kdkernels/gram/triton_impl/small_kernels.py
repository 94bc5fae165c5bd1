# SPDX-License-Identifier: Apache-2.0. Over 400 lines: the launches of one schedule, in the order in which they run.
"""Up to 1024 samples: both sides' Gram matrices in one split-K launch, then one or two launches to value and weights.

1. `split_gram` reads x and y once and writes partial products t of both sides (no atomics).
2. `row_sums` adds the partials in a fixed order, keeps t, and writes float64 row statistics.
3. `finish` turns them into the value and the pair weights of the gradient (`combine.py`, in Triton); up to 128 samples
   one program holds a group and launches 2 and 3 are one.
Backward: `weighted_rows`, one launch a side: V = (c_ij + c_ji) dK/dg formed on the fly, times the rows.
Shapes: x [G, n, p], part [2, splits, G, n, n], square [2, splits, G, n], kept t [2, G, n, n], stats [G, 7, n] float64,
rows [G, 14, n] = u, p, q, e, f of x, the same of y, then of x and y the scale of the weights and a typical distance.
"""

import triton
import triton.language as tl

from .maps import RBF, kernel_slope, kernel_value, pair_weights, sigma_slope, tile_product

CKA, HSIC, MSE, ROW_MSE, SUM = (tl.constexpr(k) for k in range(5))
STATS = {"cka": 0, "hsic": 1, "mse": 2, "row_mse": 3, "sum": 4}


@triton.jit
def load_rows(
    tile_ptr, ref_ptr, o_n, o_p, m_n, m_p, stride_n, stride_p, keep,
    SHIFT: tl.constexpr, MASK: tl.constexpr, HALVE: tl.constexpr,
):  # fmt: skip
    """Rows as float32 z = x - x_ref (if SHIFT), halved for float16 so that no difference overflows.

    tile_ptr and ref_ptr are the tile's first element and the reference row at the tile's first column: the offsets
    inside a tile then fit 32 bits (the launcher sees to it), which is what leaves registers for the products.
    """
    b_x = tl.load(
        tile_ptr + o_n[:, None] * stride_n + o_p[None, :] * stride_p, mask=m_n[:, None] & m_p[None, :], other=0
    )
    b_z = b_x.to(tl.float32)
    if HALVE:
        b_z *= 0.5
    if SHIFT:
        b_ref = tl.load(ref_ptr + o_p * stride_p, mask=m_p, other=0).to(tl.float32)
        if HALVE:
            b_ref *= 0.5
        b_z = tl.where(m_n[:, None], b_z - b_ref[None, :], 0.0)
    if MASK:
        b_z = tl.where(keep[:, None], b_z, 0.0)
    return b_z


@triton.jit
def two_terms(b_z, like_ptr):
    """z as the sum of two half-precision terms: one alone would round a difference of rows, which no input holds."""
    b_high = b_z.to(like_ptr.dtype.element_ty)
    return b_high, (b_z - b_high.to(tl.float32)).to(like_ptr.dtype.element_ty)


@triton.jit
def _partial_product(
    x_ptr, stride_n, stride_p, i, j, m_i, m_j, keep_i, keep_j, ref, p, start, stop,
    BM: tl.constexpr, BK: tl.constexpr, SHIFT: tl.constexpr, MASK: tl.constexpr, HALVE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros([BM, BM], tl.float32)
    o_n, o_k = tl.arange(0, BM), tl.arange(0, BK)
    first = x_ptr + start.to(tl.int64) * stride_p
    rows_i = first + (i * BM).to(tl.int64) * stride_n
    rows_j = first + (j * BM).to(tl.int64) * stride_n
    row_ref = first + ref.to(tl.int64) * stride_n
    for k in range(start, stop, BK):
        m_k = k + o_k < p
        b_i = load_rows(rows_i, row_ref, o_n, o_k, m_i, m_k, stride_n, stride_p, keep_i, SHIFT, MASK, HALVE)
        b_j = load_rows(rows_j, row_ref, o_n, o_k, m_j, m_k, stride_n, stride_p, keep_j, SHIFT, MASK, HALVE)
        dtype = x_ptr.dtype.element_ty
        if SHIFT and dtype != tl.float32:
            high_i, low_i = two_terms(b_i, x_ptr)
            high_j, low_j = two_terms(b_j, x_ptr)
            acc = tl.dot(high_i, tl.trans(high_j), acc)
            acc = tl.dot(high_i, tl.trans(low_j), acc)
            acc = tl.dot(low_i, tl.trans(high_j), acc)
        else:
            acc = tl.dot(b_i.to(dtype), tl.trans(b_j.to(dtype)), acc, input_precision=PRECISION)
        rows_i += BK * stride_p
        rows_j += BK * stride_p
        row_ref += BK * stride_p
    if HALVE:
        acc *= 4
    return acc


@triton.jit(do_not_specialize=["G", "splits"])
def split_gram(
    x_ptr,  # [G, n, p], any strides
    y_ptr,  # [G, n, q]
    part_ptr,  # [2, splits, G, n, n] float32
    square_ptr,  # [2, splits, G, n] float32
    mask_ptr,  # [G, n] uint8
    ref_ptr,  # [G] int64, the row subtracted from all others
    n, p, q, G, splits, x_g, x_n, x_p, y_g, y_n, y_p, per_x, per_y,
    BM: tl.constexpr, BK: tl.constexpr, SHIFT_X: tl.constexpr, SHIFT_Y: tl.constexpr, MASK: tl.constexpr,
    HALVE_X: tl.constexpr, HALVE_Y: tl.constexpr, PRECISION: tl.constexpr,
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
    if MASK:
        keep_i = tl.load(mask_ptr + g * n + o_i, mask=m_i, other=0) != 0
        keep_j = tl.load(mask_ptr + g * n + o_j, mask=m_j, other=0) != 0
        ref = tl.load(ref_ptr + g)
    if side == 0:
        acc = _partial_product(
            x_ptr + g * x_g, x_n, x_p, i, j, m_i, m_j, keep_i, keep_j, ref, p,
            split * per_x, tl.minimum(split * per_x + per_x, p), BM, BK, SHIFT_X, MASK, HALVE_X, PRECISION,
        )  # fmt: skip
    else:
        acc = _partial_product(
            y_ptr + g * y_g, y_n, y_p, i, j, m_i, m_j, keep_i, keep_j, ref, q,
            split * per_y, tl.minimum(split * per_y + per_y, q), BM, BK, SHIFT_Y, MASK, HALVE_Y, PRECISION,
        )  # fmt: skip
    slot = (side.to(tl.int64) * splits + split) * G + g
    out = part_ptr + slot * n * n
    tl.store(out + o_i[:, None] * n + o_j[None, :], acc, mask=m_i[:, None] & m_j[None, :])
    if i == j:
        square = tl.sum(tl.where(o_i[:, None] == o_j[None, :], acc, 0.0), axis=1)
        tl.store(square_ptr + slot * n + o_i, square, mask=m_i)
    else:
        tl.store(out + o_j[:, None] * n + o_i[None, :], tl.trans(acc), mask=m_j[:, None] & m_i[None, :])


@triton.jit
def _sum_splits(ptr, step, splits, offsets, mask):
    total = tl.load(ptr + offsets, mask=mask, other=0)
    for s in range(1, splits):
        total += tl.load(ptr + s * step + offsets, mask=mask, other=0)
    return total


@triton.jit
def _typical(square_ptr, step, splits, count, n, BN: tl.constexpr):
    """The mean squared distance from the reference row: where in k's range the pairs lie."""
    total = 0.0
    for start in range(0, n, BN):
        o_j = start + tl.arange(0, BN)
        total += tl.sum(_sum_splits(square_ptr, step, splits, o_j, o_j < n))
    return total / count


@triton.jit
def _rho(square, par, alpha, KIND: tl.constexpr, DEGREE: tl.constexpr, S: tl.constexpr):
    """1 / sqrt(K^_ii), 0 for a zero row."""
    if KIND >= RBF:
        k = square * 0 + S
    elif KIND == 1:
        t0, a = tl.load(par), tl.load(par + 1)
        k = t0 + a * square
        y = k * 0 + 1.0
        for _ in tl.static_range(DEGREE):
            y = y * k
        k = y
    else:
        k = square
    return tl.where(k == 0, 0.0, 1 / tl.sqrt(tl.where(k == 0, 1.0, k)))


@triton.jit
def _store_stats(stats_ptr, n, o_i, m_i, a, b, kk, kl, ll, rho_x, rho_y, ROW_NORM: tl.constexpr):
    tl.store(stats_ptr + o_i, a, mask=m_i)
    tl.store(stats_ptr + n + o_i, b, mask=m_i)
    tl.store(stats_ptr + 2 * n + o_i, kk, mask=m_i)
    tl.store(stats_ptr + 3 * n + o_i, kl, mask=m_i)
    tl.store(stats_ptr + 4 * n + o_i, ll, mask=m_i)
    if ROW_NORM:
        tl.store(stats_ptr + 5 * n + o_i, rho_x, mask=m_i)
        tl.store(stats_ptr + 6 * n + o_i, rho_y, mask=m_i)


@triton.jit(do_not_specialize=["G", "splits"])
def row_sums(
    part_ptr, square_ptr, mask_ptr, alpha_x_ptr, alpha_y_ptr, par_x_ptr, par_y_ptr, typical_x_ptr, typical_y_ptr,
    kept_ptr,  # [2, G, n, n] float32
    stats_ptr,  # [G, 7, n] float64
    value_ptr,  # [G] float32
    rows_ptr,  # [G, 14, n] float32
    unit_ptr,  # [2, G] float64
    n, G, splits, par_x_g, par_y_g, sigma_x, sigma_y,
    BM: tl.constexpr, BN: tl.constexpr,
    KIND_X: tl.constexpr, DEGREE_X: tl.constexpr, S_X: tl.constexpr, HAS_PAR_X: tl.constexpr,
    KIND_Y: tl.constexpr, DEGREE_Y: tl.constexpr, S_Y: tl.constexpr, HAS_PAR_Y: tl.constexpr,
    STAT: tl.constexpr, STABLE: tl.constexpr, UNBIASED: tl.constexpr, CENTER: tl.constexpr, ROW_NORM: tl.constexpr,
    MEAN: tl.constexpr, MASK: tl.constexpr, PREPARED: tl.constexpr, KEEP: tl.constexpr, FUSED: tl.constexpr,
    MINIMUM: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n, BM)
    g = (tl.program_id(0) // blocks).to(tl.int64)
    o_i = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    m_i = o_i < n
    keep_i = m_i
    count = n * 1.0
    if MASK:
        keep_i = tl.load(mask_ptr + g * n + o_i, mask=m_i, other=0) != 0
        count = 0.0
        for start in range(0, n, BN):
            o_j = start + tl.arange(0, BN)
            count += tl.sum(tl.load(mask_ptr + g * n + o_j, mask=o_j < n, other=0).to(tl.float32))
        count = tl.maximum(count, 1.0)
    nn = tl.cast(n, tl.int64) * n
    step, step_square = G * nn, tl.cast(G, tl.int64) * n
    part_x, part_y = part_ptr + g * nn, part_ptr + (splits * G + g) * nn
    square_x, square_y = square_ptr + g * n, square_ptr + (splits * G + g) * n
    par_x, par_y = par_x_ptr + g * par_x_g, par_y_ptr + g * par_y_g
    if PREPARED:
        typical_x, typical_y = tl.load(typical_x_ptr + g), tl.load(typical_y_ptr + g)
    else:
        typical_x, typical_y = 0.0, 0.0
        if KIND_X >= RBF:
            typical_x = _typical(square_x, step_square, splits, count, n, BN)
        if KIND_Y >= RBF:
            typical_y = _typical(square_y, step_square, splits, count, n, BN)
    if KEEP:
        if tl.program_id(0) % blocks == 0:
            tl.store(rows_ptr + (g * 14 + 12) * n, typical_x)
            tl.store(rows_ptr + (g * 14 + 13) * n, typical_y)
    sx_i = _sum_splits(square_x, step_square, splits, o_i, m_i)
    sy_i = _sum_splits(square_y, step_square, splits, o_i, m_i)
    ax_i = tl.load(alpha_x_ptr + g * n + o_i, mask=m_i, other=0) if KIND_X == 1 else sx_i
    ay_i = tl.load(alpha_y_ptr + g * n + o_i, mask=m_i, other=0) if KIND_Y == 1 else sy_i
    a = tl.zeros([BM], tl.float64)
    b, kk, kl, ll = a, a, a, a
    for start in range(0, n, BN):
        o_j = start + tl.arange(0, BN)
        m_j = o_j < n
        inside = m_i[:, None] & m_j[None, :]
        diagonal = o_i[:, None] == o_j[None, :]
        o_ij = o_i[:, None] * n + o_j[None, :]  # n <= 1024: one matrix fits 32 bits
        sx_j = _sum_splits(square_x, step_square, splits, o_j, m_j)
        sy_j = _sum_splits(square_y, step_square, splits, o_j, m_j)
        ax_j = tl.load(alpha_x_ptr + g * n + o_j, mask=m_j, other=0) if KIND_X == 1 else sx_j
        ay_j = tl.load(alpha_y_ptr + g * n + o_j, mask=m_j, other=0) if KIND_Y == 1 else sy_j
        t_x = tile_product(_sum_splits(part_x, step, splits, o_ij, inside), sx_i, sx_j, diagonal, KIND_X)
        t_y = tile_product(_sum_splits(part_y, step, splits, o_ij, inside), sy_i, sy_j, diagonal, KIND_Y)
        if KEEP:
            tl.store(kept_ptr + g * nn + o_ij, t_x, mask=inside)
            tl.store(kept_ptr + (G + g) * nn + o_ij, t_y, mask=inside)
        K = kernel_value(t_x, ax_i, ax_j, par_x, sigma_x, typical_x, KIND_X, DEGREE_X, S_X, HAS_PAR_X, STABLE)
        L = kernel_value(t_y, ay_i, ay_j, par_y, sigma_y, typical_y, KIND_Y, DEGREE_Y, S_Y, HAS_PAR_Y, STABLE)
        counted = inside
        if MASK:
            keep_j = tl.load(mask_ptr + g * n + o_j, mask=m_j, other=0) != 0
            counted = keep_i[:, None] & keep_j[None, :]
        if UNBIASED:
            counted = counted & (o_i[:, None] != o_j[None, :])
        K = tl.where(counted, K, 0.0).to(tl.float64)
        L = tl.where(counted, L, 0.0).to(tl.float64)
        a += tl.sum(K, axis=1)
        b += tl.sum(L, axis=1)
        kk += tl.sum(K * K, axis=1)
        kl += tl.sum((K - L) * (K - L), axis=1) if STAT == MSE else tl.sum(K * L, axis=1)
        ll += tl.sum(L * L, axis=1)
    rho_x, rho_y = a, a
    if ROW_NORM:
        rho_x = _rho(sx_i, par_x, ax_i, KIND_X, DEGREE_X, S_X).to(tl.float64)
        rho_y = _rho(sy_i, par_y, ay_i, KIND_Y, DEGREE_Y, S_Y).to(tl.float64)
    if FUSED:
        _finish(
            a, b, kk, kl, ll, rho_x, rho_y, keep_i, o_i, m_i, g, G, n, value_ptr, rows_ptr, unit_ptr,
            STAT, UNBIASED, CENTER, ROW_NORM, STABLE, MEAN, MASK, PREPARED, KEEP, MINIMUM,
        )  # fmt: skip
    else:
        _store_stats(stats_ptr + g * 7 * n, n, o_i, m_i, a, b, kk, kl, ll, rho_x, rho_y, ROW_NORM)


@triton.jit(do_not_specialize=["G"])
def finish(
    stats_ptr, mask_ptr, value_ptr, rows_ptr, unit_ptr, n, G,
    BLOCK: tl.constexpr, STAT: tl.constexpr, STABLE: tl.constexpr, UNBIASED: tl.constexpr, CENTER: tl.constexpr,
    ROW_NORM: tl.constexpr, MEAN: tl.constexpr, MASK: tl.constexpr, PREPARED: tl.constexpr, KEEP: tl.constexpr,
    MINIMUM: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    m = o < n
    at = stats_ptr + g * 7 * n + o
    keep = m
    if MASK:
        keep = tl.load(mask_ptr + g * n + o, mask=m, other=0) != 0
    a = tl.load(at, mask=m, other=0)
    b = tl.load(at + n, mask=m, other=0)
    kk = tl.load(at + 2 * n, mask=m, other=0)
    kl = tl.load(at + 3 * n, mask=m, other=0)
    ll = tl.load(at + 4 * n, mask=m, other=0)
    rho_x, rho_y = a, b
    if ROW_NORM:
        rho_x = tl.load(at + 5 * n, mask=m, other=0)
        rho_y = tl.load(at + 6 * n, mask=m, other=0)
    _finish(
        a, b, kk, kl, ll, rho_x, rho_y, keep, o, m, g, G, n, value_ptr, rows_ptr, unit_ptr,
        STAT, UNBIASED, CENTER, ROW_NORM, STABLE, MEAN, MASK, PREPARED, KEEP, MINIMUM,
    )  # fmt: skip


@triton.jit
def _hsic(total, u, v, r, s):
    """S_KL - r a.b + s A B"""
    return total - r * tl.sum(u * v) + s * tl.sum(u) * tl.sum(v)


@triton.jit
def _finish(
    a, b, kk, kl, ll, rho_x, rho_y, keep, o, m, g, G, n, value_ptr, rows_ptr, unit_ptr,
    STAT: tl.constexpr, UNBIASED: tl.constexpr, CENTER: tl.constexpr, ROW_NORM: tl.constexpr, STABLE: tl.constexpr,
    MEAN: tl.constexpr, MASK: tl.constexpr, PREPARED: tl.constexpr, KEEP: tl.constexpr, MINIMUM: tl.constexpr,
):  # fmt: skip
    """`combine.combine` for one group held by one program; the letters and the order are the same."""
    kept = tl.sum(keep.to(tl.float64))
    nf = tl.maximum(kept, MINIMUM * 1.0)
    unit_x, unit_y = nf * 0 + 1.0, nf * 0 + 1.0
    if PREPARED:
        unit_x, unit_y = tl.load(unit_ptr + g), tl.load(unit_ptr + G + g)
        if ROW_NORM:
            unit_x, unit_y = tl.sqrt(unit_x), tl.sqrt(unit_y)
    zero = tl.zeros_like(a)
    one = zero + 1.0
    pair_minimum = tl.maximum(nf, 2.0)
    c, r, s = 1 / ((pair_minimum - 1) * (pair_minimum - 1)), nf * 0, nf * 0
    if UNBIASED:
        c, r, s = 1 / (nf * (nf - 3)), 2 / (nf - 2), 1 / ((nf - 1) * (nf - 2))
    elif CENTER:
        r, s = 2 / nf, 1 / (nf * nf)
    f_x, f_y = zero, zero
    if STAT == MSE:
        w = one / (nf * nf) if MEAN else one
        value = tl.sum(w * kl)
        p_x, q_x, e_x, p_y, q_y, e_y = -2 * w, 2 * w, zero, -2 * w, 2 * w, zero
    elif STAT == ROW_MSE:
        w = one / (nf * nf) if MEAN else one
        kk_safe = tl.where(kk == 0, 1.0, kk)
        ll_safe = tl.where(ll == 0, 1.0, ll)
        cross = tl.where((kk == 0) | (ll == 0), 0.0, 1 / (tl.sqrt(kk_safe) * tl.sqrt(ll_safe)))
        cos = kl * cross
        value = tl.sum(w * (tl.where(kk > 0, 1.0, 0.0) + tl.where(ll > 0, 1.0, 0.0) - 2 * cos))
        p_x, q_x, e_x = -2 * w * cross, 2 * w * cos / kk_safe, zero
        p_y, q_y, e_y = -2 * w * cross, 2 * w * cos / ll_safe, zero
    elif STAT == SUM:
        value = tl.sum(kl) * unit_x * unit_y
        p_x, q_x, e_x = one * (unit_x * unit_y), zero, zero
        p_y, q_y, e_y = p_x, zero, zero
    else:
        s_kl, s_kk, s_ll = tl.sum(kl), tl.sum(kk), tl.sum(ll)
        if ROW_NORM:
            s_kl, s_kk, s_ll = tl.sum(rho_x * rho_y * kl), tl.sum(rho_x * rho_x * kk), tl.sum(rho_y * rho_y * ll)
        h_kl = c * _hsic(s_kl, a, b, r, s)
        if STAT == CKA:
            h_kk = c * _hsic(s_kk, a, a, r, s)
            h_ll = c * _hsic(s_ll, b, b, r, s)
            floor = 9.094947017729282e-13 * c  # (8 eps)^2 of float32
            undefined = (h_kk <= floor * s_kk) | (h_ll <= floor * s_ll)
            h_kk, h_ll = tl.where(undefined, 1.0, h_kk), tl.where(undefined, 1.0, h_ll)
            alpha = tl.where(undefined, 0.0, 1 / (tl.sqrt(h_kk) * tl.sqrt(h_ll)))
            value = h_kl * alpha
            beta_x, beta_y = -value / h_kk, -value / h_ll
        else:
            alpha, beta_x, beta_y = unit_x * unit_y, nf * 0, nf * 0
            value = h_kl * alpha
        if ROW_NORM:  # never centred here: no additive terms
            p_x, q_x, e_x = c * alpha * rho_x * rho_y, c * beta_x * rho_x * rho_x, zero
            p_y, q_y, e_y = p_x, c * beta_y * rho_y * rho_y, zero
            f_x, f_y = rho_x, rho_y
        else:
            sums_x, sums_y = alpha * b + beta_x * a, alpha * a + beta_y * b
            p_x, q_x, p_y, q_y = one * (c * alpha), one * (c * beta_x), one * (c * alpha), one * (c * beta_y)
            e_x = c * (s * tl.sum(sums_x) - r * sums_x)
            e_y = c * (s * tl.sum(sums_y) - r * sums_y)
    enough = kept >= MINIMUM
    tl.store(value_ptr + g, tl.where(enough, value, 0.0).to(tl.float32))
    if KEEP:
        u_x, u_y = zero, zero
        if STABLE:  # the weights then act on K - u_i - u_j, with u the row means: nothing is left to cancel
            others = nf - 1 if UNBIASED else nf
            u_x = a / others - 0.5 * tl.sum(a) / (others * nf)
            u_y = b / others - 0.5 * tl.sum(b) / (others * nf)
            e_x += 2 * p_x * u_y + 2 * q_x * u_x
            e_y += 2 * p_y * u_x + 2 * q_y * u_y
        at = rows_ptr + g * 14 * n + o
        live = tl.where(enough, 1.0, 0.0).to(tl.float64)
        _store_side(at, at + 10 * n, n, m, keep, u_x, p_x, q_x, e_x, f_x, live)
        _store_side(at + 5 * n, at + 11 * n, n, m, keep, u_y, p_y, q_y, e_y, f_y, live)


@triton.jit
def _store_side(at, at_scale, n, m, keep, u, p, q, e, f, live):
    """Weights divided by their largest, so that half-precision products of V neither overflow nor vanish."""
    size = 2 * tl.abs(p) + 2 * tl.abs(q) + 2 * tl.abs(e)
    largest = tl.max(tl.where(keep, size, 0.0))
    scale = tl.where(largest == 0, 1.0, largest)
    tl.store(at, tl.where(keep, u, 0.0).to(tl.float32), mask=m)
    tl.store(at + n, (p / scale * live).to(tl.float32), mask=m)
    tl.store(at + 2 * n, (q / scale * live).to(tl.float32), mask=m)
    tl.store(at + 3 * n, (e / scale * live).to(tl.float32), mask=m)
    tl.store(at + 4 * n, f.to(tl.float32), mask=m)
    tl.store(at_scale, (tl.zeros_like(p) + scale).to(tl.float32), mask=m)


@triton.jit(do_not_specialize=["G", "own"])
def weighted_rows(
    x_ptr, grad_ptr, kept_ptr, rows_ptr, mask_ptr, ref_ptr, alpha_x_ptr, alpha_y_ptr, par_x_ptr, par_y_ptr,
    dx_ptr,  # [G, n, p] the gradient, or float32 dz of a PREPARED side
    sums_ptr,  # [G, n] float32 row sums of V (PREPARED)
    dsigma_ptr,  # [G, n] float32 gradient with respect to sigma, row by row (SIGMA)
    n, p, G, x_g, x_n, x_p, par_x_g, par_y_g, sigma_x, sigma_y, own,
    BM: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
    KIND_X: tl.constexpr, DEGREE_X: tl.constexpr, S_X: tl.constexpr, HAS_PAR_X: tl.constexpr,
    KIND_Y: tl.constexpr, DEGREE_Y: tl.constexpr, S_Y: tl.constexpr, HAS_PAR_Y: tl.constexpr,
    STABLE: tl.constexpr, UNBIASED: tl.constexpr, ROWWISE: tl.constexpr, ROW_NORM: tl.constexpr,
    MASK: tl.constexpr, PREPARED: tl.constexpr, SHIFT: tl.constexpr, HALVE: tl.constexpr, SIGMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dx_i = grad sum_j V_ij z_j (- z_i sum_j V_ij for distances); `own` is 0 for x and 1 for y."""
    blocks = tl.cdiv(n, BM)  # one axis for all: the others end at 65535
    block, column = tl.program_id(0) % (blocks * G), tl.program_id(0) // (blocks * G)
    g = (block // blocks).to(tl.int64)
    row = (block % blocks) * BM
    o_i = row + tl.arange(0, BM)
    o_c = tl.arange(0, BP)
    m_i, m_p = o_i < n, column * BP + o_c < p
    nn = tl.cast(n, tl.int64) * n
    t_x_ptr, t_y_ptr = kept_ptr + (own * G + g) * nn, kept_ptr + ((1 - own) * G + g) * nn
    w_x = rows_ptr + g * 14 * n + own * 5 * n
    u_y_ptr = rows_ptr + g * 14 * n + (1 - own) * 5 * n
    par_x, par_y = par_x_ptr + g * par_x_g, par_y_ptr + g * par_y_g
    typical_x, typical_y = 0.0, 0.0
    if KIND_X >= RBF:
        typical_x = tl.load(rows_ptr + (g * 14 + 12 + own) * n)
    if KIND_Y >= RBF:
        typical_y = tl.load(rows_ptr + (g * 14 + 13 - own) * n)
    keep_i, ref = m_i, g * 0
    if MASK:
        keep_i = tl.load(mask_ptr + g * n + o_i, mask=m_i, other=0) != 0
        ref = tl.load(ref_ptr + g)
    columns = x_ptr + g * x_g + (column * BP).to(tl.int64) * x_p
    row_ref = columns + ref * x_n
    ux_i = tl.load(w_x + o_i, mask=m_i, other=0)
    uy_i = tl.load(u_y_ptr + o_i, mask=m_i, other=0)
    if ROWWISE:
        p_i = tl.load(w_x + n + o_i, mask=m_i, other=0)
        q_i = tl.load(w_x + 2 * n + o_i, mask=m_i, other=0)
    else:
        p_i, q_i = tl.load(w_x + n), tl.load(w_x + 2 * n)
    e_i = tl.load(w_x + 3 * n + o_i, mask=m_i, other=0)
    f_i = tl.load(w_x + 4 * n + o_i, mask=m_i, other=0)
    ax_i = tl.load(alpha_x_ptr + g * n + o_i, mask=m_i, other=0) if KIND_X == 1 else ux_i
    ay_i = tl.load(alpha_y_ptr + g * n + o_i, mask=m_i, other=0) if KIND_Y == 1 else ux_i
    acc = tl.zeros([BM, BP], tl.float32)
    sums = tl.zeros([BM], tl.float32)
    norm = tl.zeros([BM], tl.float32)
    dsigma = tl.zeros([BM], tl.float32)
    for start in range(0, n, BN):
        o_j = start + tl.arange(0, BN)
        m_j = o_j < n
        inside = m_i[:, None] & m_j[None, :]
        o_ij = o_i[:, None] * n + o_j[None, :]
        t_x = tl.load(t_x_ptr + o_ij, mask=inside, other=0)
        t_y = tl.load(t_y_ptr + o_ij, mask=inside, other=0)
        ux_j = tl.load(w_x + o_j, mask=m_j, other=0)
        uy_j = tl.load(u_y_ptr + o_j, mask=m_j, other=0)
        p_j, q_j = p_i, q_i
        if ROWWISE:
            p_j = tl.load(w_x + n + o_j, mask=m_j, other=0)
            q_j = tl.load(w_x + 2 * n + o_j, mask=m_j, other=0)
        e_j = tl.load(w_x + 3 * n + o_j, mask=m_j, other=0)
        ax_j = tl.load(alpha_x_ptr + g * n + o_j, mask=m_j, other=0) if KIND_X == 1 else ux_j
        ay_j = tl.load(alpha_y_ptr + g * n + o_j, mask=m_j, other=0) if KIND_Y == 1 else ux_j
        K = kernel_value(t_x, ax_i, ax_j, par_x, sigma_x, typical_x, KIND_X, DEGREE_X, S_X, HAS_PAR_X, STABLE)
        L = kernel_value(t_y, ay_i, ay_j, par_y, sigma_y, typical_y, KIND_Y, DEGREE_Y, S_Y, HAS_PAR_Y, STABLE)
        K -= ux_i[:, None] + ux_j[None, :]
        L -= uy_i[:, None] + uy_j[None, :]
        diagonal = o_i[:, None] == o_j[None, :]
        counted = inside
        keep_j = m_j
        if MASK:
            keep_j = tl.load(mask_ptr + g * n + o_j, mask=m_j, other=0) != 0
            counted = keep_i[:, None] & keep_j[None, :]
        if UNBIASED:
            counted = counted & (o_i[:, None] != o_j[None, :])
        W = pair_weights(K, L, p_i, q_i, e_i, p_j, q_j, e_j, ROWWISE)
        W = tl.where(counted, W, 0.0)
        V = W * kernel_slope(t_x, ax_i, ax_j, par_x, sigma_x, KIND_X, DEGREE_X, S_X, HAS_PAR_X)
        if KIND_X >= RBF:
            V = tl.where(diagonal, 0.0, V)
        sums += tl.sum(V, axis=1)
        if ROW_NORM:
            c_ij = p_i[:, None] * L + q_i[:, None] * K + e_i[:, None]
            norm += tl.sum(tl.where(counted, c_ij * K, 0.0), axis=1)
        if SIGMA:
            dsigma += tl.sum(W * sigma_slope(t_x, par_x, sigma_x, KIND_X, HAS_PAR_X), axis=1)
        rows_j = columns + tl.cast(start, tl.int64) * x_n
        z_j = load_rows(rows_j, row_ref, tl.arange(0, BN), o_c, m_j, m_p, x_n, x_p, keep_j, SHIFT, MASK, HALVE)
        dtype = x_ptr.dtype.element_ty
        if dtype == tl.float32:
            acc = tl.dot(V, z_j, acc, input_precision=PRECISION)
        else:
            unit = 1.0
            if dtype == tl.float16:  # under 6e-5 float16 drops digits, then everything: V in the unit of the tile
                unit = tl.maximum(tl.max(tl.max(tl.abs(V), axis=1), axis=0), 1e-30)
                V /= unit
            high_v, low_v = two_terms(V, x_ptr)
            high_z, low_z = two_terms(z_j, x_ptr)
            part = tl.dot(high_v, high_z)
            part = tl.dot(low_v, high_z, part)
            if SHIFT:  # rows as given are half-precision numbers already
                part = tl.dot(high_v, low_z, part)
            acc += unit * part
    rows_i = columns + row.to(tl.int64) * x_n
    if ROW_NORM and KIND_X < RBF:
        # 1/sqrt(K_ii) moves too: an extra diagonal weight -rho_i^2 sum_j c_ij K_ij, times dK_ii/dg_ii
        d = -f_i * f_i * norm
        if KIND_X == 1:
            t_ii = tl.load(t_x_ptr + o_i * n + o_i, mask=m_i, other=0)
            t0, a = tl.load(par_x), tl.load(par_x + 1)
            d *= DEGREE_X * a
            for _ in tl.static_range(DEGREE_X - 1):
                d *= t0 + a * t_ii
        z_i = load_rows(rows_i, row_ref, tl.arange(0, BM), o_c, m_i, m_p, x_n, x_p, keep_i, SHIFT, MASK, HALVE)
        acc += d[:, None] * z_i
        sums += d
    scale = tl.load(grad_ptr + g) * tl.load(rows_ptr + g * 14 * n + (10 + own) * n)
    m_out = m_i[:, None] & m_p[None, :]
    out = dx_ptr + (g * n + row) * p + column * BP
    o_out = out + tl.arange(0, BM)[:, None] * p + o_c[None, :]
    if PREPARED:
        tl.store(o_out, acc * scale, mask=m_out)
        if column == 0:
            tl.store(sums_ptr + g * n + o_i, sums * scale, mask=m_i)
    else:
        if KIND_X >= RBF:
            z_i = load_rows(rows_i, row_ref, tl.arange(0, BM), o_c, m_i, m_p, x_n, x_p, keep_i, SHIFT, MASK, HALVE)
            acc -= sums[:, None] * z_i
        if HALVE:
            acc *= 2
        acc = tl.where(keep_i[:, None], acc * scale, 0.0)
        tl.store(o_out, acc.to(dx_ptr.dtype.element_ty), mask=m_out)
    if SIGMA:
        if column == 0:
            tl.store(dsigma_ptr + g * n + o_i, 0.5 * dsigma * scale, mask=m_i)
