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

GROUP = 2**16  # elements of kl rows ranked together: what is made of more is given back to the system and fetched anew
LONG = 8  # elements a block on average, from which NumPy repeats a number for each faster than it looks them up


def first_runs(s, n_valid, eps, kl, sort):
    """First position of each run of neighbours that pool, in rows s [R, n + 1] as one list.

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
    return rounds.starts(joins.reshape(-1)[:-1])


def places(n_valid, shape):
    """What hard ranks are without ties: n_valid, n_valid - 1, ..., 1 in each row, then 0."""
    place = np.maximum((n_valid[:1] if (n_valid == n_valid[0]).all() else n_valid) - np.arange(float(shape[1])), 0.0)
    found = np.empty(shape)
    found[...] = place
    return found


def first_blocks(s, n_valid, eps, kl, sort, start):
    """The list of blocks that these runs are."""
    length = rounds.lengths(start, s.size)
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
    k = (length > 1).nonzero()[0]
    index, begin = blocks.ranges(start[k], length[k])
    over = flat.take(index)
    over -= np.repeat(t[k], length[k])
    if sort:
        rate = of_blocks(rate)
        z = (start % width) * -rate
        t[k] += np.log(np.add.reduceat(np.exp(over, out=over), begin))
        z[k] += np.log(blocks.geometric(length[k], rate if np.ndim(rate) == 0 else rate[k]))
        return blocks.Exponentials(z, t)
    over *= rate if np.ndim(rate) == 0 else np.repeat(rate.reshape(-1).take(start[k] // width), length[k])
    Z = np.ones(len(start))
    Z[k] = np.add.reduceat(np.exp(over, out=over), begin)
    W = places(n_valid, s.shape).reshape(-1).take(start)
    W[k] = blocks.weights(W[k], length[k])
    return blocks.Ratios(t, Z, W, np.broadcast_to(of_blocks(rate), t.shape))


def first_positions(s, n_valid, eps, kl, sort):
    """Where the blocks of rows s begin; None where that takes too long."""
    start = first_runs(s, n_valid, eps, kl, sort)
    if len(start) == s.size:
        return start
    found = rounds.pooled(first_blocks(s, n_valid, eps, kl, sort, start), start)
    return found and found[0]


class Part:
    """Some rows, sorted, and the first list of their blocks, none for hard ranks: all ties are found."""

    def __init__(self, rows, e, number, kl):
        self.e, self.kl, self.hard, self.list = e, kl and number > 0, number == 0, None
        self.s, self.order = sorted_rows(rows)
        self.some_absent, self.n_valid = absent(self.s)
        largest = None
        if not (self.hard or self.kl or rows.dtype == torch.float64):
            largest = prefix.centred(self.s, self.some_absent, self.n_valid, e)
        self.sums = largest is not None
        self.fold = self.sums and prefix.folded(largest, self.s.shape[1])
        self.start = first_runs(self.s, self.n_valid, e, self.kl, False)
        if self.sums:
            self.e = np.minimum(e, blocks.HARDEST)
            first = prefix.first_blocks(self.s, self.some_absent, self.e, self.start, self.fold)
            self.list, self.start = rounds.thinned(first, self.start)
        elif not self.hard:
            self.list = first_blocks(self.s, self.n_valid, e, self.kl, False, self.start)

    def ranks(self, first, found, dtype, need):
        """Ranks in `dtype` and block ids [R, n] for the blocks that begin at positions `first`, `found` if l2."""
        s = self.s
        R, width = s.shape
        length = rounds.lengths(first, s.size)
        if self.hard or self.kl:
            r, ids = self._sparse(first, length, need)
        else:
            r, ids = self._dense(first, length, found, need)
        if self.some_absent:
            r[np.isnan(r)] = 0.0
        order = torch.from_numpy(self.order)[:, :-1]
        rank = unsorted(torch.from_numpy(r).to(dtype), order)
        if not need:
            return rank, torch.empty_like(rank, dtype=torch.int32)
        return rank, unsorted(torch.from_numpy(ids), order)

    def _sparse(self, first, length, need):
        """Only blocks of several elements are visited: those alone keep their place, as most do under kl."""
        s, e = self.s, self.e
        R, width = s.shape
        r = places(self.n_valid, s.shape).reshape(-1)
        many = (length > 1).nonzero()[0]
        first, length = first.take(many), length.take(many)
        index, begin = blocks.ranges(first, length)
        place = r.take(first)
        if self.hard:
            r[index] = np.repeat(place - (length - 1) / 2, length)
        else:
            t = s.reshape(-1).take(index)
            t -= np.repeat(s.reshape(-1).take(first), length)
            t /= e if np.ndim(e) == 0 else np.repeat(e.reshape(-1).take(first // width), length)
            share = blocks.weights(place, length)
            # not what pooling found: its rounding depends on the other rows
            share /= np.add.reduceat(np.exp(t, out=t), begin)
            t *= np.repeat(share, length)
            r[index] = t
        if not need:
            return r, None
        ids = np.full(s.size, -1, dtype=np.int32)
        of_row = first.searchsorted(np.arange(0, s.size, width))
        numbers = np.arange(len(first)) - np.repeat(of_row, rounds.lengths(of_row, len(first)))
        ids[index] = np.repeat(numbers, length)
        return r, ids

    def _dense(self, first, length, found, need):
        """l2: every element is shifted by the level of its block, `found` where running sums were taken."""
        s, e = self.s, self.e
        of_row = first.searchsorted(np.arange(0, s.size, s.shape[1]))  # each begins a block
        blocks_of_row = rounds.lengths(of_row, len(first))
        own = None if s.size > LONG * len(first) else rounds.numbered(first, s.size)

        def of_elements(t):
            return np.repeat(t, length) if own is None else t.take(own)

        flat = s.reshape(-1)
        level = np.repeat(self.n_valid.reshape(-1) + 0.5, blocks_of_row)
        if self.fold:  # the values have the positions in them
            r, mean = flat, found.V
        else:
            level += np.repeat(np.arange(0, s.size, s.shape[1]), blocks_of_row)
            level -= first
            level -= length * 0.5
            if self.sums:
                r, mean = flat, found.means()
            else:
                r = of_elements(flat.take(first))
                np.subtract(flat, r, out=r)
                mean = np.add.reduceat(r, first)
                mean /= length
        mean /= e if np.ndim(e) == 0 else np.repeat(e.reshape(-1), blocks_of_row)
        level -= mean
        r.reshape(s.shape)[...] /= e
        r += of_elements(level)
        return r, of_elements(rounds.numbers(length > 1, of_row)) if need else None


def ranks(rows, e, number, kl, need, dtype):
    """Ranks in `dtype` and block ids int32 of parts of rows [R, n] without NaN, a list in order; None where pooling
    takes too many rounds. e is the strength, a number, or one a row [R, 1]; `number` 0 gives hard ranks."""

    R, n = rows.shape

    def of_share(share):
        out = []
        for some in groups(share, n, GROUP if kl else R * n):
            part = Part(rows[some], e if np.ndim(e) == 0 else e[some], number, kl)
            found = (part.start, None) if part.hard else rounds.pooled(part.list, part.start)
            if found is None:
                return None
            out.append(part.ranks(*found, dtype, need))
        return out

    found = over_rows(of_share, R, n)
    return None if any(part is None for part in found) else list(itertools.chain(*found))
