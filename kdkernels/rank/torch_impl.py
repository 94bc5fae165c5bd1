# SPDX-License-Identifier: Apache-2.0
"""Soft ranks and sorts in portable PyTorch: rows together, O(n) memory, no host sync, the same bits every time.

Sums over blocks are fixed-point int64, so that the order in which scatter_add adds does not matter. The way of every
device without a compiled library; what it costs beside one is in MATH.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..autograd import at_least_float32
from . import isotonic, metrics, strength
from .checks import absent


class Blocks(NamedTuple):
    """First position and size of the block of each element of sorted rows, int64 [R, n]."""

    start: torch.Tensor
    count: torch.Tensor


def runs(V) -> Blocks:
    """The blocks of rows V [R, n]: runs of equal values."""
    number = torch.zeros_like(V, dtype=torch.int64)
    torch.cumsum(V[:, 1:] != V[:, :-1], -1, out=number[:, 1:])
    sizes = torch.zeros_like(number).scatter_add_(-1, number, torch.ones_like(number))
    return Blocks(sizes.cumsum(-1).sub_(sizes).gather(-1, number), sizes.gather(-1, number))


def block_sum(t, ids):
    """The sum of t [R, n] over each element's block; ids in [0, n) are unique to a block."""
    return torch.zeros_like(t).scatter_add_(-1, ids, t).gather(-1, ids)


def block_sum_of(t, ids, bits: int):
    """The same of float64 t rounded to multiples of 2^-bits."""
    scale = 2.0**bits
    return block_sum((t * scale).round_().to(torch.int64), ids).double() / scale


def _length_bits(n: int) -> int:
    return max(1, math.ceil(math.log2(n + 1)))


def sorted_blocks(s, gone, eps, kl: bool, sort: bool) -> Blocks:
    """Blocks of s float64 [R, n], sorted descending, with absent entries (gone) last; eps [R, 1] > 0."""
    R, n = s.shape
    N = 1 << (n - 1).bit_length()
    gap = (s[:, :-1] - s[:, 1:]).masked_fill_(gone[:, 1:], 0.0)

    def from_gaps(g, sign=-1.0):
        """0 and the running sums of g, absent entries far below; filled up to N."""
        q = s.new_full((R, N), isotonic.FAR)
        q[:, 0] = 0.0
        torch.cumsum(g, -1, out=q[:, 1:n])
        q[:, 1:n] *= sign
        q[:, :n].masked_fill_(gone, isotonic.FAR)
        return q

    if not kl:
        # a wider gap splits for certain (rank), or pools the whole row (sort)
        g = gap.mul_(eps).clamp_(max=4.0 * N * N) if sort else gap.div_(eps).clamp_(max=2.0 * N + 2)
        problem = isotonic.Squares(from_gaps(g, 1.0 if sort else -1.0), -1 if sort else 1)
    elif sort:
        problem = isotonic.Exponentials(
            from_gaps((1 / eps).expand_as(gap)), from_gaps(gap).clamp_(min=isotonic.FAR / 2)
        )
    else:
        valid = n - gone.sum(-1, keepdim=True)
        problem = isotonic.Ratios(from_gaps(gap.div_(eps).clamp_(max=2 * math.log(N + 1) + 2)), valid)
    return runs(isotonic.solve(problem)[:, :n])


def sort_descending(theta):
    """Rows [..., n] sorted descending, NaN first, stable, and their order."""
    return torch.sort(theta, dim=-1, descending=True, stable=True)


def negated(x, gone=None):
    """-x, where absent entries stay -inf and +inf, which poisons a row, becomes NaN."""
    gone = x == -math.inf if gone is None else gone
    return torch.where(gone, -math.inf, torch.where(x == math.inf, math.nan, -x))


def theta_of(x, descending: bool):
    """x, or -x, with absent entries at -inf."""
    gone = absent(x)
    return negated(x, gone) if descending else x.masked_fill(gone, -math.inf)


def _sorted_rows(theta):
    """Rows [R, n] in float64, sorted descending; which rows are poisoned (NaN or +inf, made 0); absent entries."""
    s, order = sort_descending(theta)
    s = s.double()
    poisoned = ~(s[:, :1] < math.inf)
    s = s.masked_fill_(poisoned, 0.0)
    return s, order, poisoned, s == -math.inf


def rank_forward(x, strengths, number, relative, kl, descending, need, dtype=None):
    """rank in `dtype`, or x's compute dtype, blocks int32 like x or [0], eps float64, of x [..., n]."""
    dtype = dtype or at_least_float32(x)
    shape, n = x.shape, x.shape[-1]
    rows = x.reshape(-1, n)
    s, order, poisoned, gone = _sorted_rows(theta_of(rows, descending))
    how = strength.Strength(strengths, number, relative)
    eps = strength.of_rows(rows, ~absent(rows) if relative else None, poisoned[:, 0], how)
    if number == 0:
        blocks = runs(s)
    else:
        e = eps[:, None].masked_fill(poisoned, 1.0)
        blocks = sorted_blocks(s, gone, e, kl, False)
    start, c = blocks.start, blocks.count
    # 2 mean w = 2 n_valid - (2 a + c - 1)
    mean_w = (2 * (n - gone.sum(-1, keepdim=True)) + 1 - c).sub_(start, alpha=2).double().div_(2)
    if number == 0:
        r = mean_w
    else:
        d = (s - s.gather(-1, start)).masked_fill_(gone, 0.0).div_(e)
        if kl:
            E = d.exp_()
            r = mean_w.mul_(c).mul_(E).div_(block_sum_of(E, start, 60 - _length_bits(n)))
        else:
            r = mean_w.add_(d).sub_(block_sum_of(d, start, 60 - 2 * _length_bits(n)).div_(c))
    r = r.masked_fill_(gone, 0.0).masked_fill_(poisoned, math.nan).to(dtype)
    rank = torch.empty_like(r).scatter_(-1, order, r).reshape(shape)
    if not need:
        return rank, x.new_empty(0, dtype=torch.int32), eps.reshape(shape[:-1])
    alone = (c == 1).logical_or_(gone).logical_or_(poisoned)
    ids = start.to(torch.int32).masked_fill_(alone, -1) if number else torch.full_like(start, -1, dtype=torch.int32)
    ids = torch.empty_like(ids).scatter_(-1, order, ids)
    return rank, ids.reshape(shape), eps.reshape(shape[:-1])


def _scaled(u):
    """u as multiples of the largest magnitude of its row, for fixed-point sums.

    NaN and infinity become 0 there: they are found again in what is not summed.
    """
    largest = u.abs().amax(-1, keepdim=True)
    unit = largest.masked_fill(largest == 0, 1.0)
    u = u / unit
    return u, u.nan_to_num(0.0, 0.0, 0.0), unit


def rank_backward(grad, x, rank, blocks, eps, kl, descending):
    """d/dx, in x's dtype."""
    n = x.shape[-1]
    ids = blocks.reshape(-1, n).to(torch.int64)
    alone = ids < 0
    ids.clamp_(min=0)
    u, finite, unit = _scaled(grad.reshape(-1, n).double().masked_fill(alone, 0.0))
    bits = 60 - _length_bits(n)
    if kl:
        r = rank.reshape(-1, n).double().masked_fill(alone, 0.0)  # no copy of a float64 rank was made
        R = block_sum_of(r, ids, 60 - 2 * _length_bits(n)).clamp_(min=0.5)
        g = (u - block_sum_of(r / R * finite, ids, bits)).mul_(r)
    else:
        c = block_sum((~alone).to(torch.float64), ids).clamp_(min=1)
        g = u - block_sum_of(finite, ids, bits).div_(c)
    # eps = 0: hard ranks, every element alone; an infinite one keeps 0 / eps at 0, a NaN one poisons the row
    e = eps.reshape(-1, 1)
    e = e.masked_fill(e == 0, math.inf)
    g = g.masked_fill_(alone, 0.0).mul_(unit).div_(-e if descending else e)
    return g.to(x.dtype).reshape(x.shape)


def sort_forward(s, strengths, number, relative, kl):
    """value, start int32, eps of rows s [..., n] sorted descending, absent entries last; NaN where a row starts so."""
    shape, n = s.shape, s.shape[-1]
    rows = s.reshape(-1, n).double()
    poisoned = ~(rows[:, :1] < math.inf)
    rows = rows.masked_fill(poisoned, 0.0)
    gone = rows == -math.inf
    how = strength.Strength(strengths, number, relative)
    eps = strength.of_rows(rows, ~gone if relative else None, poisoned[:, 0], how)
    e = eps[:, None].masked_fill(poisoned, 1.0)
    i = torch.arange(n, device=s.device)
    if number == 0:
        start, value = i.expand(rows.shape), rows
    else:
        blocks = sorted_blocks(rows, gone, e, kl, True)
        start, c = blocks.start, blocks.count
        top = rows.gather(-1, start)
        d = (rows - top).masked_fill(gone, 0.0)
        if kl:
            lse = torch.log(block_sum_of(torch.exp(d), start, 60 - _length_bits(n)))
            z = (start - i) / e
            value = top + lse + (z - torch.log(block_sum_of(torch.exp(z), start, 60 - _length_bits(n))))
        else:
            span = d.abs().amax(-1, keepdim=True)
            span = torch.where(span > 0, span, 1.0)
            mean = block_sum_of(d / span, start, 60 - _length_bits(n)) / c * span
            value = top + mean + ((2 * start + c - 1).double() / 2 - i) / e
        value = torch.where(gone, -math.inf, value)
    value = value.masked_fill(poisoned, math.nan).to(at_least_float32(s))
    return value.reshape(shape), start.to(torch.int32).reshape(shape), eps.reshape(shape[:-1])


def sort_backward(grad, s, start, kl):
    """d/ds, in s's dtype."""
    n = s.shape[-1]
    rows, u, ids = s.reshape(-1, n).double(), grad.reshape(-1, n).double(), start.reshape(-1, n).to(torch.int64)
    gone, poisoned = rows == -math.inf, ~(rows[:, :1] < math.inf)
    u, finite, unit = _scaled(u.masked_fill(gone, 0.0))
    bits = 60 - _length_bits(n)
    total = block_sum_of(finite, ids, bits)
    if kl:
        E = torch.exp((rows - rows.gather(-1, ids)).masked_fill(gone | poisoned, 0.0))
        g = E / block_sum_of(E, ids, bits) * total
    else:
        g = total / block_sum(torch.ones_like(ids), ids)
    g = (g * unit).masked_fill(gone, 0.0)
    bad = poisoned | ~u.isfinite().all(-1, keepdim=True)
    return g.masked_fill(bad, math.nan).to(s.dtype).reshape(s.shape)


def soft_sort_forward(x, strengths, number, relative, kl, descending):
    """As `native_impl.SCHEMAS` says of soft_sort_rows, for x [..., n]."""
    return of_sorted(sort_forward, x, strengths, number, relative, kl, descending)


def of_sorted(forward, x, *how):
    """(value, s, order, start, eps) of rows in any order, by what sorts those that stand sorted, descending."""
    *how, descending = how
    s, order = sort_descending(theta_of(x.contiguous(), not descending))
    value, start, eps = forward(s, *how)
    return value if descending else negated(value), s, order, start, eps


def soft_sort_backward(grad, s, order, start, kl):
    return unsorted(sort_backward(grad, s, start, kl), order)


def unsorted(ds, order):
    return torch.empty_like(ds).scatter_(-1, order, ds)


def spearman_forward(*asked):
    """As `native_impl.SCHEMAS` says of spearman_rows, for rows [..., n]."""
    return spearman_by(rank_forward, rank_backward, *asked)


def spearman_by(rank_forward, rank_backward, x, y, strength, relative, kl, hard_target, grad_x, grad_y):
    """`spearman_forward` by the ranks of a backend; both sides are ranked in one call.

    Ranks stay float64: under a large strength all are near their mean, and float32 would lose their differences.
    """
    dtype = at_least_float32(x, y)
    R, n = x.shape[:-1].numel(), x.shape[-1]
    *pair, valid = (t.reshape(R, n) for t in metrics.drop_pairs(x, y))
    sides = torch.cat(pair)
    how = None, strength, relative, kl, False
    if hard_target:
        rank, ids, eps = rank_forward(sides[:R], *how, grad_x, torch.float64)
        target = rank_forward(sides[R:], None, 0.0, False, kl, False, False, torch.float64)[0]
        ranks = torch.cat([rank, target])
    else:
        ranks, ids, eps = rank_forward(sides, *how, grad_x or grad_y, torch.float64)
    wanted = range(0 if grad_x else 1, 2 if grad_y and not hard_target else 1)
    rho, gradients = metrics.rank_gradients(ranks.view(2, R, n), valid, wanted)
    if wanted:
        part = slice(wanted.start * R, wanted.stop * R)
        like = torch.empty_like(ranks[part], dtype=dtype)
        g = rank_backward(gradients.view(-1, n), like, ranks[part], ids[part], eps[part], kl, False)
        gradients = g.view(-1, R, n)

    def gradient(k, asked):
        if not asked:
            return x.new_empty(0, dtype=dtype)
        if k not in wanted:  # of hard ranks
            return x.new_zeros(x.shape, dtype=dtype).add_(0 * rho.reshape(x.shape[:-1])[..., None])  # NaN of a NaN row
        found = gradients[k - wanted.start].reshape(x.shape)
        return found.clone() if len(wanted) == 2 else found  # outputs share no memory

    return rho.to(dtype).reshape(x.shape[:-1]), gradient(0, grad_x), gradient(1, grad_y)


def centred(x, dtype):
    """Rows less their mean in `dtype`, absent entries 0. The Jacobian of a row sums to 0 over each block, so any centre
    will do; one near the values loses no digits."""
    top = x.masked_fill(absent(x), 0.0).to(dtype)
    return top - top.mean(-1, keepdim=True)


def rank_strength_gradient(run, grad, x, strengths, rank, *how):
    """d/dstrengths: -(1/eps) <theta, J u> a row, times eps / strength; J is symmetric. run: `rank_backward`."""
    n = x.shape[-1]
    g = run(grad.double(), x.double(), rank.double(), *how)
    per_row = -(centred(x.reshape(-1, n), torch.float64) * g.reshape(-1, n)).sum(-1)
    return _to_strengths(per_row, strengths)


def _to_strengths(per_row, strengths):
    """per_row is -strength d/dstrength of each row."""
    out = per_row / strengths
    return out.sum().reshape(1) if strengths.numel() == 1 else out


def sort_strength_gradient(grad, strengths, s, start, eps, kl, descending):
    """d/dstrengths of the soft sort: only the part (mean_B z - z_i), or its exponential form, depends on eps."""
    n = s.shape[-1]
    a, u = start.reshape(-1, n).to(torch.int64), grad.reshape(-1, n).double()
    e = eps.reshape(-1, 1)
    i = torch.arange(n, device=s.device)
    c = block_sum(torch.ones_like(a), a)
    if kl:
        z = (a - i) / e
        W = torch.exp(z)
        bits = 60 - _length_bits(n)
        weighted = block_sum_of(W * (i - a) / n, a, bits) * n / block_sum_of(W, a, bits)
        slope = ((i - a) - weighted) / e
    else:
        slope = (i - a - (c - 1).double() / 2) / e
    slope = slope.masked_fill(s.reshape(-1, n) == -math.inf, 0.0)
    per_row = (u * slope).sum(-1)
    return _to_strengths(per_row if descending else -per_row, strengths)
