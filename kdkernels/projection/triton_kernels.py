# SPDX-License-Identifier: Apache-2.0
"""Projected MSE on a GPU: s and t are read once in the layout they have, the projection is summed where it is computed.

A program owns BR positions of one sample (of all samples, where strides let them merge) and BK directions. Strides are
arguments: a stride of 1 is known at compile time, and loads run along it. Sums go to one slot a row: no atomics.
"""

import triton
import triton.language as tl

from ..triton_tf32 import to_tf32


@triton.jit
def _rows(start, p, BR: tl.constexpr):
    o_r = start + tl.arange(0, BR)
    return o_r, o_r < p


@triton.jit(do_not_specialize=["p"])
def project(
    s_ptr,  # [B, p, c] by strides, any float dtype
    t_ptr,
    basis_ptr,  # [c, k] float32, contiguous
    mask_ptr,  # [B, p] uint8
    squares_ptr,  # [k blocks, B, p] float32: square sums of Q
    q_ptr,  # [B, p, k] float32: Q = (s - t) P
    B, p, c, k, s_b, s_p, s_c, t_b, t_p, t_c,
    BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, MASK: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(p, BR)
    tile = tl.program_id(0) % tiles
    b = (tl.program_id(0) // tiles).to(tl.int64)
    k_block = tl.program_id(1)
    start = tl.cast(tile, tl.int64) * BR
    inner = tl.arange(0, BR)
    o_r, m_r = _rows(tile * BR, p, BR)
    counted = m_r
    if MASK:
        counted = tl.load(mask_ptr + b * p + o_r, mask=m_r, other=0) != 0
    o_k = k_block * BK + tl.arange(0, BK)
    o_c = tl.arange(0, BC)
    m_k = o_k < k
    at_s = s_ptr + b * s_b + start * s_p + (inner[:, None] * s_p + o_c[None, :] * s_c)
    at_t = t_ptr + b * t_b + start * t_p + (inner[:, None] * t_p + o_c[None, :] * t_c)
    at_basis = basis_ptr + o_c[:, None] * k + o_k[None, :]
    acc = tl.zeros([BR, BK], tl.float32)
    for first in range(0, c, BC):
        m_c = o_c < c - first
        m = counted[:, None] & m_c[None, :]
        b_s = tl.load(at_s, mask=m, other=0).to(tl.float32)
        b_t = tl.load(at_t, mask=m, other=0).to(tl.float32)
        b_d = to_tf32(b_s - b_t, PRECISION)  # before P is read: the other way round spills on sm_100
        P = tl.load(at_basis, mask=m_c[:, None] & m_k[None, :], other=0)
        acc = tl.dot(b_d, to_tf32(P, PRECISION), acc, input_precision=PRECISION)
        at_s += tl.cast(BC * s_c, tl.int64)
        at_t += tl.cast(BC * t_c, tl.int64)
        at_basis += BC * k
    # |Q_r|^2 over this block of directions
    at = (k_block * B + b) * p + start + inner
    tl.store(squares_ptr + at, tl.sum(acc * acc, 1), mask=m_r)
    if KEEP:
        at_q = q_ptr + (b * p + start) * k + (inner[:, None] * k + o_k[None, :])
        tl.store(at_q, acc, mask=m_r[:, None] & m_k[None, :])


@triton.jit(do_not_specialize=["p", "per"])
def spread(
    q_ptr,  # [B, p, k] float32
    basis_ptr,  # [c, k] float32
    weight_ptr,  # [samples] float32, or one number: 2 grad / norm
    ds_ptr,  # [B, p, c] by strides, in the dtype of s
    dt_ptr,
    p, per,  # positions of one sample: row r of program row b belongs to sample b + r // per
    c, k, s_b, s_p, s_c, t_b, t_p, t_c,
    BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, WEIGHTS: tl.constexpr, STUDENT: tl.constexpr,
    TEACHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(p, BR)
    tile = tl.program_id(0) % tiles
    b = (tl.program_id(0) // tiles).to(tl.int64)
    start = tl.cast(tile, tl.int64) * BR
    inner = tl.arange(0, BR)
    o_r, m_r = _rows(tile * BR, p, BR)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    o_k = tl.arange(0, BK)
    m_c = o_c < c
    at_q = q_ptr + (b * p + start) * k + (inner[:, None] * k + o_k[None, :])
    at_basis = basis_ptr + o_c[None, :] * k + o_k[:, None]
    acc = tl.zeros([BR, BC], tl.float32)
    for first in range(0, k, BK):
        m_k = o_k < k - first
        P = to_tf32(tl.load(at_basis, mask=m_k[:, None] & m_c[None, :], other=0), PRECISION)
        Q = to_tf32(tl.load(at_q, mask=m_r[:, None] & m_k[None, :], other=0), PRECISION)
        acc = tl.dot(Q, P, acc, input_precision=PRECISION)
        at_q += BK
        at_basis += BK
    if WEIGHTS:
        w = tl.load(weight_ptr + b + o_r // per, mask=m_r, other=0)
        acc *= w[:, None]
    else:
        acc *= tl.load(weight_ptr)
    m = m_r[:, None] & m_c[None, :]
    # ds = 2 grad / norm Q P', dt = - ds
    if STUDENT:
        at = ds_ptr + b * s_b + start * s_p + tl.program_id(1).to(tl.int64) * BC * s_c
        at += inner[:, None] * s_p + tl.arange(0, BC)[None, :] * s_c
        tl.store(at, acc.to(ds_ptr.dtype.element_ty), mask=m)
    if TEACHER:
        at = dt_ptr + b * t_b + start * t_p + tl.program_id(1).to(tl.int64) * BC * t_c
        at += inner[:, None] * t_p + tl.arange(0, BC)[None, :] * t_c
        tl.store(at, (-acc).to(dt_ptr.dtype.element_ty), mask=m)
