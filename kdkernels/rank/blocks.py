# SPDX-License-Identifier: Apache-2.0
"""Lists of blocks of isotonic regression in NumPy, for the CPU: what pooling needs of each, one class a problem.

Rows stand one after the other in a list, with a NaN behind each: no comparison with NaN holds, so nothing is ever
pooled across it. An entry is a block; its value is relative to one of its own elements, so that far away values and
long rows cost no digits. `rounds.py` pools.
"""

from __future__ import annotations

import numpy as np

LARGEST = 300.0  # an exponent above it belongs to a block far above the one that asks: it never joins


def ranges(start, length):
    """Indices start[k], ..., start[k] + length[k] - 1 for each k, the first of its run for each, where runs begin."""
    ends = np.cumsum(length)
    begin = ends - length
    own = np.repeat(start, length)
    step = np.arange(len(own))
    step -= np.repeat(begin, length)
    step += own
    return step, own, begin


class Blocks:
    """Arrays of one length; entries in the order of the row."""

    arrays: tuple[str, ...] = ()

    def __init__(self, *arrays):
        for name, array in zip(self.arrays, arrays, strict=True):
            setattr(self, name, array)

    def __len__(self):
        return len(getattr(self, self.arrays[0]))

    def take(self, index):
        return type(self)(*(getattr(self, name).take(index) for name in self.arrays))

    def put(self, index, other):
        for name in self.arrays:
            getattr(self, name)[index] = getattr(other, name)

    def joins(self):
        """Whether neighbours k, k + 1 pool."""
        raise NotImplementedError

    def pooled(self, start, length):
        """The blocks made of entries start[k], ..., start[k] + length[k] - 1."""
        raise NotImplementedError

    def swallow(self, sites, index, sign, free):
        """How many entries of index [2, sites, K], in their order, each site pools with, and the site afterwards.

        index[0] leads to the left, index[1] to the right; free [2, sites, K] says which of them may be asked.
        """
        raise NotImplementedError


def _leading(joins):
    """The number of leading True along the last dimension."""
    count = joins.argmin(-1)
    return np.where(joins.all(-1), joins.shape[-1], count)


def _at(total, count, nothing=0.0):
    """total[..., count - 1], `nothing` where count is 0."""
    last = np.take_along_axis(total, np.maximum(count - 1, 0)[..., None], -1)[..., 0]
    return np.where(count > 0, last, nothing)


class Means(Blocks):
    """l2: the value of a block is t + x, t one of its elements, x the mean of what is over it and of h * position."""

    arrays = "t", "x", "c"
    falls = True  # ranks: values have to fall

    def joins(self):
        fall = (self.t[:-1] - self.t[1:]) + (self.x[:-1] - self.x[1:])
        return fall <= 0 if self.falls else fall >= 0

    def pooled(self, start, length):
        index, own, begin = ranges(start, length)
        c = self.c.take(index)
        over = self.t.take(index)
        over -= self.t.take(own)
        over += self.x.take(index)
        x = self.x.take(start)
        over -= np.repeat(x, length)
        over *= c
        total = np.add.reduceat(c, begin)
        return type(self)(self.t.take(start), x + np.add.reduceat(over, begin) / total, total)

    def swallow(self, sites, index, sign, free):
        c = self.c.take(index)
        over = self.t.take(index)
        over -= sites.t[:, None]
        over += self.x.take(index)
        over -= sites.x[:, None]
        total = (c * over).cumsum(-1)
        mass = c.cumsum(-1)
        mass += sites.c[:, None]
        over[..., 1:] -= total[..., :-1] / mass[..., :-1]
        over *= sign if self.falls else -sign
        count = _leading((over >= 0) & free)
        left, right = _at(total, count)
        mass_left, mass_right = _at(mass - sites.c[:, None], count)
        c = sites.c + mass_left + mass_right
        return count, type(self)(sites.t, sites.x + (left + right) / c, c)


class Rising(Means):
    """l2 of sorts: the roles of values and positions are exchanged."""

    falls = False


class Ratios(Blocks):
    """kl of ranks: log of Z exp(t rate) / W, t one of the elements, Z the sum of exp((s - t) rate), W of weights."""

    arrays = "t", "Z", "W", "rate"

    def joins(self):
        fall = self.t[1:] - self.t[:-1]
        fall *= self.rate[1:]
        return self.Z[:-1] * self.W[1:] <= np.exp(fall, out=fall) * self.Z[1:] * self.W[:-1]

    def pooled(self, start, length):
        index, own, begin = ranges(start, length)
        t = self.t.take(index)
        t -= self.t.take(own)
        t *= self.rate.take(own)
        Z = np.exp(t, out=t)
        Z *= self.Z.take(index)
        W = np.add.reduceat(self.W.take(index), begin)
        return type(self)(self.t.take(start), np.add.reduceat(Z, begin), W, self.rate.take(start))

    def swallow(self, sites, index, sign, free):
        t = self.t.take(index)
        t -= sites.t[:, None]
        t *= sites.rate[:, None]
        Z = np.exp(np.minimum(t, LARGEST, out=t), out=t)
        Z *= self.Z.take(index)
        W = self.W.take(index)
        sum_Z, sum_W = Z.cumsum(-1), W.cumsum(-1)
        fall = Z * sites.W[:, None] - sites.Z[:, None] * W
        fall[..., 1:] += Z[..., 1:] * sum_W[..., :-1] - sum_Z[..., :-1] * W[..., 1:]
        fall *= sign
        count = _leading((fall >= 0) & free)
        Z, W = (_at(t, count).sum(0) for t in (sum_Z, sum_W))
        return count, type(self)(sites.t, sites.Z + Z, sites.W + W, sites.rate)


class Exponentials(Blocks):
    """kl of sorts: z - s, the logarithms of the sums of exp(z) and of exp(s) over the block, both of any range."""

    arrays = "z", "s"

    def joins(self):
        return self.z[:-1] - self.z[1:] <= self.s[:-1] - self.s[1:]

    def pooled(self, start, length):
        index, own, begin = ranges(start, length)
        out = []
        for t in (self.z, self.s):
            first = t.take(start)
            E = t.take(index)
            E -= np.repeat(first, length)
            out.append(first + np.log(np.add.reduceat(np.exp(E, out=E), begin)))
        return type(self)(*out)

    def swallow(self, sites, index, sign, free):
        z, s = self.z.take(index), self.s.take(index)
        sum_z, sum_s = np.logaddexp.accumulate(z, -1), np.logaddexp.accumulate(s, -1)
        fall = z - s
        fall[..., 1:] -= np.logaddexp(sum_z[..., :-1], sites.z[:, None])
        fall[..., 1:] += np.logaddexp(sum_s[..., :-1], sites.s[:, None])
        fall[..., 0] -= sites.z - sites.s
        fall *= sign
        count = _leading((fall >= 0) & free)
        out = []
        for own, total in ((sites.z, sum_z), (sites.s, sum_s)):
            left, right = _at(total, count, -np.inf)
            out.append(np.logaddexp(np.logaddexp(own, left), right))
        return count, type(self)(*out)
