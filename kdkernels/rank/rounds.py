# SPDX-License-Identifier: Apache-2.0
"""Isotonic regression of many rows by rounds of pooling, with few blocks in hand: the CPU's way, as it asks for sizes.

While many blocks go, every run of violators of the whole list is pooled at once. What then still violates are sites,
single blocks in a list that falls everywhere else: each swallows its neighbours on both sides, several a round, up to
half of the way to the next site. Only adjacent violators are ever pooled, so the result is that of one after the other.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch

SHRINKS = 0.08  # of the blocks must go for another round over all of them
WINDOW = 4, 256  # neighbours on either side that a site looks at in a round
SMALL = 8192  # entries: so few are not made a list again
LOOKED_AT = 2048  # neighbours that all sites together look at, at least: fewer cost a round as much
LONG = 8192  # entries: what a thread may pool beside others
LEAPS = np.unique([k << j for j in range(40) for k in (2, 3)]) - 2  # where lists can tell without what is between
FEW, TURNS = 4096, 16  # a list so short is pooled as a whole for so many rounds
ROUNDS, ENTRIES = 100, 1000  # and one more for so many entries: what the merges would cost is not far
FEWER = 4  # a site stops at the next one, settled or not: with fewer active ones all become a list again
SIDES = np.array([-1, 1])[:, None, None]


def pooled(blocks, first):
    """The first positions of all blocks of a list, pooled, where entry k begins at position first[k], and these.

    None where one site meets its neighbours one after the other, for too many rounds.
    """
    most = ROUNDS + len(blocks) // ENTRIES
    for turn in itertools.count():
        joins = blocks.joins()
        gone = np.count_nonzero(joins)
        if gone == 0:
            return first, blocks
        if gone > SHRINKS * len(blocks) or (len(blocks) < FEW and turn < TURNS):
            start = starts(joins)
            blocks = blocks.joined(start)
        else:
            sites = Sites(blocks, *runs_of_many(joins))
            most = sites.settle(most)
            if most <= 0:
                return None
            start, many, merged = sites.merged()
            blocks = blocks.replaced(start, many, merged)
            if not sites.active.any():
                return first.take(start), blocks
        first = first.take(start)


def thinned(blocks, first):
    """The list and the first positions after those rounds over all of it in which many go: calls on long arrays."""
    while len(blocks) >= LONG:
        joins = blocks.joins()
        if np.count_nonzero(joins) <= SHRINKS * len(blocks):
            break
        start = starts(joins)
        blocks, first = blocks.joined(start), first.take(start)
    return blocks, first


def starts(joins):
    """First entry of each run of entries that join, of the others alone."""
    first = np.empty(len(joins) + 1, dtype=bool)
    first[0] = True
    np.logical_not(joins, out=first[1:])
    return first.nonzero()[0]


def runs(joins):
    """The same, and the length of each."""
    start = starts(joins)
    return start, lengths(start, len(joins) + 1)


def lengths(start, size):
    """Of the runs that begin at start[k]; the last one ends at `size`."""
    length = np.empty_like(start)
    np.subtract(start[1:], start[:-1], out=length[:-1])
    length[-1:] = size - start[-1:]
    return length


def runs_of_many(joins):
    """First entry and length of each run of two or more entries that join."""
    k = joins.nonzero()[0]
    begin = np.empty(len(k), dtype=bool)
    begin[0] = True
    np.not_equal(k[1:] - 1, k[:-1], out=begin[1:])
    at = begin.nonzero()[0]
    length = lengths(at, len(k))
    length += 1
    return k[at], length


def numbered(start, size):
    """The number of the run that each of `size` entries is in; run k begins at start[k], start[0] = 0."""
    begins = torch.zeros(size, dtype=torch.bool)
    begins.numpy()[start[1:]] = True
    return begins.cumsum(0).numpy()


def numbers(many, of_row):
    """Ids of blocks, int32, from 0 in each row, -1 where not `many`; block of_row[r] is the first of row r."""
    ids = many.cumsum(dtype=np.int32)
    before = ids.take(of_row) - many.take(of_row)
    ids -= np.repeat(before + 1, lengths(of_row, len(many))).astype(np.int32, copy=False)
    ids[~many] = -1
    return ids


class Sites:
    """Blocks of several entries of a list, sorted; entry k of `pooled` is what list entries low[k] to high[k] make.

    A settled one without entries stands at either end, so that each of the others has neighbours.
    """

    def __init__(self, blocks, start, length):
        end = len(blocks) - 1  # a NaN
        low, length = np.concatenate([[end], start, [end]]), np.concatenate([[1], length, [1]])
        self.list, self.pooled = blocks, blocks.pooled(low, length)
        self.low, self.high = low, low + length - 1
        self.low[0] = self.high[0] = -1
        self.low[-1] = self.high[-1] = end + 1
        self.active = np.ones(len(low), dtype=bool)
        self.active[0] = self.active[-1] = False

    def settle(self, most):
        """Pool until little violates, in at most that many rounds; how many are left."""
        enough = int((len(self.low) - 2) / FEWER) if len(self.list) > SMALL else 0
        while most > 0:
            self._merge()
            active = self.active.nonzero()[0]
            if len(active) <= enough:
                break
            self._swallow(active, most % 2)
            most -= 1
        return most

    def merged(self):
        """The entries of the list that begin a block; which of them are sites, and those."""
        low, high = self.low[1:-1], self.high[1:-1]
        inside = np.zeros(len(self.list) + 1, dtype=np.int8)
        inside[low + 1] = 1
        inside[high + 1] -= 1
        start = np.logical_not(inside[:-1].cumsum(dtype=np.int8)).nonzero()[0]
        inner = high - low
        return start, low + inner - inner.cumsum(), self.pooled.take(np.arange(1, len(low) + 1))

    def _merge(self):
        """Pool sites that touch and violate."""
        while True:
            touch = self.high[:-1] + 1 == self.low[1:]
            touch &= self.active[:-1] | self.active[1:]
            k = touch.nonzero()[0]
            if len(k):
                pairs = np.empty((len(k), 2), dtype=np.int64)
                pairs[:, 0] = k
                np.add(k, 1, out=pairs[:, 1])
                k = k[self.pooled.take(pairs.reshape(-1)).joins()[::2]]
            if len(k) == 0:
                return
            joins = np.zeros(len(self.low) - 1, dtype=bool)
            joins[k] = True
            start, length = runs(joins)
            many = (length > 1).nonzero()[0]
            merged = self.pooled.pooled(start[many], length[many])
            self.pooled = self.pooled.take(start)
            self.pooled.put(many, merged)
            self.low, self.high = self.low[start], self.high[start + length - 1]
            self.active = self.active[start]
            self.active[many] = True

    def _swallow(self, active, odd):
        low, high = self.low[active], self.high[active]
        # entries free on either side; those between two active sites are shared, an odd one by turns
        gap = np.empty((2, len(active)), dtype=np.int64)
        share = np.empty_like(gap)
        for side, other, extra in ((0, active - 1, odd), (1, active + 1, 1 - odd)):
            own = gap[side]
            np.subtract(*((low, self.high[other]) if side == 0 else (self.low[other], high)), out=own)
            own -= 1
            shared = self.active[other]
            share[side] = own + (shared & extra) >> shared
        if self.list.leaps:  # not over the end of a row
            room = self.list.room(low, high)
            np.minimum(gap, room, out=gap)
            np.minimum(share, room, out=share)
            step = LEAPS[: LEAPS.searchsorted(max(int(share.max()), 1))]
        else:
            K = min(max(LOOKED_AT // len(active), WINDOW[0]), WINDOW[1], max(int(share.max()), 1))
            step = np.arange(K)
        index = np.empty((2, len(active), len(step)), dtype=np.int64)
        np.subtract((low - 1)[:, None], step, out=index[0])
        np.add((high + 1)[:, None], step, out=index[1])
        count, pooled = self.list.swallow(self.pooled.take(active), index, SIDES, step < share[..., None], step)
        moved = count.any(0)
        settled = ~(moved | ((share == 0) & (gap > 0)).any(0))
        self.low[active], self.high[active] = low - count[0], high + count[1]
        k = moved.nonzero()[0]
        self.pooled.put(active[k], pooled.take(k))
        self.active[active[settled]] = False
