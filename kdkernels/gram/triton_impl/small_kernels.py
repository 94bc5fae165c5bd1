# SPDX-License-Identifier: Apache-2.0
"""Up to 1024 samples: both sides' Gram matrices in one split-K launch, and what the kernels of this schedule share.

1. `split_gram` reads x and y once and writes partial products t of both sides (no atomics).
2. `row_sums` and `finish`, in one or two launches, lead to the value and the weights: `small_sums.py`.
3. Backward: `small_gradient.py`.
Shapes: x [G, n, p], part [2, splits, G, n, w], square [2, splits, G, n], kept t [2, G, n, w], saved [G, 14, n] float32:
the rows named below, stats [column blocks, G, 7, n] float64; w is n rounded up by `row_step`, and what lies beyond n is
finite where the rest of its row is. A pointer is None where there is nothing to read or to write.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...triton_tf32 import product_of_terms, split_tf32, to_tf32
from .maps import Map, counting
from .matrices import row_step

CKA, HSIC, MSE, ROW_MSE, SUM = (tl.constexpr(k) for k in range(5))
STATS = {"cka": CKA, "hsic": HSIC, "mse": MSE, "row_mse": ROW_MSE, "sum": SUM}
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
def counted_pairs(keep_ptr, g, n, o_j, m_j, keep_i, diagonal, asked):
    """Which pairs of a tile enter the sums."""
    keep_j = m_j if keep_ptr is None else counting(keep_ptr + g * n, o_j, m_j)
    counted = keep_i[:, None] & keep_j[None, :]
    if asked.unbiased:
        counted = counted & (diagonal == 0)
    return counted


@triton.jit
def load_rows(tile_ptr, ref_ptr, step_n, step_p, o_n, o_p, keep, m_p, SHIFT: tl.constexpr):
    """Rows as float32 z = x - x_ref (if SHIFT), halved for float16 so that no difference overflows.

    tile_ptr and ref_ptr are the tile's first element and the reference row at the tile's first column: the offsets
    inside a tile then fit 32 bits (the launcher sees to it), which is what leaves registers for the products.
    """
    b_x = tl.load(tile_ptr + o_n * step_n + o_p * step_p, mask=keep & m_p, other=0)
    b_z = b_x.to(tl.float32)
    if SHIFT:
        half: tl.constexpr = tile_ptr.dtype.element_ty == tl.float16
        if half:
            b_z *= 0.5
        b_ref = tl.load(ref_ptr + o_p * step_p, mask=m_p, other=0).to(tl.float32)
        if half:
            b_ref *= 0.5
        b_z = tl.where(keep, b_z - b_ref, 0.0)
    return b_z


@triton.jit
def two_terms(b_z, like_ptr):
    """z as the sum of two half-precision terms: one alone would round a difference of rows, which no input holds."""
    b_high = b_z.to(like_ptr.dtype.element_ty)
    return b_high, (b_z - b_high.to(tl.float32)).to(like_ptr.dtype.element_ty)


@triton.jit
def factors(b_z, like_ptr, SHIFT: tl.constexpr, PRECISION: tl.constexpr):
    """(high, low) of a tile of rows as tensor cores take them; low is None where high is the tile itself."""
    dtype: tl.constexpr = like_ptr.dtype.element_ty
    if dtype == tl.float32:
        if PRECISION == "tf32x3":
            return split_tf32(b_z)
        else:
            return to_tf32(b_z, PRECISION), 0.0
    elif SHIFT:
        return two_terms(b_z, like_ptr)
    else:
        return b_z.to(dtype), 0.0


@triton.jit
def _partial_product(
    x_ptr, step_n, step_p, i, j, keep_i, keep_j, ref, p, start, stop,
    BM: tl.constexpr, BK: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    TERMS: tl.constexpr = PRECISION == "tf32x3" if dtype == tl.float32 else SHIFT
    FROM_ZERO: tl.constexpr = dtype == tl.float32  # else the sum of a step is less exact than what is cut off adding it
    acc = tl.zeros([BM, BM], tl.float32)
    o_n, o_k = tl.arange(0, BM)[None, :], tl.arange(0, BK)[:, None]
    keep_i, keep_j = keep_i[None, :], keep_j[None, :]
    first = x_ptr + start.to(tl.int64) * step_p
    rows_i = first + (i * BM).to(tl.int64) * step_n
    rows_j = first + (j * BM).to(tl.int64) * step_n
    row_ref = first + ref.to(tl.int64) * step_n
    if i == j:
        for k in range(start, stop, BK):
            b_i = load_rows(rows_i, row_ref, step_n, step_p, o_n, o_k, keep_i, k + o_k < p, SHIFT)
            high, low = factors(b_i, x_ptr, SHIFT, PRECISION)
            part = tl.zeros_like(acc) if FROM_ZERO else acc
            if TERMS:  # high (high + 2 low)', of which half and half its transpose are all three products
                part = tl.dot(tl.trans(high), low + low, part, input_precision="tf32")
            part = tl.dot(tl.trans(high), high, part, input_precision="tf32")
            acc = acc + part if FROM_ZERO else part
            rows_i += BK * step_p
            row_ref += BK * step_p
        if TERMS:
            acc = 0.5 * (acc + tl.trans(acc))
    else:
        for k in range(start, stop, BK):
            b_i = load_rows(rows_i, row_ref, step_n, step_p, o_n, o_k, keep_i, k + o_k < p, SHIFT)
            b_j = load_rows(rows_j, row_ref, step_n, step_p, o_n, o_k, keep_j, k + o_k < p, SHIFT)
            high_i, low_i = factors(b_i, x_ptr, SHIFT, PRECISION)
            high_j, low_j = factors(b_j, x_ptr, SHIFT, PRECISION)
            part = tl.zeros_like(acc) if FROM_ZERO else acc
            if TERMS:
                part = product_of_terms(tl.trans(high_i), tl.trans(low_i), high_j, low_j, part)
            else:
                part = tl.dot(tl.trans(high_i), high_j, part, input_precision="tf32")
            acc = acc + part if FROM_ZERO else part
            rows_i += BK * step_p
            rows_j += BK * step_p
            row_ref += BK * step_p
    if SHIFT and dtype == tl.float16:
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
    tiles = blocks * (blocks + 1) // 2
    tile, sg = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    j = ((tl.sqrt(8 * tile + 1.5) - 1) * 0.5).to(tl.int32)  # 0.5 for the rounding: of 136 tiles at most
    i = tile - j * (j + 1) // 2
    split = tl.program_id(1)
    side, g = sg // G, (sg % G).to(tl.int64)
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
