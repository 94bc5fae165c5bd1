# SPDX-License-Identifier: Apache-2.0
"""Isotonic regression of many rows by rounds of pooling, with few blocks in hand: the CPU's way, as it asks for sizes.

First every run of violators is pooled at once, while that shrinks the rows; then pairs of violators, through a linked
list, so that a round costs what still violates and not what has settled. The number of rounds depends on the data:
beyond what the merges of `isotonic.py` would cost, `pooled` gives up and they take over.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import pad

SHRINKS = 0.05  # of the blocks must go for another round over all of them
ELEMENTS_A_ROUND = 1000  # the merges handle about this many elements in the time of one round of pairs


class Means:
    """l2: V is the mean of y over the block, c its size."""

    def __init__(self, y):
        self.V = y.reshape(-1)
        self.c = torch.ones_like(self.V)

    def pool_runs(self, number, first):
        """Pool block k into block number[k]; `first` marks the first of each run."""
        S = _sums(self.V * self.c, number, first)
        self.c = _sums(self.c, number, first)
        self.V = S / self.c

    def pool_pairs(self, i, j):
        c_i, c_j = self.c[i], self.c[j]
        total = c_i + c_j
        self.V[i] = (self.V[i] * c_i + self.V[j] * c_j) / total
        self.c[i] = total


class Ratios:
    """kl: V = p + log Z - log W with p the first of the block, Z = sum exp(p_i - p), W = sum w_i, c its size."""

    def __init__(self, p, w):
        # a copy: pairs are pooled in place, and the merges may yet need w
        self.p, self.W = p.reshape(-1), torch.empty_like(p).copy_(w).reshape(-1)
        self.V = self.p - self.W.log()
        self.Z = torch.ones_like(self.V)
        self.c = torch.ones_like(self.V)

    def pool_runs(self, number, first):
        p = self.p[first]
        self.Z = _sums(self.Z * (self.p - p[number]).exp_(), number, first)
        self.W, self.c = _sums(self.W, number, first), _sums(self.c, number, first)
        self.p, self.V = p, p + self.Z.log() - self.W.log()

    def pool_pairs(self, i, j):
        p = self.p[i]
        Z, W = self.Z[i] + self.Z[j] * (self.p[j] - p).exp_(), self.W[i] + self.W[j]
        self.Z[i], self.W[i], self.V[i] = Z, W, p + Z.log() - W.log()
        self.c[i] += self.c[j]


def _sums(t, number, first):
    return t.new_zeros(int(first.sum())).index_add_(0, number, t)


def pooled(state, R: int, n: int):
    """The sizes of all blocks, row after row, int64, of a fresh state on [R, n]; None where that takes too long."""
    last = torch.zeros(R, n, dtype=torch.bool)  # of its row
    last[:, -1] = True
    last = last.reshape(-1)
    while True:
        V = state.V
        joins = (V[:-1] <= V[1:]).logical_and_(~last[:-1])
        gone = int(joins.sum())
        if gone < SHRINKS * len(V):
            break
        first = pad(~joins, (1, 0), value=True)
        state.pool_runs(first.cumsum(0).sub_(1), first)
        last = last[pad(~joins, (0, 1), value=True)]
    if gone and not _pool_pairs(state, joins, last, limit=50 + R * n // ELEMENTS_A_ROUND):
        return None
    return state.c[state.c > 0].long()


def _pool_pairs(state, joins, last, limit: int) -> bool:
    """Pool violating neighbours until none is left; what was pooled away has size 0. False if the limit was reached."""
    m = len(state.V)
    # entry m is the neighbour of a block at the end of its row; NaN, which no comparison holds for
    state.V = pad(state.V, (0, 1), value=math.nan)
    following, before = torch.arange(1, m + 2), torch.arange(-1, m)
    following[:m][last] = m
    before[1:m][last[:-1]] = m
    before[0] = following[m] = m
    joins = pad(joins, (0, 2))
    stamp = torch.zeros(m + 1, dtype=torch.bool)
    active = joins.nonzero().squeeze(1)
    for _ in range(limit):
        if len(active) == 0:
            state.V = state.V[:m]
            return True
        leads = ~joins[before[active]]  # the first pair of each run of violators
        i, others = active[leads], active[~leads]
        j = following[i]
        beyond = following[j]
        state.pool_pairs(i, j)
        state.c[j], joins[j], stamp[i] = 0, False, True
        following[i], before[beyond] = beyond, i
        ahead = before[i]
        again = torch.cat([i, ahead[~stamp[ahead]]])  # none twice
        stamp[i] = False
        found = state.V[again] <= state.V[following[again]]
        joins[again] = found
        active = torch.cat([others[joins[others]], again[found]])
    return False
