# SPDX-License-Identifier: Apache-2.0
"""Up to 1024 samples, backward: V = (c_ij + c_ji) dK/dg is written once a side, then multiplied with the rows."""

import triton
import triton.language as tl

from ...triton_tf32 import product_of_terms, to_tf32
from .maps import (
    POLYNOMIAL,
    RBF,
    alpha_of,
    counting,
    kernel_slope,
    kernel_value,
    pair_weights,
    parameter,
    power,
    sigma_slope,
    vector,
)
from .matrices import row_step
from .small_kernels import (
    ROW_MSE,
    SAVED,
    TYPICAL,
    UNIT,
    Y_SIDE,
    E,
    F,
    P,
    Q,
    U,
    counted_pairs,
    factors,
    load_rows,
)


@triton.jit(do_not_specialize=["G", "own"])
def pair_rows(
    x, y,  # Side: that side and the other one
    grad_ptr, kept_ptr, saved_ptr, keep_ptr,
    weights_ptr,  # [G, n, w] float32 V
    own_ptr,  # [G, n] float32: what z_i itself is multiplied with
    sums_ptr,  # [G, n] float32 row sums of V, of a prepared side
    dsigma_ptr,  # [G, n] float32 gradient with respect to sigma, row by row
    n, G,
    own,  # 0 for x of the call, 1 for y
    asked,  # Asked
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    ROWWISE: tl.constexpr = asked.row_norm or asked.stat == ROW_MSE
    blocks = tl.cdiv(n, BM)
    g = (tl.program_id(0) // blocks).to(tl.int64)
    o_i = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    m_i = o_i < n
    width = row_step(n)
    nn = tl.cast(n, tl.int64) * width
    t_x_ptr, t_y_ptr = kept_ptr + (own * G + g) * nn, kept_ptr + ((1 - own) * G + g) * nn
    saved = saved_ptr + g * SAVED * n
    w_x, u_y_ptr = saved + own * Y_SIDE * n, saved + (1 - own) * Y_SIDE * n + U * n
    p_ptr, q_ptr, e_ptr = w_x + P * n, w_x + Q * n, w_x + E * n
    typical_x, typical_y = 0.0, 0.0
    if x.map.kind >= RBF:
        typical_x = tl.load(saved + (TYPICAL + own) * n)
    if y.map.kind >= RBF:
        typical_y = tl.load(saved + (TYPICAL + 1 - own) * n)
    keep_i = m_i if keep_ptr is None else counting(keep_ptr + g * n, o_i, m_i)
    ux_i, uy_i = vector(w_x + U * n, o_i, m_i), vector(u_y_ptr, o_i, m_i)
    if ROWWISE:
        p_i, q_i = vector(p_ptr, o_i, m_i), vector(q_ptr, o_i, m_i)
    else:
        p_i, q_i = tl.load(p_ptr), tl.load(q_ptr)
    e_i = vector(e_ptr, o_i, m_i)
    ax_i, ay_i = alpha_of(x, g, n, o_i, m_i), alpha_of(y, g, n, o_i, m_i)
    sums = tl.zeros([BM], tl.float32)
    norm = tl.zeros([BM], tl.float32)
    dsigma = tl.zeros([BM], tl.float32)
    for start in range(0, n, BN):
        o_j = start + tl.arange(0, BN)
        m_j = o_j < n
        inside = m_i[:, None] & (o_j < width)[None, :]
        o_ij = o_i[:, None] * width + o_j[None, :]
        t_x = tl.load(t_x_ptr + o_ij, mask=inside, other=0)
        t_y = tl.load(t_y_ptr + o_ij, mask=inside, other=0)
        p_j, q_j = p_i, q_i
        if ROWWISE:
            p_j, q_j = vector(p_ptr, o_j, m_j), vector(q_ptr, o_j, m_j)
        ax_j, ay_j = alpha_of(x, g, n, o_j, m_j), alpha_of(y, g, n, o_j, m_j)
        K = kernel_value(x.map, g, t_x, ax_i, ax_j, typical_x, asked.stable)
        L = kernel_value(y.map, g, t_y, ay_i, ay_j, typical_y, asked.stable)
        K -= ux_i[:, None] + vector(w_x + U * n, o_j, m_j)[None, :]
        L -= uy_i[:, None] + vector(u_y_ptr, o_j, m_j)[None, :]
        diagonal = o_i[:, None] == o_j[None, :]
        counted = counted_pairs(keep_ptr, g, n, o_j, m_j, keep_i, diagonal, asked)
        W = pair_weights(K, L, p_i, q_i, e_i, p_j, q_j, vector(e_ptr, o_j, m_j), ROWWISE)
        W = tl.where(counted, W, 0.0)
        V = W * kernel_slope(x.map, g, t_x, ax_i, ax_j)
        if x.map.kind >= RBF:
            V = tl.where(diagonal, 0.0, V)
        V = to_tf32(V, PRECISION)  # before the sums: for distances the two terms cancel
        tl.store(weights_ptr + g * nn + o_ij, V, mask=inside)
        sums += tl.sum(V, axis=1)
        if asked.row_norm:
            c_ij = p_i[:, None] * L + q_i[:, None] * K + e_i[:, None]
            norm += tl.sum(tl.where(counted, c_ij * K, 0.0), axis=1)
        if dsigma_ptr is not None:
            dsigma += tl.sum(W * sigma_slope(x.map, g, t_x), axis=1)
    of_own = -sums
    if asked.row_norm and x.map.kind < RBF:
        # 1/sqrt(K_ii) moves too: an extra diagonal weight -rho_i^2 sum_j c_ij K_ij, times dK_ii/dg_ii
        f_i = vector(w_x + F * n, o_i, m_i)
        of_own = -f_i * f_i * norm
        if x.map.kind == POLYNOMIAL:
            t_ii = tl.load(t_x_ptr + o_i * width + o_i, mask=m_i, other=0)
            t0, a = parameter(x.map, g, 0), parameter(x.map, g, 1)
            of_own *= x.map.degree * a * power(t0 + a * t_ii, x.map.degree - 1)
        sums += of_own
    if own_ptr is not None:
        tl.store(own_ptr + g * n + o_i, of_own, mask=m_i)
    scale = tl.load(grad_ptr + g) * tl.load(saved + (UNIT + own) * n)
    if sums_ptr is not None:
        tl.store(sums_ptr + g * n + o_i, sums * scale, mask=m_i)
    if dsigma_ptr is not None:
        tl.store(dsigma_ptr + g * n + o_i, 0.5 * dsigma * scale, mask=m_i)


@triton.jit
def _add_product(acc, V, z_j, like_ptr, SHIFT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + V z_j, of two terms each: rows as they are given are one."""
    unit = 1.0
    if like_ptr.dtype.element_ty == tl.float16:
        # under 6e-5 float16 drops digits, then everything: V in the unit of the tile
        unit = tl.maximum(tl.max(tl.max(tl.abs(V), axis=1), axis=0), 1e-30)
        V /= unit
    high_v, low_v = factors(V, like_ptr, True, PRECISION)
    high_z, low_z = factors(z_j, like_ptr, SHIFT, PRECISION)
    if like_ptr.dtype.element_ty == tl.float32 and PRECISION != "tf32x3":
        part = tl.dot(tl.trans(high_z), tl.trans(high_v), input_precision="tf32")
    elif like_ptr.dtype.element_ty == tl.float32 or SHIFT:
        part = product_of_terms(tl.trans(high_z), tl.trans(low_z), tl.trans(high_v), tl.trans(low_v))
    else:
        part = tl.dot(tl.trans(high_z), tl.trans(low_v))
        part = tl.dot(tl.trans(high_z), tl.trans(high_v), part)
    return acc + unit * part


@triton.jit(do_not_specialize=["G", "own"])
def weighted_rows(
    rows,  # Rows of the side whose gradient this is
    grad_ptr, weights_ptr, own_ptr, saved_ptr, keep_ptr, ref_ptr,
    dx_ptr,  # [G, n, p] the gradient, or float32 dz of a prepared side
    n, G,
    own,  # 0 for x of the call, 1 for y
    BM: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx_i = grad (sum_j V_ij z_j + own_i z_i)."""
    blocks = tl.cdiv(n, BM)  # one axis for all: the others end at 65535
    # the row blocks of one column block run together: they read the same rows
    block, column = tl.program_id(0) % (blocks * G), tl.program_id(0) // (blocks * G)
    g = (block // blocks).to(tl.int64)
    row = (block % blocks) * BM
    o_i = row + tl.arange(0, BM)
    o_c = tl.arange(0, BP)[None, :]
    m_i, m_p = o_i < n, column * BP + o_c < rows.width
    width = row_step(n)
    keep_i, ref = m_i, g * 0
    if keep_ptr is not None:
        keep_i, ref = counting(keep_ptr + g * n, o_i, m_i), tl.load(ref_ptr + g)
    columns = rows.ptr + g * rows.step_g + (column * BP).to(tl.int64) * rows.step_p
    row_ref = columns + ref * rows.step_n
    at_V = weights_ptr + (g * n + row) * width + tl.arange(0, BM)[:, None] * width + tl.arange(0, BN)[None, :]
    acc = tl.zeros([BP, BM], tl.float32)
    for start in range(0, n, BN):
        o_j = start + tl.arange(0, BN)
        m_j = o_j < n
        V = tl.load(at_V + start, mask=m_i[:, None] & (o_j < width)[None, :], other=0)
        rows_j = columns + tl.cast(start, tl.int64) * rows.step_n
        keep_j = m_j if keep_ptr is None else counting(keep_ptr + g * n, o_j, m_j)
        o_n = tl.arange(0, BN)[:, None]
        z_j = load_rows(rows_j, row_ref, rows.step_n, rows.step_p, o_n, o_c, keep_j[:, None], m_p, rows.shift)
        acc = _add_product(acc, V, z_j, rows.ptr, rows.shift, PRECISION)
    acc = tl.trans(acc)
    if own_ptr is not None:
        rows_i = columns + row.to(tl.int64) * rows.step_n
        o_n = tl.arange(0, BM)[:, None]
        z_i = load_rows(rows_i, row_ref, rows.step_n, rows.step_p, o_n, o_c, keep_i[:, None], m_p, rows.shift)
        acc += vector(own_ptr + g * n, o_i, m_i)[:, None] * z_i
    scale = tl.load(grad_ptr + g) * tl.load(saved_ptr + g * SAVED * n + (UNIT + own) * n)
    if rows.shift and rows.ptr.dtype.element_ty == tl.float16:
        scale *= 2
    out = dx_ptr + (g * n + row) * rows.width + column * BP
    o_out = out + tl.arange(0, BM)[:, None] * rows.width + o_c
    acc = tl.where(keep_i[:, None], acc * scale, 0.0)
    tl.store(o_out, acc.to(dx_ptr.dtype.element_ty), mask=m_i[:, None] & m_p)
