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
    stood, int64.

    NumPy sorts integers with vector instructions, so a value and its position are packed into one: 64 bits for float32,
    32 for halves and their places in a row. Positions count through all rows; column n holds NaN, which stands behind.
    """
    R, n = rows.shape
    rows = rows.detach().add(0.0)  # -0.0 is 0.0
    values = rows.float().numpy()
    half = rows.dtype.itemsize == 2 and n < 2**16
    bits = rows.view(torch.int16).numpy() if half else values.view(np.int32)
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
        if half:
            low[:] = np.arange(n + 1).astype(np.uint16).view(np.int16)
        else:
            low[:, :n] = np.arange(part.start * n, part.stop * n, dtype=np.int32).reshape(-1, n)
        packed.sort(axis=1)
        if half:
            packed &= 0xFFFF
            np.add(packed, np.arange(part.start * n, part.stop * n, n)[:, None], out=at)
        else:
            at &= 0xFFFFFFFF
        at[:, n] = np.arange(R * n + part.start, R * n + part.stop)
        values.take(at, out=s[part], mode="clip")
        s[part, n] = math.nan

    over_rows(sort, R, n)
    return s, order


def sorted_rows(rows):
    """Rows [R, n] without NaN sorted descending, float64 [R, n + 1], the last column NaN, and where each stood."""
    R, n = rows.shape
    if rows.dtype != torch.float64 or bool((rows.float().double() == rows).all()):
        s, order = packed_sort(rows.float() if rows.dtype == torch.float64 else rows)
        return s.astype(np.float64), order
    s, order = np.full((R, n + 1), math.nan), np.empty((R, n + 1), dtype=np.int64)
    found = torch.sort(rows, dim=-1, descending=True, stable=True)
    s[:, :n] = found.values.numpy()
    np.add(found.indices.numpy(), np.arange(0, R * n, n)[:, None], out=order[:, :n])
    order[:, n] = np.arange(R * n, R * (n + 1))
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
    order = order - torch.arange(0, len(s) * n, n)[:, None]
    return s.to(theta.dtype, copy=True).reshape(theta.shape), order.reshape(theta.shape)


def absent(s):
    """Whether any entry of sorted rows is absent, made NaN; the number of the others, [R, 1]."""
    R, n = len(s), s.shape[1] - 1
    if not (s[:, n - 1] == -math.inf).any():
        return False, np.full((R, 1), n)
    gone = s == -math.inf
    s[gone] = math.nan
    return True, n - gone.sum(-1, keepdims=True)


def unsorted(t, order, R, n):
    """t [R (n + 1)] at the places it came from, [R, n]."""
    return torch.empty_like(t).scatter_(0, order, t)[: R * n].reshape(R, n)
