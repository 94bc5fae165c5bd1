# SPDX-License-Identifier: Apache-2.0
"""One launch adds the rows of a batch to the sums of their classes, for both networks and the counts, without atomics.

A program owns one class and a block of columns of one network: it looks for its label among all rows, reads only those,
and adds them in their order: the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS, COLUMNS = 32, 64


@triton.jit
def _sum_class(x_ptr, sums_ptr, labels_ptr, counted_ptr, c, block, B, d, BR: tl.constexpr, BC: tl.constexpr):
    """Adds the rows of class c, columns of `block`, in float64; returns how many there are."""
    o_c = block * BC + tl.arange(0, BC)
    m_c = o_c < d
    acc = tl.zeros([BC], tl.float64)
    count = tl.zeros([BR], tl.int64)
    for first in range(0, B, BR):
        o_r = first + tl.arange(0, BR)
        m_r = o_r < B
        label = tl.load(labels_ptr + o_r, mask=m_r, other=-1)
        m_r = m_r & (label == c) & (tl.load(counted_ptr + o_r, mask=m_r, other=0) != 0)
        at = x_ptr + tl.cast(first, tl.int64) * d + (tl.arange(0, BR)[:, None] * d + o_c[None, :])
        b_x = tl.load(at, mask=m_r[:, None] & m_c[None, :], other=0).to(tl.float64)
        acc += tl.sum(b_x, 0)
        count += m_r.to(tl.int64)
    at = sums_ptr + tl.cast(c, tl.int64) * d + o_c
    tl.store(at, tl.load(at, mask=m_c, other=0) + acc, mask=m_c)
    return tl.sum(count)


@triton.jit(do_not_specialize=["B"])
def class_sums(
    s_ptr,  # [B, d] any float dtype
    t_ptr,  # [B, e]
    labels_ptr,  # [B] int64
    counted_ptr,  # [B] uint8
    s_sums_ptr,  # [C, d] float64, added to
    t_sums_ptr,  # [C, e]
    counts_ptr,  # [C] int64
    B, d, e, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    c, block = tl.program_id(0), tl.program_id(1)
    student = tl.cdiv(d, BC)
    if block < student:
        count = _sum_class(s_ptr, s_sums_ptr, labels_ptr, counted_ptr, c, block, B, d, BR, BC)
        if block == 0:
            tl.store(counts_ptr + c, tl.load(counts_ptr + c) + count)
    else:
        _sum_class(t_ptr, t_sums_ptr, labels_ptr, counted_ptr, c, block - student, B, e, BR, BC)


def add_rows(s, t, labels, counted, s_sums, t_sums, counts):
    (B, d), e = s.shape, t.shape[1]
    if B == 0:
        return
    grid = (len(counts), triton.cdiv(d, COLUMNS) + triton.cdiv(e, COLUMNS))
    with torch.cuda.device_of(s):
        class_sums[grid](
            s.contiguous(), t.contiguous(), labels.long().contiguous(), counted.contiguous().view(torch.uint8),
            s_sums, t_sums, counts, B, d, e, BR=ROWS, BC=COLUMNS, num_warps=4,
        )  # fmt: skip
