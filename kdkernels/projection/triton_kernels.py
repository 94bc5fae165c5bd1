# SPDX-License-Identifier: Apache-2.0
"""Projected MSE on a GPU: s and t are read once in the layout they have, the projection is summed where it is computed.

A program owns BR positions of one sample (of all samples, where strides let them merge) and BK directions. Strides are
arguments: a stride of 1 is known at compile time, and loads run along it; EVEN, that 16 divides p, makes them wide. Two
warps a program: products then are those of registers on every architecture, where a warp takes its factors from shared
memory as they were copied; those of warpgroups want the basis transposed there. Sums go to one slot a row: no atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..triton_tf32 import product


class Planes(NamedTuple):
    """[B, p, c] by strides, any float dtype."""

    ptr: torch.Tensor
    step_b: int
    step_p: int
    step_c: int


@triton.jit
def _rows(start, p, BR: tl.constexpr):
    o_r = start + tl.arange(0, BR)
    return o_r, o_r < p


@triton.jit(do_not_specialize=["p"])
def project(
    s, t,  # Planes
    basis_ptr,  # [c, k] float32, contiguous
    mask_ptr,  # [B, p] uint8, or None
    squares_ptr,  # [k blocks, B, p] float32: square sums of Q
    q_ptr,  # [B, p, k] float32: Q = (s - t) P, or None
    B, p, c, k, BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if EVEN:
        p = p // 16 * 16
    tiles, blocks = tl.cdiv(p, BR), tl.cdiv(k, BK)
    k_block = tl.program_id(0) % blocks  # of the same rows one after the other: DRAM is read once
    tile = tl.program_id(0) // blocks % tiles
    b = (tl.program_id(0) // blocks // tiles).to(tl.int64)
    start = tl.cast(tile, tl.int64) * BR
    inner = tl.arange(0, BR)
    o_r, m_r = _rows(tile * BR, p, BR)
    counted = m_r
    if mask_ptr is not None:
        counted = tl.load(mask_ptr + b * p + o_r, mask=m_r, other=0) != 0
    o_k = k_block * BK + tl.arange(0, BK)
    o_c = tl.arange(0, BC)
    m_k = o_k < k
    at_s = s.ptr + b * s.step_b + start * s.step_p + (inner[:, None] * s.step_p + o_c[None, :] * s.step_c)
    at_t = t.ptr + b * t.step_b + start * t.step_p + (inner[:, None] * t.step_p + o_c[None, :] * t.step_c)
    at_basis = basis_ptr + o_c[:, None] * k + o_k[None, :]
    acc = tl.zeros([BR, BK], tl.float32)
    for first in range(0, c, BC):
        m_c = o_c < c - first
        m = counted[:, None] & m_c[None, :]
        b_s = tl.load(at_s, mask=m, other=0).to(tl.float32)
        b_t = tl.load(at_t, mask=m, other=0).to(tl.float32)
        b_d = b_s - b_t
        P = tl.load(at_basis, mask=m_c[:, None] & m_k[None, :], other=0)
        acc = product(b_d, P, acc, PRECISION)
        at_s += tl.cast(BC * s.step_c, tl.int64)
        at_t += tl.cast(BC * t.step_c, tl.int64)
        at_basis += BC * k
    # |Q_r|^2 over this block of directions
    at = (k_block * B + b) * p + start + inner
    tl.store(squares_ptr + at, tl.sum(acc * acc, 1), mask=m_r)
    if q_ptr is not None:
        at_q = q_ptr + (b * p + start) * k + (inner[:, None] * k + o_k[None, :])
        tl.store(at_q, acc, mask=m_r[:, None] & m_k[None, :])


@triton.jit
def _write(planes, tile, b, start, first, m, BR: tl.constexpr, BC: tl.constexpr):
    at = planes.ptr + b * planes.step_b + start * planes.step_p + tl.cast(first, tl.int64) * planes.step_c
    at += tl.arange(0, BR)[:, None] * planes.step_p + tl.arange(0, BC)[None, :] * planes.step_c
    tl.store(at, tile.to(planes.ptr.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["p", "per"])
def spread(
    ds, dt,  # Planes, or None where nobody asks
    q_ptr,  # [B, p, k] float32
    basis_ptr,  # [c, k] float32
    weight_ptr,  # [samples] float32, or one number: 2 grad / norm
    p, per,  # positions of one sample: row r of program row b belongs to sample b + r // per
    c, k,
    BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, ONE: tl.constexpr, WEIGHTS: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each num_programs(1)-th block of channels; Q is read once where BK holds all directions."""
    if EVEN:
        p = p // 16 * 16
    tiles = tl.cdiv(p, BR)
    tile = tl.program_id(0) % tiles
    b = (tl.program_id(0) // tiles).to(tl.int64)
    start = tl.cast(tile, tl.int64) * BR
    inner = tl.arange(0, BR)
    o_r, m_r = _rows(tile * BR, p, BR)
    o_k = tl.arange(0, BK)
    at_q = q_ptr + (b * p + start) * k + (inner[:, None] * k + o_k[None, :])
    if WEIGHTS:
        w = tl.load(weight_ptr + b + o_r // per, mask=m_r, other=0)[:, None]
    else:
        w = tl.load(weight_ptr)
    if ONE:
        Q = tl.load(at_q, mask=m_r[:, None] & (o_k < k)[None, :], other=0)
    for first in range(tl.program_id(1) * BC, c, tl.num_programs(1) * BC):
        o_c = first + tl.arange(0, BC)
        m_c = o_c < c
        at_basis = basis_ptr + o_c[None, :] * k + o_k[:, None]
        if ONE:
            P = tl.load(at_basis, mask=(o_k < k)[:, None] & m_c[None, :], other=0)
            acc = product(Q, P, tl.zeros([BR, BC], tl.float32), PRECISION)
        else:
            acc = tl.zeros([BR, BC], tl.float32)
            for done in range(0, k, BK):
                m_k = o_k < k - done
                P = tl.load(at_basis + done, mask=m_k[:, None] & m_c[None, :], other=0)
                Q = tl.load(at_q + done, mask=m_r[:, None] & m_k[None, :], other=0)
                acc = product(Q, P, acc, PRECISION)
        acc *= w
        m = m_r[:, None] & m_c[None, :]
        # ds = 2 grad / norm Q P', dt = - ds
        if ds is not None:
            _write(ds, acc, b, start, first, m, BR, BC)
        if dt is not None:
            _write(dt, -acc, b, start, first, m, BR, BC)
