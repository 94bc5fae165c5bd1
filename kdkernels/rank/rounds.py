# SPDX-License-Identifier: Apache-2.0
"""Isotonic regression of many rows by rounds of pooling, with few blocks in hand: the CPU's way, as it asks for sizes.

While many blocks go, every run of violators of the whole list is pooled at once. What then still violates are sites,
single blocks in a list that falls everywhere else: each swallows its neighbours on both sides, several a round, up to
half of the way to the next site. Only adjacent violators are ever pooled, so the result is that of one after the other.
"""

from __future__ import annotations

import numpy as np

SHRINKS = 0.15  # of the blocks must go for another round over all of them
WINDOW = 4, 256  # neighbours on either side that a site looks at in a round
LOOKED_AT = 4096  # neighbours that all sites together look at, at least: fewer cost a round as much
FEWER = 4  # a site stops at the next one, settled or not: with fewer active ones all become a list again
SIDES = np.array([-1, 1])[:, None, None]


def pooled(blocks, first, most):
    """The first positions of all blocks of a list, pooled, where entry k begins at position first[k].

    None where that takes more than `most` rounds.
    """
    while True:
        joins = blocks.joins()
        gone = np.count_nonzero(joins)
        if gone == 0:
            return first
        if gone > SHRINKS * len(blocks):
            start, length = runs(joins)
            many = (length > 1).nonzero()[0]
            merged = blocks.pooled(start[many], length[many])
        else:
            sites = Sites(blocks, *runs_of_many(joins))
            most = sites.settle(most)
            if most <= 0:
                return None
            start, many, merged = sites.merged()
            if not sites.active.any():
                return first.take(start)
        blocks, first = blocks.take(start), first.take(start)
        blocks.put(many, merged)


def runs(joins):
    """First entry and length of each run of entries that join, of the others alone."""
    first = np.empty(len(joins) + 1, dtype=bool)
    first[0] = True
    np.logical_not(joins, out=first[1:])
    start = first.nonzero()[0]
    return start, lengths(start, len(first))


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


class Sites:
    """Blocks of several entries of a list, sorted; entry k of `pooled` is what list entries low[k] to high[k] make."""

    def __init__(self, blocks, start, length):
        self.list, self.pooled = blocks, blocks.pooled(start, length)
        self.low, self.high = start, start + length - 1
        self.active = np.ones(len(start), dtype=bool)

    def settle(self, most):
        """Pool until little violates, in at most that many rounds; how many are left."""
        enough = len(self.low) // FEWER
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
        inside = np.zeros(len(self.list) + 1, dtype=np.int8)
        inside[self.low + 1] += 1
        inside[self.high + 1] -= 1
        start = (inside[:-1].cumsum(dtype=np.int8) == 0).nonzero()[0]
        inner = self.high - self.low
        return start, self.low + inner - inner.cumsum(), self.pooled

    def _merge(self):
        """Pool sites that touch and violate."""
        while True:
            touch = self.high[:-1] + 1 == self.low[1:]
            touch &= self.active[:-1] | self.active[1:]
            k = touch.nonzero()[0]
            if len(k) == 0:
                return
            pairs = self.pooled.take(np.stack([k, k + 1], 1).ravel())
            k = k[pairs.joins()[::2]]
            if len(k) == 0:
                return
            joins = np.zeros(len(self.low) - 1, dtype=bool)
            joins[k] = True
            start, length = runs(joins)
            of_many = (length > 1).nonzero()[0]
            merged = self.pooled.pooled(start[of_many], length[of_many])
            self.pooled = self.pooled.take(start)
            self.pooled.put(of_many, merged)
            self.low, self.high = self.low[start], self.high[start + length - 1]
            self.active = self.active[start]
            self.active[of_many] = True

    def _swallow(self, active, odd):
        low, high = self.low[active], self.high[active]
        # entries free on either side; those between two active sites are shared, an odd one by turns
        before, after = active - 1, active + 1
        gap = np.empty((2, len(active)), dtype=np.int64)
        gap[0] = low - 1 - self.high.take(before, mode="wrap")
        gap[1] = self.low.take(after, mode="wrap") - 1 - high
        shared = np.empty(gap.shape, dtype=bool)
        shared[0] = self.active.take(before, mode="wrap")
        shared[1] = self.active.take(after, mode="wrap")
        if active[0] == 0:
            gap[0, 0], shared[0, 0] = low[0], False
        if active[-1] == len(self.low) - 1:
            gap[1, -1], shared[1, -1] = len(self.list) - 1 - high[-1], False
        share = np.where(shared, (gap + [[odd], [1 - odd]]) // 2, gap)
        K = min(max(LOOKED_AT // len(active), WINDOW[0]), WINDOW[1], max(int(share.max()), 1))
        step = np.arange(K)
        index = np.stack([low - 1, high + 1])[..., None] + SIDES * step
        np.clip(index, 0, len(self.list) - 1, out=index)
        free = step < share[..., None]
        count, pooled = self.list.swallow(self.pooled.take(active), index, SIDES, free)
        moved = (count > 0).any(0)
        settled = ~moved & ((share == gap) | (share > 0)).all(0)
        self.low[active], self.high[active] = low - count[0], high + count[1]
        of_moved = (moved).nonzero()[0]
        self.pooled.put(active[of_moved], pooled.take(of_moved))
        self.active[active[settled]] = False
