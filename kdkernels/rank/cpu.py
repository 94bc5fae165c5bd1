# SPDX-License-Identifier: Apache-2.0
"""Soft ranks and sorts of CPU tensors in PyTorch and NumPy: few passes over a row, as sizes may be read here.

Rows are sorted into [R, n + 1] with a NaN behind each, and NaN in the place of absent entries: blocks are then runs of
one long list (`blocks.py`, `rounds.py`), sums over them sums of slices, and no row needs a mask of its own.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ..dtypes import at_least_float32
from . import blocks, counted, rounds, sorted_ranks, strength
from .ordering import absent
from .sorted_ranks import first_positions
from .threads import QUIET, groups, over_rows

GROUP = 2**15  # elements whose gradient is found together: in a cache, and no more than PyTorch leaves to one thread
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def poisoned_rows(rows):
    """Which rows [R, n] hold NaN or +inf, None if none does."""
    largest = rows.numpy().max() if rows.dtype.itemsize > 2 else rows.max()
    return None if largest < math.inf else ~(rows.amax(-1) < math.inf)


def strengths_of_rows(rows, poisoned, how):
    """As `strength.of_rows` of rows [R, n]."""
    return strength.of_rows(rows, None, poisoned, how, spread(rows) if how.relative else None)


def spread(rows):
    """As `strength.spread`, in a third of its time; a row's bits do not depend on the others."""
    R, n = rows.shape
    rows = (rows.float() if rows.dtype == torch.bfloat16 else rows).numpy()
    found = np.empty((R, 1))

    def of_some(part):
        d = rows[part].astype(np.float64)
        top, gone, count = d.max(-1, keepdims=True), None, n
        if not rows[part].min() > -math.inf:  # or NaN
            gone = d == -math.inf
            count = np.maximum(n - np.count_nonzero(gone, axis=-1, keepdims=True), 1)
        d -= top
        if gone is not None:
            d[gone] = 0.0
        # the mean is sqrt(n) standard deviations from the maximum at most: n units in the last place are lost
        mean = d.sum(-1, keepdims=True) / count
        variance = np.maximum(np.einsum("rn,rn->r", d, d)[:, None] / count - mean * mean, 0.0)
        np.divide(np.sqrt(12 * variance), count, out=found[part])

    def of_part(part):
        for some in groups(part, n, GROUP):
            of_some(some)

    over_rows(of_part, R, n, light=True)
    found[found < strength.SMALLEST_SPREAD] = 1.0
    return torch.from_numpy(found[:, 0])


def rank_gradients(ranks, wanted):
    """As `metrics.rank_gradients` where no entry is absent: small rows cost what the calls do."""
    ranks = ranks.numpy()
    _, R, n = ranks.shape

    def of_part(part):
        c = ranks[:, part] - (n + 1) / 2
        inverse = np.einsum("srn,srn->sr", c, c)[..., None] ** -0.5
        inverse[np.isinf(inverse)] = 0.0
        both = inverse[0] * inverse[1]
        rho = np.einsum("rn,rn->r", *c)[:, None] * both
        for k, gradient in zip(wanted, gradients[:, part], strict=True):
            np.multiply(c[1 - k], both, out=gradient)
            gradient -= c[k] * (rho * inverse[k] * inverse[k])
        return rho[:, 0]

    gradients = np.empty((len(wanted), R, n))
    with np.errstate(**QUIET):
        rho = np.concatenate(over_rows(of_part, R, n, light=True))
    return torch.from_numpy(rho), torch.from_numpy(gradients)


def rank_forward(x, strengths, number, relative, kl, descending, need, dtype):
    """As `torch_impl.rank_forward`; None where pooling takes too many rounds."""
    if x.dim() == 2:
        with np.errstate(**QUIET):
            return _rank_forward(x.detach(), strengths, number, relative, kl, descending, need, dtype)
    found = rank_forward(x.reshape(-1, x.shape[-1]), strengths, number, relative, kl, descending, need, dtype)
    if found is None:
        return None
    rank, ids, eps = found
    return rank.reshape(x.shape), ids.reshape(x.shape) if need else ids, eps.reshape(x.shape[:-1])


def _rank_forward(rows, strengths, number, relative, kl, descending, need, dtype):
    shape, n = rows.shape, rows.shape[-1]
    if descending:
        rows = negated(rows)
    poisoned = poisoned_rows(rows)
    how = strength.Strength(strengths, number, relative)
    eps = strengths_of_rows(rows, poisoned, how)
    e = number
    if relative or strengths is not None:
        e = eps.detach()[:, None].numpy()
    if poisoned is not None:  # a constant, for now
        rows = rows.masked_fill(poisoned[:, None], 0.0)
        e = e if np.ndim(e) == 0 else np.where(poisoned[:, None].numpy(), 1.0, e)

    if rows.dtype.itemsize == 2 and n >= counted.LENGTH:
        found = over_rows(
            lambda part: counted.ranks(rows[part], e if np.ndim(e) == 0 else e[part], number, kl, dtype),
            *rows.shape,
            light=True,
        )
    else:
        found = sorted_ranks.ranks(rows, e, number, kl, need, dtype)
    if found is None or any(part is None for part in found):
        return None
    rank, ids = found[0] if len(found) == 1 else (torch.cat(parts) for parts in zip(*found, strict=True))
    if poisoned is not None:
        rank[poisoned], ids[poisoned] = math.nan, -1
    if not need:
        ids = ids.new_empty(0)
    elif number == 0:
        ids = torch.full(shape, -1, dtype=torch.int32)
    return rank.to(dtype), ids, eps


def rank_backward(grad, x, rank, ids, eps, kl, descending):
    """As `torch_impl.rank_backward`."""
    n = x.shape[-1]
    if x.dim() != 2:
        rows = (t.reshape(-1, n) for t in (grad, x, rank, ids))
        return rank_backward(*rows, eps.reshape(-1), kl, descending).reshape(x.shape)
    g = torch.empty(x.shape, dtype=x.dtype)
    bits, ids, e = g.view(BITS[x.dtype.itemsize]).numpy(), ids.numpy(), eps.numpy()[:, None]
    e = np.where(e == 0, math.inf, -e if descending else e)
    table = int(ids.max()) + 2  # those alone in their block share a sum that nobody reads
    first = np.arange(1, 1 + min(len(ids), max(1, GROUP // n)) * table, table)[:, None]

    def pull(part):
        own = ids[part]
        at = np.add(own, first[: len(own)], dtype=np.int64).reshape(-1)
        u = grad[part].double().numpy()
        if kl:
            r = rank[part].double().numpy()
            weight = np.bincount(at, r.reshape(-1), len(own) * table)
            total = np.bincount(at, (u * r).reshape(-1), len(own) * table)
        else:
            weight = np.bincount(at, minlength=len(own) * table)
            total = np.bincount(at, u.reshape(-1), len(own) * table)
        mean = total / np.maximum(weight, 0.5)
        d = mean.take(at).reshape(u.shape)
        np.subtract(u, d, out=d)
        if kl:
            d *= r
        d /= e[part]
        g[part] = torch.from_numpy(d)
        alone = own >> 31  # their gradient is 0, whatever stands there
        bits[part] &= np.invert(alone, out=alone).astype(bits.dtype, copy=False)

    def pull_groups(rows):
        with np.errstate(**QUIET):
            for part in groups(rows, n, GROUP):
                pull(part)

    over_rows(pull_groups, *ids.shape, light=True)
    if np.isnan(e).any():
        g[torch.from_numpy(np.isnan(e[:, 0]))] = math.nan
    return g


def negated(x):
    """-x, where absent entries (-inf) stay so and +inf, which poisons a row, becomes NaN."""
    if x.is_cpu and math.isfinite(x.sum(dtype=at_least_float32(x))):
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
    how = strength.Strength(strengths, number, relative)
    eps = strengths_of_rows(rows, poisoned, how)
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
    value = torch.from_numpy(value)[:, :n].to(at_least_float32(given))
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
