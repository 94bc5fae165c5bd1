# SPDX-License-Identifier: Apache-2.0
"""Soft ranks, l2, of sorted float32 and half rows on the CPU: a block is two places in the running sums of its row.

Pooling then adds nothing up: the mean of any run of elements is a difference of two sums. The rows are centred, and
what the sums lose is far below a rank's last place while strength and row fit each other (`centred`); other rows are
pooled by `blocks.Means`. Where they fit well the positions are in the sums too (`folded`): fewer passes over the list.
"""

from __future__ import annotations

import numpy as np
import torch

from . import rounds
from .blocks import Blocks, leading

SPAN, SUMS = 2.0**24, 2.0**36  # the range of a row in units of its strength, and that times its length, at most
FOLDED = 2.0**26  # that range plus the length, times the length, at most, for positions in the sums
COARSE = 2.0**-20  # of the range: centres are multiples of it, so that sums of float32 values are hardly rounded


def level(q, c, Q, C, h):
    """The value of blocks between sums q and Q, counts c and C: mean of their elements + h (mean position + 1/2).

    h is None where the sums have the positions in them.
    """
    V = Q - q
    V /= C - c
    if h is not None:
        middle = C + c
        middle *= 0.5 * h
        V += middle
    return V


class Stretches(Blocks):
    """Blocks anywhere in the list: value, running sum and count where each begins and ends, strength."""

    arrays = "V", "q", "c", "Q", "C", "h"

    def joins(self):
        return self.V[:-1] <= self.V[1:]

    def pooled(self, start, length):
        last = start + length
        last -= 1
        return between(self.q.take(start), self.c.take(start), self.Q.take(last), self.C.take(last), self.h.take(start))


def between(q, c, Q, C, h):
    return Stretches(level(q, c, Q, C, h), q, c, Q, C, h)


class Prefixes(Blocks):
    """A list of blocks, each of which ends where the next one begins: q and c have one entry more than there are.

    The blocks `ends` are the NaN behind rows. h is a number, or one a block, or None: see `level`.
    """

    leaps = True

    def __init__(self, q, c, h, ends, V=None):
        self.q, self.c, self.h, self.ends = q, c, h, ends
        self.V = level(q[:-1], c[:-1], q[1:], c[1:], h) if V is None else V
        self.V[ends] = np.nan

    def __len__(self):
        return len(self.V)

    joins = Stretches.joins

    def _strengths(self, index):
        if self.h is None:
            return np.zeros(index.shape)
        return np.full(index.shape, self.h) if np.ndim(self.h) == 0 else self.h.take(index, mode="clip")

    def joined(self, start, V=None):
        edge = np.empty(len(start) + 1, dtype=np.int64)
        edge[:-1] = start
        edge[-1] = len(self)
        h = self.h if np.ndim(self.h) == 0 else self.h.take(start)
        return Prefixes(self.q.take(edge), self.c.take(edge), h, start.searchsorted(self.ends), V)

    def replaced(self, start, many, sites):
        V = self.V.take(start)
        V[many] = sites.V
        return self.joined(start, V)

    def means(self):
        """The means of the elements, positions apart."""
        mean = self.q[1:] - self.q[:-1]
        mean /= self.c[1:] - self.c[:-1]
        return mean

    def pooled(self, start, length):
        stop = start + length
        q, c = self.q, self.c
        found = between(q.take(start), c.take(start), q.take(stop), c.take(stop), self._strengths(start))
        found.V[np.isnan(self.V.take(start))] = np.nan  # the settled ones at either end of the sites
        return found

    def room(self, low, high):
        """The number of entries on the left of low and on the right of high, [2, sites], in the same row."""
        k = self.ends.searchsorted(low)
        out = np.empty((2, len(low)), dtype=np.int64)
        np.subtract(low, np.where(k > 0, self.ends.take(k - 1), -1), out=out[0])
        np.subtract(self.ends.take(k), high, out=out[1])
        out -= 1
        return out

    def swallow(self, sites, index, sign, free, step):
        """As `Blocks.swallow`; entries between those looked at need not be: a mean is known without them, and if one
        entry joins, all nearer ones do."""
        edge = index.copy()
        edge[0] += 1  # the near side of an entry
        total, count = np.empty((2, *index.shape[:2], 1))
        total[0, :, 0], total[1, :, 0], count[0, :, 0], count[1, :, 0] = sites.Q, sites.q, sites.C, sites.c
        h = None if self.h is None else sites.h[:, None]
        V = level(self.q.take(edge, mode="clip"), self.c.take(edge, mode="clip"), total, count, h)
        np.subtract(self.V.take(index, mode="clip"), V, out=V)
        V *= sign
        found = leading(V >= 0, free)
        count = np.where(found > 0, step.take(found - 1) + 1, 0)
        left, right = edge[0, :, 0] - count[0], edge[1, :, 0] + count[1]
        q, c = self.q, self.c
        return count, between(q.take(left), c.take(left), q.take(right), c.take(right), sites.h)


def centred(s, some_absent, n_valid, eps) -> float | None:
    """Subtract from sorted rows s [R, n + 1] a value in their middle, in place; the largest range of a row in units of
    its strength. None, and nothing done, where their running sums would not be exact enough, see MATH.md."""
    width = s.shape[1]
    high, low, middle = s[:, :1], s[:, -2:-1], s[:, (width - 1) // 2, None]
    if some_absent:
        low, middle = (np.take_along_axis(s, at, -1) for at in (np.maximum(n_valid - 1, 0), n_valid // 2))
        high, low, middle = (np.nan_to_num(t) for t in (high, low, middle))
    span = high - low
    largest = float((span / eps).max())
    if not (largest <= SPAN and width * largest <= SUMS):
        return None
    unit = np.ldexp(COARSE, np.frexp(span)[1])
    middle = middle / unit
    np.rint(middle, out=middle)
    middle *= unit
    s -= middle
    return largest


def folded(largest: float, width: int) -> bool:
    """Whether the positions may be in the sums of rows of that range."""
    return width * (largest + width) <= FOLDED


def first_blocks(s, some_absent, eps, start, fold: bool):
    """The list of blocks that begin at positions `start` of centred rows s [R, n + 1]."""
    width = s.shape[1]
    present = np.nan_to_num(s) if some_absent else s
    sums = np.zeros(s.shape)  # of what is before
    torch.cumsum(torch.from_numpy(present)[:, :-1], -1, out=torch.from_numpy(sums)[:, 1:])
    if fold:
        squares = 0.5 * np.arange(width) ** 2.0
        if np.ndim(eps):
            torch.from_numpy(sums).addr_(torch.from_numpy(eps[:, 0]), torch.from_numpy(squares))
        else:
            sums += eps * squares
    q, c = np.zeros((2, len(start) + 1))
    q[:-1], c[:-1], c[-1] = sums.reshape(-1).take(start), start, s.size
    nothing = np.isnan(s.reshape(-1)).nonzero()[0] if some_absent else np.arange(width - 1, s.size, width)
    h = None if fold else eps
    if np.ndim(h):
        h = np.repeat(h.reshape(-1), rounds.lengths(start.searchsorted(np.arange(0, s.size, width)), len(start)))
    return Prefixes(q, c, h, start.searchsorted(nothing))
