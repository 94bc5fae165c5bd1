# SPDX-License-Identifier: Apache-2.0
"""Rows sorted on the CPU by NumPy's vectorised sort of integers, 5 to 10 times as fast as `torch.sort` on one thread.

Rows are sorted into [R, n + 1] with a NaN behind each, and NaN in the place of absent entries: blocks are then runs of
one long list (`blocks.py`, `rounds.py`), and no row needs a mask of its own.
"""

from __future__ import annotations

import math
import sys

import numpy as np
import torch

from .threads import over_rows


def packed_sort(rows):
    """Float32 and half rows [R, n] without NaN in descending order, stable, as float32 [R, n + 1], and where each
    stood in its row, int64; column n holds NaN.

    NumPy sorts integers with vector instructions, so a value and its position are packed into one: 64 bits for float32,
    32 for halves.
    """
    R, n = rows.shape
    rows = rows.detach().add(0.0)  # -0.0 is 0.0
    values = rows.float()
    half = rows.dtype.itemsize == 2 and n < 2**16
    bits = rows.view(torch.int16).numpy() if half else values.numpy().view(np.int32)
    top = np.iinfo(bits.dtype).max
    s, order = np.empty((R, n + 1), dtype=np.float32), np.empty((R, n + 1), dtype=np.int64)

    def sort(part):
        # order of the integers = order of the numbers
        key = bits[part] >> (15 if half else 31)
        key &= top
        key ^= bits[part]
        at = order[part]
        packed = np.empty(at.shape, dtype=np.int32) if half else at
        halves = packed.view(bits.dtype).reshape(len(packed), n + 1, 2).transpose(2, 0, 1)
        high, low = halves[:: -1 if sys.byteorder == "little" else 1]
        np.invert(key, out=high[:, :n])
        high[:, n] = top
        low[:] = np.arange(n + 1, dtype=np.uint16 if half else np.int32).view(low.dtype)
        packed.sort(axis=1)
        packed &= 0xFFFF if half else 0xFFFFFFFF
        if half:
            at[...] = packed
        torch.gather(values[part], 1, torch.from_numpy(at)[:, :n], out=torch.from_numpy(s)[part, :n])
        s[part, n] = math.nan

    over_rows(sort, R, n)
    return s, order


def sorted_rows(rows):
    """Rows [R, n] without NaN sorted descending, float64 [R, n + 1], the last column NaN; where each stood."""
    R, n = rows.shape
    if rows.dtype != torch.float64 or bool((rows.float().double() == rows).all()):
        s, order = packed_sort(rows.float() if rows.dtype == torch.float64 else rows)
        return s.astype(np.float64), order
    s, order = np.full((R, n + 1), math.nan), np.empty((R, n + 1), dtype=np.int64)
    found = torch.sort(rows, dim=-1, descending=True, stable=True)
    s[:, :n] = found.values.numpy()
    order[:, :n], order[:, n] = found.indices.numpy(), n
    return s, order


def sort_descending(theta):
    """Rows [..., n] sorted descending, NaN first, stable, and their order in the row."""
    single = theta.detach().float()
    poisoned = single.isnan().any()
    if poisoned or (theta.dtype == torch.float64 and not bool((single.double() == theta).all())):
        return torch.sort(theta, dim=-1, descending=True, stable=True)
    n = theta.shape[-1]
    s, order = packed_sort(single.reshape(-1, n))
    s, order = torch.from_numpy(s)[:, :n], torch.from_numpy(order)[:, :n]
    return s.to(theta.dtype, copy=True).reshape(theta.shape), order.reshape(theta.shape).contiguous()


def absent(s):
    """Whether any entry of sorted rows is absent, made NaN; the number of the others, [R, 1]."""
    R, n = len(s), s.shape[1] - 1
    if not (s[:, n - 1] == -math.inf).any():
        return False, np.full((R, 1), n)
    gone = s == -math.inf
    s[gone] = math.nan
    return True, n - gone.sum(-1, keepdims=True)


def unsorted(t, order):
    """t of sorted rows, [R (n + 1)], at the places order [R, n] that it came from."""
    R, n = order.shape
    return t.new_empty(R, n).scatter_(1, order, t.view(R, n + 1)[:, :n])
