# SPDX-License-Identifier: Apache-2.0
"""Above 1024 samples: tiles of both Gram matrices live in registers, and only sums or the gradient leave them.

`tile_sums` visits each unordered pair of row blocks once and writes its row and column sums to slots that PyTorch adds
in a fixed order, in float64. `gradient_rows` is the flash-style backward pass for p <= 256: tiles are computed again,
dz stays in registers. `weight_panel` writes the pair weights V of a few rows for a matrix product, for wider features.
Shapes: z [G, n, p], w [G, n, q] prepared rows (float32 or half); square, u, alpha [G, n] and weights [G, 3, n] = p, q,
e in float32.
"""

import triton
import triton.language as tl

from .maps import RBF, kernel_slope, kernel_value, pair_weights, sigma_slope, tile_product


@triton.jit
def _product(z_ptr, i, j, m_i, m_j, p, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """z_i . z_j of the tile that starts at rows i and j: a 64-bit start, 32-bit offsets inside."""
    acc = tl.zeros([BM, BN], tl.float32)
    o_k = tl.arange(0, BK)
    at_i = z_ptr + i * p + tl.arange(0, BM)[:, None] * p + o_k[None, :]
    at_j = z_ptr + j * p + tl.arange(0, BN)[:, None] * p + o_k[None, :]
    for k in range(0, p, BK):
        m_k = (o_k < p - k)[None, :]
        b_i = tl.load(at_i, mask=m_i[:, None] & m_k, other=0)
        b_j = tl.load(at_j, mask=m_j[:, None] & m_k, other=0)
        acc = tl.dot(b_i, tl.trans(b_j), acc, input_precision=PRECISION)
        at_i += BK
        at_j += BK
    return acc


@triton.jit
def _vector(ptr, o, m):
    return tl.load(ptr + o, mask=m, other=0)


@triton.jit
def _side_tile(
    g, square_ptr, u_ptr, alpha_ptr, par, typical, o_i, o_j, m_i, m_j,
    KIND: tl.constexpr, DEGREE: tl.constexpr, S: tl.constexpr, STABLE: tl.constexpr,
):  # fmt: skip
    """(t, K^ - u_i - u_j) of a tile from its products g^."""
    s_i, s_j = _vector(square_ptr, o_i, m_i), _vector(square_ptr, o_j, m_j)
    a_i, a_j = _vector(alpha_ptr, o_i, m_i), _vector(alpha_ptr, o_j, m_j)
    t = tile_product(g, s_i, s_j, o_i[:, None] == o_j[None, :], KIND)
    K = kernel_value(t, a_i, a_j, par, 1.0, typical, KIND, DEGREE, S, True, STABLE)
    if STABLE:
        K -= _vector(u_ptr, o_i, m_i)[:, None] + _vector(u_ptr, o_j, m_j)[None, :]
    return t, K


@triton.jit
def _counted(keep_ptr, o_i, o_j, m_i, m_j, MASK: tl.constexpr, UNBIASED: tl.constexpr):
    pairs = m_i[:, None] & m_j[None, :]
    if MASK:
        k_i = tl.load(keep_ptr + o_i, mask=m_i, other=0) != 0
        k_j = tl.load(keep_ptr + o_j, mask=m_j, other=0) != 0
        pairs = k_i[:, None] & k_j[None, :]
    if UNBIASED:
        pairs = pairs & (o_i[:, None] != o_j[None, :])
    return pairs


@triton.jit(do_not_specialize=["G", "first", "band"])
def tile_sums(
    z_ptr, w_ptr, square_x_ptr, square_y_ptr, u_x_ptr, u_y_ptr, alpha_x_ptr, alpha_y_ptr, par_x_ptr, par_y_ptr,
    typical_x_ptr, typical_y_ptr, keep_ptr,
    row_ptr,  # [T, G, 5, band * BM] float32: sums over the columns of tile j
    column_ptr,  # [band, G, 5, n] float32: sums over the rows of tile i
    n, p, q, G, first, band, S_X: tl.constexpr, S_Y: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, KIND_X: tl.constexpr, DEGREE_X: tl.constexpr, KIND_Y: tl.constexpr,
    DEGREE_Y: tl.constexpr, STABLE: tl.constexpr, UNBIASED: tl.constexpr, MASK: tl.constexpr, MSE: tl.constexpr,
    ROWWISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(n, BM)
    pid = tl.program_id(0)
    local, j, g = pid % band, (pid // band) % tiles, (pid // band // tiles).to(tl.int64)
    i = first + local
    start_i, start_j = i.to(tl.int64) * BM, j.to(tl.int64) * BM
    o_i = i * BM + tl.arange(0, BM)
    o_j = j * BM + tl.arange(0, BM)
    m_i, m_j = o_i < n, o_j < n
    rows = row_ptr + ((j.to(tl.int64) * G + g) * 5) * band * BM + local * BM + tl.arange(0, BM)
    columns = column_ptr + ((local.to(tl.int64) * G + g) * 5) * n + o_j
    step = band * BM
    if i >= tiles:
        return
    if j < i:  # the mirror image is summed by tile (j, i): these slots count nothing
        zero = tl.zeros([BM], tl.float32)
        for k in tl.static_range(5):
            tl.store(rows + k * step, zero)
            tl.store(columns + k * n, zero, mask=m_j)
        return
    typical_x, typical_y = tl.load(typical_x_ptr + g), tl.load(typical_y_ptr + g)
    G_x = _product(z_ptr + g * n * p, start_i, start_j, m_i, m_j, p, BM, BM, BK, PRECISION)
    _, K = _side_tile(
        G_x, square_x_ptr + g * n, u_x_ptr + g * n, alpha_x_ptr + g * n, par_x_ptr + g * S_X, typical_x,
        o_i, o_j, m_i, m_j, KIND_X, DEGREE_X, S_X, STABLE,
    )  # fmt: skip
    G_y = _product(w_ptr + g * n * q, start_i, start_j, m_i, m_j, q, BM, BM, BK, PRECISION)
    _, L = _side_tile(
        G_y, square_y_ptr + g * n, u_y_ptr + g * n, alpha_y_ptr + g * n, par_y_ptr + g * S_Y, typical_y,
        o_i, o_j, m_i, m_j, KIND_Y, DEGREE_Y, S_Y, STABLE,
    )  # fmt: skip
    counted = _counted(keep_ptr + g * n, o_i, o_j, m_i, m_j, MASK, UNBIASED)
    K, L = tl.where(counted, K, 0.0), tl.where(counted, L, 0.0)
    KL = (K - L) * (K - L) if MSE else K * L
    mirrored = tl.where(i == j, 0.0, 1.0)
    # where only totals are asked for, the mirrored half of the squares is added to the rows
    factor = 1.0 if ROWWISE else 1.0 + mirrored
    tl.store(rows, tl.sum(K, 1))
    tl.store(rows + step, tl.sum(L, 1))
    tl.store(rows + 2 * step, factor * tl.sum(K * K, 1))
    tl.store(rows + 3 * step, factor * tl.sum(KL, 1))
    tl.store(rows + 4 * step, factor * tl.sum(L * L, 1))
    tl.store(columns, mirrored * tl.sum(K, 0), mask=m_j)
    tl.store(columns + n, mirrored * tl.sum(L, 0), mask=m_j)
    if ROWWISE:
        tl.store(columns + 2 * n, mirrored * tl.sum(K * K, 0), mask=m_j)
        tl.store(columns + 3 * n, mirrored * tl.sum(KL, 0), mask=m_j)
        tl.store(columns + 4 * n, mirrored * tl.sum(L * L, 0), mask=m_j)


@triton.jit
def _tile_weights(
    K, L, t_x, weights_ptr, n, alpha_ptr, par, o_i, o_j, m_i, m_j, counted,
    KIND: tl.constexpr, DEGREE: tl.constexpr, S: tl.constexpr, ROWWISE: tl.constexpr, ROW_NORM: tl.constexpr,
):  # fmt: skip
    """(W, V, sum_j c_ij K_ij): the pair weights, times dK^/dg^, and the row norm's own sum."""
    if ROWWISE:
        p_i, p_j = _vector(weights_ptr, o_i, m_i), _vector(weights_ptr, o_j, m_j)
        q_i, q_j = _vector(weights_ptr + n, o_i, m_i), _vector(weights_ptr + n, o_j, m_j)
    else:  # the same for every row: two scalars
        p_i, q_i = tl.load(weights_ptr), tl.load(weights_ptr + n)
        p_j, q_j = p_i, q_i
    e_i, e_j = _vector(weights_ptr + 2 * n, o_i, m_i), _vector(weights_ptr + 2 * n, o_j, m_j)
    W = pair_weights(K, L, p_i, q_i, e_i, p_j, q_j, e_j, ROWWISE)
    W = tl.where(counted, W, 0.0)
    a_i, a_j = _vector(alpha_ptr, o_i, m_i), _vector(alpha_ptr, o_j, m_j)
    V = W * kernel_slope(t_x, a_i, a_j, par, 1.0, KIND, DEGREE, S, True)
    if KIND >= RBF:
        V = tl.where(o_i[:, None] == o_j[None, :], 0.0, V)
    norm = tl.zeros_like(e_i)
    if ROW_NORM:
        c_ij = p_i[:, None] * L + q_i[:, None] * K + e_i[:, None]
        norm = tl.sum(tl.where(counted, c_ij * K, 0.0), axis=1)
    return W, V, norm


@triton.jit
def _row_sum(V, dtype: tl.constexpr, KIND: tl.constexpr):
    """Row sums of V: of the rounded V for distances, whose two terms cancel; exact where a mean multiplies them."""
    if KIND >= RBF:
        return tl.sum(V.to(dtype).to(tl.float32), axis=1)
    else:
        return tl.sum(V, axis=1)


@triton.jit
def gradient_rows(
    z_ptr, w_ptr, square_x_ptr, square_y_ptr, u_x_ptr, u_y_ptr, alpha_x_ptr, alpha_y_ptr, par_x_ptr, par_y_ptr,
    typical_x_ptr, typical_y_ptr, keep_ptr, weights_ptr,
    dz_ptr,  # [G, n, p] float32
    extra_ptr,  # [G, 3, n] float32: row sums of V, sum_j c_ij K_ij (ROW_NORM), gradient of sigma row by row (SIGMA)
    n, p, q, S_X: tl.constexpr, S_Y: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr,
    KIND_X: tl.constexpr, DEGREE_X: tl.constexpr, KIND_Y: tl.constexpr, DEGREE_Y: tl.constexpr,
    STABLE: tl.constexpr, UNBIASED: tl.constexpr, MASK: tl.constexpr, ROWWISE: tl.constexpr, ROW_NORM: tl.constexpr,
    SIGMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(n, BM)
    g = (tl.program_id(0) // tiles).to(tl.int64)
    start_i = (tl.program_id(0) % tiles).to(tl.int64) * BM
    o_i = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    o_p = tl.arange(0, BP)
    m_i, m_p = o_i < n, o_p < p
    z, w = z_ptr + g * n * p, w_ptr + g * n * q
    par_x, par_y = par_x_ptr + g * S_X, par_y_ptr + g * S_Y
    typical_x, typical_y = tl.load(typical_x_ptr + g), tl.load(typical_y_ptr + g)
    inside = tl.arange(0, BM)[:, None] * p + o_p[None, :]
    b_i = tl.load(z + start_i * p + inside, mask=m_i[:, None] & m_p[None, :], other=0)
    acc = tl.zeros([BM, BP], tl.float32)
    sums = tl.zeros([BM], tl.float32)
    norms = tl.zeros([BM], tl.float32)
    dsigma = tl.zeros([BM], tl.float32)
    for start in range(0, n, BN):
        o_j = start + tl.arange(0, BN)
        m_j = o_j < n
        start_j = tl.cast(start, tl.int64)
        at_j = z + start_j * p + tl.arange(0, BN)[:, None] * p + o_p[None, :]
        b_j = tl.load(at_j, mask=m_j[:, None] & m_p[None, :], other=0)
        G_x = tl.dot(b_i, tl.trans(b_j), input_precision=PRECISION)
        t_x, K = _side_tile(
            G_x, square_x_ptr + g * n, u_x_ptr + g * n, alpha_x_ptr + g * n, par_x, typical_x,
            o_i, o_j, m_i, m_j, KIND_X, DEGREE_X, S_X, STABLE,
        )  # fmt: skip
        G_y = _product(w, start_i, start_j, m_i, m_j, q, BM, BN, BK, PRECISION)
        _, L = _side_tile(
            G_y, square_y_ptr + g * n, u_y_ptr + g * n, alpha_y_ptr + g * n, par_y, typical_y,
            o_i, o_j, m_i, m_j, KIND_Y, DEGREE_Y, S_Y, STABLE,
        )  # fmt: skip
        counted = _counted(keep_ptr + g * n, o_i, o_j, m_i, m_j, MASK, UNBIASED)
        W, V, norm = _tile_weights(
            K, L, t_x, weights_ptr + g * 3 * n, n, alpha_x_ptr + g * n, par_x, o_i, o_j, m_i, m_j, counted,
            KIND_X, DEGREE_X, S_X, ROWWISE, ROW_NORM,
        )  # fmt: skip
        sums += _row_sum(V, z_ptr.dtype.element_ty, KIND_X)
        norms += norm
        if SIGMA:
            dsigma += 0.5 * tl.sum(W * sigma_slope(t_x, par_x, 1.0, KIND_X, True), axis=1)
        acc = tl.dot(V.to(z_ptr.dtype.element_ty), b_j, acc, input_precision=PRECISION)
    tl.store(dz_ptr + (g * n + start_i) * p + inside, acc, mask=m_i[:, None] & m_p[None, :])
    tl.store(extra_ptr + g * 3 * n + o_i, sums, mask=m_i)
    tl.store(extra_ptr + g * 3 * n + n + o_i, norms, mask=m_i)
    tl.store(extra_ptr + g * 3 * n + 2 * n + o_i, dsigma, mask=m_i)


@triton.jit(do_not_specialize=["first", "rows"])
def weight_panel(
    z_ptr, w_ptr, square_x_ptr, square_y_ptr, u_x_ptr, u_y_ptr, alpha_x_ptr, alpha_y_ptr, par_x_ptr, par_y_ptr,
    typical_x_ptr, typical_y_ptr, keep_ptr, weights_ptr,
    panel_ptr,  # [rows, n] V of rows first .. first + rows of one group, in z's dtype
    extra_ptr,  # [T, 3, rows] float32: the sums of gradient_rows, by column tile
    n, p, q, first, rows, S_X: tl.constexpr, S_Y: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KIND_X: tl.constexpr, DEGREE_X: tl.constexpr,
    KIND_Y: tl.constexpr, DEGREE_Y: tl.constexpr,
    STABLE: tl.constexpr, UNBIASED: tl.constexpr, MASK: tl.constexpr, ROWWISE: tl.constexpr,
    ROW_NORM: tl.constexpr, SIGMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All pointers are those of the group; row tiles run fastest so that a column tile is read once by all of them."""
    blocks = tl.cdiv(rows, BM)
    local, j = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    start_i, start_j = (first + local * BM).to(tl.int64), (j * BN).to(tl.int64)
    o_r = local * BM + tl.arange(0, BM)
    o_i = first + o_r
    o_j = j * BN + tl.arange(0, BN)
    m_i, m_j = (o_r < rows) & (o_i < n), o_j < n
    G_x = _product(z_ptr, start_i, start_j, m_i, m_j, p, BM, BN, BK, PRECISION)
    t_x, K = _side_tile(
        G_x, square_x_ptr, u_x_ptr, alpha_x_ptr, par_x_ptr, tl.load(typical_x_ptr),
        o_i, o_j, m_i, m_j, KIND_X, DEGREE_X, S_X, STABLE,
    )  # fmt: skip
    G_y = _product(w_ptr, start_i, start_j, m_i, m_j, q, BM, BN, BK, PRECISION)
    _, L = _side_tile(
        G_y, square_y_ptr, u_y_ptr, alpha_y_ptr, par_y_ptr, tl.load(typical_y_ptr),
        o_i, o_j, m_i, m_j, KIND_Y, DEGREE_Y, S_Y, STABLE,
    )  # fmt: skip
    counted = _counted(keep_ptr, o_i, o_j, m_i, m_j, MASK, UNBIASED)
    W, V, norm = _tile_weights(
        K, L, t_x, weights_ptr, n, alpha_x_ptr, par_x_ptr, o_i, o_j, m_i, m_j, counted,
        KIND_X, DEGREE_X, S_X, ROWWISE, ROW_NORM,
    )  # fmt: skip
    dtype = panel_ptr.dtype.element_ty
    out = panel_ptr + (local * BM).to(tl.int64) * n + j * BN
    out += tl.arange(0, BM)[:, None] * n + tl.arange(0, BN)[None, :]
    tl.store(out, V.to(dtype), mask=(o_r < rows)[:, None] & m_j[None, :])
    at = extra_ptr + j * 3 * rows + o_r
    tl.store(at, _row_sum(V, dtype, KIND_X), mask=o_r < rows)
    if ROW_NORM:
        tl.store(at + rows, norm, mask=o_r < rows)
    if SIGMA:
        dsigma = 0.5 * tl.sum(W * sigma_slope(t_x, par_x_ptr, 1.0, KIND_X, True), axis=1)
        tl.store(at + 2 * rows, dsigma, mask=o_r < rows)
