# SPDX-License-Identifier: Apache-2.0
"""Soft ranks of sorted rows on the CPU: blocks are pooled and ranks written, for large parts of the rows in threads."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from . import blocks, prefix, rounds
from .ordering import absent, sorted_rows, unsorted
from .threads import groups, over_rows

GROUP = 2**16  # elements


def first_runs(s, n_valid, eps, kl, sort):
    """First position and length of the runs of neighbours that pool, in rows s [R, n + 1] as one list.

    eps is a number, or one a row, [R, 1].
    """
    eps = np.minimum(eps, blocks.HARDEST)
    fall = np.empty_like(s)
    np.subtract(s.reshape(-1)[:-1], s.reshape(-1)[1:], out=fall.reshape(-1)[:-1])
    fall[-1, -1] = math.nan
    if sort:
        joins = fall * eps >= 1
    elif kl:
        same = n_valid[:1] if (n_valid == n_valid[0]).all() else n_valid
        w = np.maximum(same - np.arange(s.shape[1]), 1.0)
        step = np.log(w)
        step[..., :-1] -= step[..., 1:]
        joins = fall <= eps * step
    else:
        joins = fall <= eps
    return rounds.runs(joins.reshape(-1)[:-1])


def first_blocks(s, n_valid, eps, kl, sort, start, length):
    """The list of blocks that these runs are."""
    width = s.shape[1]
    flat = s.reshape(-1)
    eps = np.minimum(eps, blocks.HARDEST)
    rate = 1 / eps

    def of_blocks(t):
        """A number, or one a row, for each block."""
        return t if np.ndim(t) == 0 else t.reshape(-1).take(start // width)

    if not kl:
        V = np.add.reduceat(flat, start)
        V /= length
        middle = length * 0.5
        middle += start
        middle *= of_blocks(rate if sort else eps)
        V += middle
        return (blocks.Rising if sort else blocks.Means)(V, length.astype(np.float64))
    t = flat.take(start)
    if sort:  # few entries pool
        rate = of_blocks(rate)
        z = (start % width) * -rate
        k = (length > 1).nonzero()[0]
        index, begin = blocks.ranges(start[k], length[k])
        over = flat.take(index)
        over -= np.repeat(t[k], length[k])
        t[k] += np.log(np.add.reduceat(np.exp(over, out=over), begin))
        z[k] += np.log(blocks.geometric(length[k], rate if np.ndim(rate) == 0 else rate[k]))
        return blocks.Exponentials(z, t)
    over = t.take(rounds.numbered(start, flat.size))
    np.subtract(flat, over, out=over)
    over.reshape(s.shape)[...] *= rate
    Z = np.add.reduceat(np.exp(over, out=over), start)
    first = (n_valid - np.arange(width)).reshape(-1).take(start)
    return blocks.Ratios(t, Z, blocks.weights(first, length), np.broadcast_to(of_blocks(rate), t.shape))


def first_positions(s, n_valid, eps, kl, sort):
    """Where the blocks of rows s begin; None where that takes too long."""
    start, length = first_runs(s, n_valid, eps, kl, sort)
    if len(start) == s.size:
        return start
    found = rounds.pooled(first_blocks(s, n_valid, eps, kl, sort, start, length), start)
    return found and found[0]


class Part:
    """Some rows, sorted, and the first list of their blocks, none for hard ranks: all ties are found."""

    def __init__(self, rows, e, number, kl):
        self.e, self.kl, self.hard, self.list = e, kl and number > 0, number == 0, None
        self.s, self.order = sorted_rows(rows)
        self.some_absent, self.n_valid = absent(self.s)
        self.sums = not (self.hard or self.kl or rows.dtype == torch.float64)
        self.sums = self.sums and prefix.centred(self.s, self.some_absent, self.n_valid, e)
        self.start, length = first_runs(self.s, self.n_valid, e, self.kl, False)
        if self.sums:
            first = prefix.first_blocks(self.s, self.some_absent, e, self.start)
            self.list, self.start = rounds.thinned(first, self.start)
        elif not self.hard:
            self.list = first_blocks(self.s, self.n_valid, e, self.kl, False, self.start, length)

    def ranks(self, first, found, dtype, need):
        """Ranks in `dtype` and block ids [R, n] for the blocks that begin at positions `first`, `found` if l2."""
        s, e = self.s, self.e
        R, width = s.shape
        flat, rows = s.reshape(-1), np.arange(0, s.size, width)
        length = rounds.lengths(first, s.size)
        of_row = first.searchsorted(rows)  # each begins a block
        weight = (rows + self.n_valid.reshape(-1)).take(rounds.numbered(of_row, len(first))) - first
        own = rounds.numbered(first, s.size)
        if self.hard:
            r = (weight - (length - 1) / 2).take(own)
            r[np.isnan(flat)] = math.nan
        elif self.kl:
            r = flat.take(first).take(own)
            np.subtract(flat, r, out=r)
            r.reshape(s.shape)[...] /= e
            np.exp(r, out=r)
            share = blocks.weights(weight, length)
            share /= np.add.reduceat(r, first)  # not what pooling found: its rounding depends on the other rows
            r *= share.take(own)
        else:
            if self.sums:
                r = flat
                mean = found.means()
            else:
                r = flat.take(first).take(own)
                np.subtract(flat, r, out=r)
                mean = np.add.reduceat(r, first)
                mean /= length
            mean /= e if np.ndim(e) == 0 else e.reshape(-1).take(rounds.numbered(of_row, len(first)))
            level = (1 - length) * 0.5
            level += weight
            level -= mean
            r.reshape(s.shape)[...] /= e
            r += level.take(own)
        if self.some_absent:
            r[np.isnan(r)] = 0.0
        order = torch.from_numpy(self.order.reshape(-1))
        rank = unsorted(torch.from_numpy(r).to(dtype), order, R, width - 1)
        if not need:
            return rank, torch.empty_like(rank, dtype=torch.int32)
        ids = rounds.numbers(length > 1, of_row).take(own)
        return rank, unsorted(torch.from_numpy(ids), order, R, width - 1)


def ranks(rows, e, number, kl, need, dtype):
    """Ranks in `dtype` and block ids int32 of parts of rows [R, n] without NaN, a list in order; None where pooling
    takes too many rounds. e is the strength, a number, or one a row [R, 1]; `number` 0 gives hard ranks."""
    R, n = rows.shape

    def whole(share):
        out = []
        for rows_of_one in groups(share, n, GROUP if kl else R * n):
            part = Part(rows[rows_of_one], e if np.ndim(e) == 0 else e[rows_of_one], number, kl)
            found = (part.start, None) if part.hard else rounds.pooled(part.list, part.start)
            if found is None:
                return None
            out.append(part.ranks(*found, dtype, need))
        return out

    found = over_rows(whole, R, n)
    return None if any(part is None for part in found) else list(itertools.chain(*found))
