# SPDX-License-Identifier: Apache-2.0
"""Lists of blocks of isotonic regression in NumPy, for the CPU: what pooling needs of each, one class a problem.

Rows stand one after the other in a list, with a NaN behind each: no comparison with NaN holds, so nothing is ever
pooled across it. An entry is a block; its value is relative to one of its own elements, so that far away values and
long rows cost no digits. `rounds.py` pools.
"""

from __future__ import annotations

import numpy as np

LARGEST = 300.0  # an exponent above it belongs to a block far above the one that asks: it never joins
HARDEST = 1e290  # a strength beyond it is as good: positions times strength stay finite


def weights(first, length):
    """The sum of first, first - 1, ..., `length` of them."""
    total = first * 2.0
    total += 1
    total -= length
    total *= length
    total *= 0.5
    return total


def geometric(length, rate):
    """sum exp(-i rate), i < length."""
    return np.expm1(-length * rate) / np.expm1(-rate)


def ranges(start, length):
    """Indices start[k], ..., start[k] + length[k] - 1 for each k, and where each of these begins among them."""
    begin = length.cumsum()
    size = int(begin[-1]) if len(begin) else 0
    begin -= length
    index = np.repeat(start - begin, length)
    index += np.arange(size)
    return index, begin


class Blocks:
    """Arrays of one length; entries in the order of the row."""

    arrays: tuple[str, ...] = ()
    leaps = False  # whether `swallow` may skip entries

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

    def joined(self, start):
        """The list where the entries from each of `start` to the next are one."""
        length = np.diff(start, append=len(self))
        many = (length > 1).nonzero()[0]
        return self.replaced(start, many, self.pooled(start[many], length[many]))

    def replaced(self, start, many, merged):
        """The list of entries `start`, where `merged` stand in the place of entries `many` of these."""
        found = self.take(start)
        found.put(many, merged)
        return found

    def swallow(self, sites, index, sign, free, step):
        """How many entries of index [2, sites, K], in their order, each site pools with, and the site afterwards.

        index[0] leads to the left, index[1] to the right, `step` entries away from the next; free [2, sites, K] says
        which of them may be asked.
        """
        raise NotImplementedError


def before(first, t):
    """t [2, sites, K] behind first, a number or [sites, 1], along the last dimension."""
    out = np.empty((*t.shape[:-1], t.shape[-1] + 1))
    out[..., :1] = first
    out[..., 1:] = t
    return out


def leading(joins, free):
    """The number of leading True of joins and free along the last dimension."""
    both = np.empty((*joins.shape[:-1], joins.shape[-1] + 1), dtype=bool)
    both[..., -1] = False
    np.logical_and(joins, free, out=both[..., :-1])
    return both.argmin(-1)


def at(total, count):
    """total[..., count], of the left and of the right."""
    return total.reshape(-1).take(np.arange(0, total.size, total.shape[-1]).reshape(count.shape) + count)


class Means(Blocks):
    """l2: the value V of a block is the mean of s + h position, c its size.

    Rounding V by a unit in the last place is rounding s by one: it decides what is as good as equal. Float32 values
    are so far from each other that it decides nothing else.
    """

    arrays = "V", "c"
    falls = True  # ranks: values have to fall

    def joins(self):
        return self.V[:-1] <= self.V[1:] if self.falls else self.V[:-1] >= self.V[1:]

    def pooled(self, start, length):
        index, begin = ranges(start, length)
        c, V = self.c.take(index), self.V.take(index)
        V *= c
        c = np.add.reduceat(c, begin)
        return type(self)(np.add.reduceat(V, begin) / c, c)

    def swallow(self, sites, index, sign, free, step):
        c = self.c.take(index, mode="clip")
        over = self.V.take(index, mode="clip")
        over -= sites.V[:, None]
        total = before(0.0, c * over).cumsum(-1)
        mass = before(sites.c[:, None], c).cumsum(-1)
        over -= total[..., :-1] / mass[..., :-1]
        over *= sign if self.falls else -sign
        count = leading(over >= 0, free)
        c = at(mass, count).sum(0) - sites.c
        return count, type(self)(sites.V + at(total, count).sum(0) / c, c)


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
        index, begin = ranges(start, length)
        own = np.repeat(start, length)
        t = self.t.take(index)
        t -= self.t.take(own)
        t *= self.rate.take(own)
        Z = np.exp(t, out=t)
        Z *= self.Z.take(index)
        W = np.add.reduceat(self.W.take(index), begin)
        return type(self)(self.t.take(start), np.add.reduceat(Z, begin), W, self.rate.take(start))

    def swallow(self, sites, index, sign, free, step):
        t = self.t.take(index, mode="clip")
        t -= sites.t[:, None]
        t *= sites.rate[:, None]
        Z = np.exp(np.minimum(t, LARGEST, out=t), out=t)
        Z *= self.Z.take(index, mode="clip")
        W = self.W.take(index, mode="clip")
        sum_Z, sum_W = (before(own[:, None], t).cumsum(-1) for own, t in ((sites.Z, Z), (sites.W, W)))
        Z *= sum_W[..., :-1]
        W *= sum_Z[..., :-1]
        Z -= W
        Z *= sign
        count = leading(Z >= 0, free)
        Z, W = at(sum_Z, count).sum(0) - sites.Z, at(sum_W, count).sum(0) - sites.W
        return count, type(self)(sites.t, Z, W, sites.rate)


class Exponentials(Blocks):
    """kl of sorts: z - s, the logarithms of the sums of exp(z) and of exp(s) over the block, both of any range."""

    arrays = "z", "s"

    def joins(self):
        return self.z[:-1] - self.z[1:] <= self.s[:-1] - self.s[1:]

    def pooled(self, start, length):
        index, begin = ranges(start, length)
        out = []
        for t in (self.z, self.s):
            first = t.take(start)
            E = t.take(index)
            E -= np.repeat(first, length)
            out.append(first + np.log(np.add.reduceat(np.exp(E, out=E), begin)))
        return type(self)(*out)

    def swallow(self, sites, index, sign, free, step):
        z, s = self.z.take(index, mode="clip"), self.s.take(index, mode="clip")
        sum_z, sum_s = (np.logaddexp.accumulate(before(-np.inf, t), -1) for t in (z, s))
        z -= s
        z -= np.logaddexp(sum_z[..., :-1], sites.z[:, None])
        z += np.logaddexp(sum_s[..., :-1], sites.s[:, None])
        z *= sign
        count = leading(z >= 0, free)
        out = []
        for own, total in ((sites.z, sum_z), (sites.s, sum_s)):
            left, right = at(total, count)
            out.append(np.logaddexp(np.logaddexp(own, left), right))
        return count, type(self)(*out)
