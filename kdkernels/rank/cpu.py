# SPDX-License-Identifier: Apache-2.0
"""Soft ranks and sorts of CPU tensors in PyTorch and NumPy: few passes over a row, as sizes may be read here.

Rows are sorted into [R, n + 1] with a NaN behind each, and NaN in the place of absent entries: blocks are then runs of
one long list (`blocks.py`, `rounds.py`), sums over them sums of slices, and no row needs a mask of its own.
"""

from __future__ import annotations

import math
import sys

import numpy as np
import torch

from . import blocks, counted, rounds, strength
from .threads import QUIET, over_rows

SORTED = 2**16  # elements that are worth a thread where they are only sorted
GROUP = 2**17  # elements whose gradient is found together


def packed_sort(rows):
    """Float32 rows [R, n] without NaN in descending order, stable, as float32 [R, n + 1], and where each stood, int64.

    NumPy sorts integers with vector instructions, so a float32 and its position are packed into one: 5 to 10 times
    faster than `torch.sort` on one thread. Positions count through all rows; column n holds NaN, which stands behind.
    """
    R, n = rows.shape
    bits = rows.detach().add(0.0).numpy().view(np.int32)  # -0.0 is 0.0
    s, order = np.empty((R, n + 1), dtype=np.float32), np.empty((R, n + 1), dtype=np.int64)

    def sort(part):
        # order of the integers = order of the numbers
        key = bits[part] >> 31
        key &= 0x7FFFFFFF
        key ^= bits[part]
        packed = order[part]
        halves = packed.view(np.int32).reshape(len(packed), n + 1, 2).transpose(2, 0, 1)
        high, low = halves[:: -1 if sys.byteorder == "little" else 1]
        np.invert(key, out=high[:, :n])
        first, last = part.start * n, part.stop * n
        low[:, :n] = np.arange(first, last, dtype=np.int32).reshape(-1, n)
        high[:, n] = 0x7FFFFFFF
        low[:, n] = np.arange(R * n + part.start, R * n + part.stop)
        packed.sort(axis=1)
        key = np.invert(high)
        mask = key >> 31
        mask &= 0x7FFFFFFF
        np.bitwise_xor(key, mask, out=s[part].view(np.int32))
        packed &= 0xFFFFFFFF

    over_rows(sort, R, n, SORTED)
    return s, order


def sorted_rows(rows):
    """Rows [R, n] without NaN sorted descending, float64 [R, n + 1], the last column NaN, and where each stood."""
    R, n = rows.shape
    if rows.dtype != torch.float64 or bool((rows.float().double() == rows).all()):
        s, order = packed_sort(rows.float())
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


def poisoned_rows(rows):
    """Which rows [R, n] hold NaN or +inf."""
    return ~(rows.amax(-1) < math.inf)


def absent(s):
    """Whether any entry of sorted rows is absent, made NaN; the number of the others, [R, 1]."""
    R, n = len(s), s.shape[1] - 1
    if not (s[:, n - 1] == -math.inf).any():
        return False, np.full((R, 1), n)
    gone = s == -math.inf
    s[gone] = math.nan
    return True, n - gone.sum(-1, keepdims=True)


def first_positions(s, n_valid, eps, kl, sort):
    """Positions in s [R, n + 1], as one list, at which the blocks of its rows begin; None where that takes too long.

    eps is a number, or one a row, [R, 1].
    """
    width = s.shape[1]
    flat = s.reshape(-1)
    single = np.ndim(eps) == 0
    eps = np.minimum(eps, blocks.HARDEST)

    def of_entries(t, at=None):
        """A number, or one a row, at positions of the list."""
        if single:
            return t
        return t.repeat(width) if at is None else t.reshape(-1).take(at // width)

    fall = np.empty_like(flat)
    np.subtract(flat[:-1], flat[1:], out=fall[:-1])
    fall[-1] = math.nan
    rows = fall.reshape(s.shape)
    if sort:
        joins = rows * eps >= 1
    elif kl:
        same = n_valid[:1] if (n_valid == n_valid[0]).all() else n_valid
        w = np.maximum(same - np.arange(width), 1.0)
        step = np.log(w)
        step[..., :-1] -= step[..., 1:]
        joins = rows <= eps * step
    else:
        joins = rows <= eps
    start, length = rounds.runs(joins.reshape(-1)[:-1])
    if len(start) == len(flat):
        return start
    if not kl:
        V = np.add.reduceat(flat, start)
        V /= length
        middle = length * 0.5
        middle += start
        middle *= of_entries(1 / eps if sort else eps, start)
        V += middle
        return rounds.pooled((blocks.Rising if sort else blocks.Means)(V, length.astype(np.float64)), start)
    t = flat.take(start)
    if sort:  # few entries pool
        rate = of_entries(1 / eps, start)
        z = (start % width) * -rate
        k = (length > 1).nonzero()[0]
        index, begin = blocks.ranges(start[k], length[k])
        over = flat.take(index)
        over -= np.repeat(t[k], length[k])
        t[k] += np.log(np.add.reduceat(np.exp(over, out=over), begin))
        z[k] += np.log(blocks.geometric(length[k], rate if single else rate[k]))
        return rounds.pooled(blocks.Exponentials(z, t), start)
    over = np.repeat(t, length)
    np.subtract(flat, over, out=over)
    rate = 1 / eps
    over.reshape(s.shape)[...] *= rate
    Z = np.add.reduceat(np.exp(over, out=over), start)
    first = (n_valid - np.arange(width)).reshape(-1).take(start)
    rate = np.broadcast_to(rate, (len(s), 1)).reshape(-1).take(start // width)
    found = blocks.Ratios(t, Z, blocks.weights(first, length), rate)
    return rounds.pooled(found, start)


def rank_forward(x, strengths, number, relative, kl, descending, need, dtype):
    """As `torch_impl.rank_forward`; None where pooling takes too many rounds."""
    with np.errstate(**QUIET):
        return _rank_forward(x.detach(), strengths, number, relative, kl, descending, need, dtype)


def _rank_forward(x, strengths, number, relative, kl, descending, need, dtype):
    shape, n = x.shape, x.shape[-1]
    rows = x.reshape(-1, n)
    if descending:
        rows = negated(rows)
    poisoned = poisoned_rows(rows)
    how = strength.Strength(number, strengths, relative)
    eps = strength.of_rows(rows, rows != -math.inf if relative else None, poisoned, how)
    bad = bool(poisoned.any())
    if bad:
        rows = rows.masked_fill(poisoned[:, None], 0.0)  # a constant, for now
    e = number
    if relative or strengths is not None:
        e = eps.detach().masked_fill(poisoned, 1.0)[:, None].numpy()

    def ranks(part):
        own = e if np.ndim(e) == 0 else e[part]
        if rows.dtype.itemsize == 2 and n >= counted.LENGTH:
            return counted.ranks(rows[part], own, number, kl, dtype)
        return _sorted_ranks(rows[part], own, number, kl, need, dtype)

    found = over_rows(ranks, *rows.shape)
    if any(part is None for part in found):
        return None
    rank, ids = found[0] if len(found) == 1 else (torch.cat(parts) for parts in zip(*found, strict=True))
    if bad:
        rank[poisoned], ids[poisoned] = math.nan, -1
    rank, eps = rank.to(dtype).reshape(shape), eps.reshape(shape[:-1])
    if not need:
        return rank, x.new_empty(0, dtype=torch.int32), eps
    ids = torch.full(shape, -1, dtype=torch.int32) if number == 0 else ids.reshape(shape)
    return rank, ids, eps


def _sorted_ranks(rows, e, number, kl, need, dtype):
    """Ranks in `dtype` and block ids [R, n] of rows without NaN; None where pooling takes too many rounds."""
    R, n = rows.shape
    s, order = sorted_rows(rows)
    some_absent, n_valid = absent(s)
    flat = s.reshape(-1)
    start = first_positions(s, n_valid, e, kl and number > 0, False)
    if start is None:
        return None
    length = rounds.lengths(start, flat.size)
    of_row = start.searchsorted(np.arange(0, flat.size, n + 1))  # each begins a block
    first = np.repeat(np.arange(0, flat.size, n + 1) + n_valid.reshape(-1), rounds.lengths(of_row, len(start))) - start
    many = length > 1
    if number == 0:
        r = np.repeat(first - (length - 1) / 2, length)
        r[np.isnan(flat)] = math.nan
    else:
        t = np.repeat(flat.take(start), length)
        r = np.subtract(flat, t, out=t)
        r.reshape(s.shape)[...] /= e
        if kl:
            np.exp(r, out=r)
            share = blocks.weights(first, length)
            share /= np.add.reduceat(r, start)
            r *= np.repeat(share, length)
        else:
            level = np.add.reduceat(r, start)
            level /= -length
            level += first
            level -= (length - 1) / 2
            r += np.repeat(level, length)
    if some_absent:
        r[np.isnan(r)] = 0.0
    order = torch.from_numpy(order.reshape(-1))
    rank = unsorted(torch.from_numpy(r).to(dtype), order, R, n)
    if not need:
        return rank, torch.empty_like(rank, dtype=torch.int32)
    ids = np.repeat(rounds.numbers(many, of_row), length)
    return rank, unsorted(torch.from_numpy(ids), order, R, n)


def unsorted(t, order, R, n):
    """t [R (n + 1)] at the places it came from, [R, n]."""
    return torch.empty_like(t).scatter_(0, order, t)[: R * n].reshape(R, n)


def groups(rows, n):
    """A slice of rows in slices that fit a cache."""
    step = max(1, GROUP // max(n, 1))
    return [slice(k, min(k + step, rows.stop)) for k in range(rows.start, rows.stop, step)]


def rank_backward(grad, x, rank, ids, eps, kl, descending):
    """As `torch_impl.rank_backward`."""
    n = x.shape[-1]
    grad, rank, ids, e = grad.reshape(-1, n), rank.reshape(-1, n), ids.reshape(-1, n), eps.reshape(-1, 1)
    g = torch.empty(ids.shape, dtype=x.dtype)
    e = e.masked_fill(e == 0, math.inf)
    e = -e if descending else e
    table = int(ids.max()) + 2  # those alone in their block share a sum that nobody reads
    one = torch.ones(1, dtype=torch.float64)

    def pull(part):
        own = ids[part]
        first = torch.arange(1, 1 + len(own) * table, table, dtype=torch.int32)
        at = (own + first[:, None]).reshape(-1)
        u = grad[part].double()
        mean, size = torch.zeros(2, len(own) * table, dtype=torch.float64)
        if kl:
            r = rank[part].double()
            mean.index_add_(0, at, (r * u).reshape(-1))
            size.index_add_(0, at, r.reshape(-1))
        else:
            mean.index_add_(0, at, u.reshape(-1))
            size.index_add_(0, at, one.expand(len(at)))
        clean = bool(mean.isfinite().all())
        mean /= size.clamp_(min=0.5)
        d = torch.sub(u, mean.index_select(0, at).reshape(u.shape))
        if kl:
            d *= r
        if clean:  # five times faster than masked_fill_
            np.multiply(d.numpy(), (own >= 0).numpy(), out=d.numpy())
        else:
            d.masked_fill_(own < 0, 0.0)
        g[part] = d.div_(e[part])

    def pull_groups(rows):
        for part in groups(rows, n):
            pull(part)

    over_rows(pull_groups, *ids.shape)
    return g.reshape(x.shape)


def negated(x):
    """-x, where absent entries (-inf) stay so and +inf, which poisons a row, becomes NaN."""
    if x.is_cpu and math.isfinite(x.sum(dtype=torch.promote_types(x.dtype, torch.float32))):
        return -x
    return torch.where(x == -math.inf, x, torch.where(x == math.inf, math.nan, -x))


def sort_forward(s, strengths, number, relative, kl):
    """As `torch_impl.sort_forward`; None where pooling takes too many rounds."""
    with np.errstate(**QUIET):
        return _sort_forward(s.detach(), strengths, number, relative, kl)


def _sort_forward(s, strengths, number, relative, kl):
    shape, n = s.shape, s.shape[-1]
    rows = s.reshape(-1, n)
    R = len(rows)
    poisoned = ~(rows[:, 0] < math.inf)
    how = strength.Strength(number, strengths, relative)
    eps = strength.of_rows(rows, rows != -math.inf if relative else None, poisoned, how)
    given = s
    s = np.full((R, n + 1), math.nan)
    torch.from_numpy(s)[:, :n] = rows
    s[poisoned.numpy(), :n] = 0.0
    some_absent, n_valid = absent(s)
    e = number
    if relative or strengths is not None:
        e = eps.detach().masked_fill(poisoned, 1.0)[:, None].numpy()
    value, start = s, np.empty(s.shape, dtype=np.int32)
    start[...] = np.arange(n + 1)
    if number > 0:
        flat = s.reshape(-1)
        first = first_positions(s, n_valid, e, kl, True)
        if first is None:
            return None
        length = rounds.lengths(first, flat.size)
        k = (length > 1).nonzero()[0]
        if len(k):  # an element alone keeps its value
            _fill_blocks(value.reshape(-1), start.reshape(-1), first[k], length[k], e, kl, n + 1)
    value = torch.from_numpy(value)[:, :n].to(torch.promote_types(given.dtype, torch.float32))
    if some_absent:
        value = value.masked_fill(torch.from_numpy(np.isnan(s))[:, :n], -math.inf)
    value = value.masked_fill(poisoned[:, None], math.nan).contiguous()
    start = torch.from_numpy(start)[:, :n].contiguous()
    return value.reshape(shape), start.reshape(shape), eps.reshape(shape[:-1])


def _fill_blocks(s, start, first, length, e, kl, width):
    """The soft values in the place of s, and `start` in rows of `width`, in blocks of several elements."""
    index, begin = blocks.ranges(first, length)
    t, a = s.take(first), first % width
    d = s.take(index)
    d -= np.repeat(t, length)
    rate = 1 / e if np.ndim(e) == 0 else (1 / e).reshape(-1).take(first // width)
    if kl:
        t += np.log(np.add.reduceat(np.exp(d, out=d), begin))
        t -= np.log(blocks.geometric(length, rate))
        middle = 0.0
    else:
        t += np.add.reduceat(d, begin) / length
        middle = (length - 1) / 2
    value = np.repeat(middle + begin, length) - np.arange(len(index))
    value /= e if np.ndim(e) == 0 else np.repeat(e.reshape(-1).take(first // width), length)
    value += np.repeat(t, length)
    s[index] = value
    start[index] = np.repeat(a, length)


def sort_backward(grad, s, start, kl):
    """As `torch_impl.sort_backward`."""
    n = s.shape[-1]
    rows, u = s.detach().reshape(-1, n), grad.detach().reshape(-1, n).double()
    poisoned = ~(rows[:, 0] < math.inf)
    gone = rows == -math.inf if bool((rows[:, -1] == -math.inf).any()) else None
    if gone is not None:
        u = u.masked_fill(gone, 0.0)
    bad = ~u.sum(-1).isfinite() | poisoned
    first = (start.reshape(-1, n) == torch.arange(n)).numpy().reshape(-1).nonzero()[0]
    length = rounds.lengths(first, u.numel())
    k = (length > 1).nonzero()[0]
    g = u.clone() if u.dtype == grad.dtype else u
    if len(k):  # an element alone keeps its gradient
        first, length = first[k], length[k]
        index, begin = blocks.ranges(first, length)
        flat = g.numpy().reshape(-1)
        with np.errstate(**QUIET):
            total = np.add.reduceat(flat.take(index), begin)
            if kl:
                E = rows.double().numpy().reshape(-1)
                E = np.exp(E.take(index) - np.repeat(E.take(first), length))
                total /= np.add.reduceat(E, begin)
                flat[index] = np.repeat(total, length) * E
            else:
                total /= length
                flat[index] = np.repeat(total, length)
    if gone is not None:
        g.masked_fill_(gone, 0.0)
    if bool(bad.any()):
        g[bad] = math.nan
    return g.to(s.dtype).reshape(s.shape)
