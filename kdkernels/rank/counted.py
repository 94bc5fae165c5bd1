# SPDX-License-Identifier: Apache-2.0
"""Soft ranks of long half rows on the CPU: counted instead of sorted, as they have at most 65,536 distinct values.

128,256 bfloat16 logits have about 2,800. A value and how often it occurs are one entry of the list of blocks, and an
element finds its rank in a table, by its own bits.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from . import blocks, rounds

LENGTH = 16384  # rows from here on are counted
WIDTH = 2**16 + 1  # of the table of a row; the last place is behind the row
ROWS = 16  # whose tables are held at once


def places(rows):
    """Where each element of half rows [R, n] without NaN looks itself up in tables [R, WIDTH], int64: descending."""
    bits = rows.add(0.0).view(torch.int16).numpy()  # -0.0 is 0.0
    key = bits >> 15
    key &= 0x7FFF
    key ^= bits  # order of the integers = order of the numbers
    return np.arange(0x7FFF, 0x7FFF + len(rows) * WIDTH, WIDTH)[:, None] - key


def values(place, dtype):
    """The numbers, float64, at places of a table; NaN for -inf and behind the row."""
    key = 0x7FFF - place
    key ^= (key >> 15) & 0x7FFF
    x = torch.from_numpy(key.astype(np.int16)).view(dtype).double().numpy()
    x[(place == WIDTH - 1) | (x == -math.inf)] = math.nan
    return x


def ranks(rows, eps, number, kl, dtype):
    """Ranks in `dtype` and block ids int32 of half rows [R, n]; None where pooling takes too many rounds.

    eps is a number, or one a row, [R, 1].
    """
    rank = np.empty(rows.shape, dtype=np.float64 if dtype == torch.float64 else np.float32)
    ids = np.empty(rows.shape, dtype=np.int32)
    for k in range(0, len(rows), ROWS):
        part = slice(k, k + ROWS)
        if not _ranks(rows[part], eps if np.ndim(eps) == 0 else eps[part], number, kl, rank[part], ids[part]):
            return None
    return torch.from_numpy(rank), torch.from_numpy(ids)


def _ranks(rows, eps, number, kl, rank, ids):
    R, n = rows.shape
    at = places(rows)
    count = np.bincount(at.reshape(-1), minlength=R * WIDTH)
    count[WIDTH - 1 :: WIDTH] = 1
    entry = (count != 0).nonzero()[0]  # of a bool: three times as fast
    row, place = np.divmod(entry, WIDTH)
    c = count.take(entry)
    s = values(place, rows.dtype)
    nothing = np.isnan(s)
    position = c.cumsum() - c - row * (n + 1)
    n_valid = n + 1 - np.bincount(row[nothing], c[nothing], R)
    w = n_valid.take(row) - position  # of the first of an entry
    e = eps if np.ndim(eps) == 0 else eps.reshape(-1).take(row)
    first = np.arange(len(entry))
    if number != 0:
        mass = c.astype(np.float64)
        if kl:
            rate = np.broadcast_to(1 / e, s.shape)
            found = blocks.Ratios(s, mass, blocks.weights(w, c), rate)
        else:
            found = blocks.Means(s + (position + mass / 2) * np.minimum(e, blocks.HARDEST), mass)
        found = rounds.pooled(found, first)
        if found is None:
            return False
        first = found[0]
    length, size = rounds.lengths(first, len(entry)), np.add.reduceat(c, first)
    level = w.take(first)
    if number == 0:
        r = np.repeat(level - (size - 1) / 2, length)
    else:
        r = (s - np.repeat(s.take(first), length)) / e
        if kl:
            np.exp(r, out=r)
            r *= np.repeat(blocks.weights(level, size) / np.add.reduceat(r * c, first), length)
        else:
            r += np.repeat(level - (size - 1) / 2 - np.add.reduceat(r * c, first) / size, length)
    r[nothing] = 0.0
    many = (size > 1) & ~nothing.take(first)
    number_of = rounds.numbers(many, first.searchsorted(row.searchsorted(np.arange(R))))
    for out, found in ((rank, r), (ids, np.repeat(number_of, length))):
        table = np.empty(R * WIDTH, dtype=out.dtype)
        table[entry] = found
        table.take(at, out=out, mode="clip")
    return True
