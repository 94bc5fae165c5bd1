# SPDX-License-Identifier: Apache-2.0
"""The landmark similarity loss on a GPU: a tile of S and of T live in registers and leave as two sums, or as a product.

Rows are contiguous; every start is 64-bit, offsets inside a tile 32-bit. One slot a tile, added in order: no atomics.
"""

import triton
import triton.language as tl

from ...triton_tf32 import to_tf32


@triton.jit
def _product(
    x_ptr, start_i, m_i, y_ptr, start_j, m_j, d, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x_i . y_j [BM, BN], in float32 whatever the dtype of x."""
    acc = tl.zeros([BM, BN], tl.float32)
    o_d = tl.arange(0, BD)
    at_x = x_ptr + start_i * d + (tl.arange(0, BM)[:, None] * d + o_d[None, :])
    at_y = y_ptr + start_j * d + (tl.arange(0, BN)[:, None] * d + o_d[None, :])
    for first in range(0, d, BD):
        m_d = (o_d < d - first)[None, :]
        b_x = tl.load(at_x, mask=m_i[:, None] & m_d, other=0).to(tl.float32)
        b_y = tl.load(at_y, mask=m_j[:, None] & m_d, other=0)
        acc = tl.dot(b_x, tl.trans(to_tf32(b_y, PRECISION)), acc, input_precision=PRECISION)
        at_x += BD
        at_y += BD
    return acc


@triton.jit(do_not_specialize=["B", "C"])
def similarity_sums(
    s_ptr,  # [B, d] any float dtype
    t_ptr,  # [B, e]
    s_centers_ptr,  # [C, d] float32
    t_centers_ptr,  # [C, e]
    slots_ptr,  # [tiles, 2] float32: sum of smooth L1, sum of T^2
    B, C, d, e, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(C, BN)
    i, j = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    start_i, start_j = i.to(tl.int64) * BM, j.to(tl.int64) * BN
    m_i, m_j = i * BM + tl.arange(0, BM) < B, j * BN + tl.arange(0, BN) < C
    T = _product(t_ptr, start_i, m_i, t_centers_ptr, start_j, m_j, e, BM, BN, BD, PRECISION)
    square = tl.sum(T * T)
    S = _product(s_ptr, start_i, m_i, s_centers_ptr, start_j, m_j, d, BM, BN, BD, PRECISION)
    D = S - T
    V = tl.clamp(D, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    # smooth L1 = V (D - V / 2); rows and landmarks beyond the edge have D = 0
    at = slots_ptr + tl.program_id(0).to(tl.int64) * 2
    tl.store(at, tl.sum(V * (D - 0.5 * V)))
    tl.store(at + 1, square)


@triton.jit(do_not_specialize=["tiles"])
def similarity_finish(
    slots_ptr,  # [tiles, 2] float32
    value_ptr,  # one number each, float32
    inverse_ptr,  # 1 / |T|_F
    tiles, BLOCK: tl.constexpr,
):  # fmt: skip
    o = tl.arange(0, BLOCK)
    loss = tl.zeros([BLOCK], tl.float64)
    square = tl.zeros([BLOCK], tl.float64)
    for first in range(0, tiles, BLOCK):
        m = o < tiles - first
        loss += tl.load(slots_ptr + 2 * (first + o), mask=m, other=0).to(tl.float64)
        square += tl.load(slots_ptr + 2 * (first + o) + 1, mask=m, other=0).to(tl.float64)
    total, norm = tl.sum(loss), tl.sqrt(tl.sum(square))
    # where T is all zero: 0; NaN stays NaN
    inverse = tl.where(norm == 0.0, 0.0, 1.0 / tl.where(norm == 0.0, 1.0, norm))
    tl.store(value_ptr, (total * inverse).to(tl.float32))
    tl.store(inverse_ptr, inverse.to(tl.float32))


@triton.jit(do_not_specialize=["B", "C"])
def similarity_gradient(
    s_ptr, t_ptr, s_centers_ptr, t_centers_ptr,
    grad_ptr,  # one number, float32
    inverse_ptr,  # 1 / |T|_F
    ds_ptr,  # [B, d] in the dtype of s
    B, C, d, e,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns program_id(1) * BW .. of ds: tiles of D are computed again, clamped, and multiplied by the landmarks."""
    i, w = tl.program_id(0), tl.program_id(1)
    start_i = i.to(tl.int64) * BM
    m_i = i * BM + tl.arange(0, BM) < B
    o_w = w * BW + tl.arange(0, BW)
    m_w = o_w < d
    acc = tl.zeros([BM, BW], tl.float32)
    for first in range(0, C, BN):
        start_j = tl.cast(first, tl.int64)
        m_j = first + tl.arange(0, BN) < C
        T = _product(t_ptr, start_i, m_i, t_centers_ptr, start_j, m_j, e, BM, BN, BD, PRECISION)
        S = _product(s_ptr, start_i, m_i, s_centers_ptr, start_j, m_j, d, BM, BN, BD, PRECISION)
        V = tl.clamp(S - T, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
        at = s_centers_ptr + start_j * d + (tl.arange(0, BN)[:, None] * d + o_w[None, :])
        b_c = tl.load(at, mask=m_j[:, None] & m_w[None, :], other=0)
        acc = tl.dot(to_tf32(V, PRECISION), to_tf32(b_c, PRECISION), acc, input_precision=PRECISION)
    # ds = grad / |T|_F clamp(S - T, -1, 1) s_centers
    acc *= tl.load(grad_ptr) * tl.load(inverse_ptr)
    at = ds_ptr + start_i * d + (tl.arange(0, BM)[:, None] * d + o_w[None, :])
    tl.store(at, acc.to(ds_ptr.dtype.element_ty), mask=m_i[:, None] & m_w[None, :])
