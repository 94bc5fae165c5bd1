# SPDX-License-Identifier: Apache-2.0
"""The textbook: sequential pool-adjacent-violators, one row and one block at a time, in MATH.md's letters.

Blocks are found on Python floats; ranks and sorted values are then plain expressions of x and eps, so autograd gives
derivatives of any order (almost everywhere: blocks are locally constant). Slow, any dtype; the oracle of the family.
"""

from __future__ import annotations

import math

import torch


def pool_l2(theta: list[float], eps: float) -> list[int]:
    """Starts of the blocks of theta, sorted descending: neighbours pool while mean theta does not fall by eps a step.

    A block [a, b) holds S = sum (theta_i - theta_a); its value is mean theta / eps - mean w, w_i = n - i.
    """
    blocks = []
    for i in range(len(theta)):
        a, b, S = i, i + 1, 0.0
        while blocks:
            a0, S0 = blocks[-1]
            gap = (theta[a0] - theta[a]) + (S0 / (a - a0) - S / (b - a))
            if gap > eps * (b - a0) / 2:
                break
            blocks.pop()
            S = S0 + S + (b - a) * (theta[a] - theta[a0])
            a = a0
        blocks.append((a, S))
    return [a for a, _ in blocks]


def pool_kl(z: list[float], w: list[float]) -> list[int]:
    """Starts of the blocks of z under weights w, both log-scale and sorted descending; neighbours pool while
    v = log sum exp(z) - log sum exp(w) does not fall.

    A block [a, b) holds Z = sum exp(z_i - z_a), R = sum exp(w_i - w_a).
    """
    blocks = []
    for i in range(len(z)):
        a, Z, R = i, 1.0, 1.0
        while blocks:
            a0, Z0, R0 = blocks[-1]
            fall = (z[a0] - z[a]) + math.log(Z0 / Z) - (w[a0] - w[a]) - math.log(R0 / R)
            if fall > 0:
                break
            blocks.pop()
            Z = Z0 + Z * math.exp(z[a] - z[a0])
            R = R0 + R * math.exp(w[a] - w[a0])
            a = a0
        blocks.append((a, Z, R))
    return [a for a, _, _ in blocks]


def membership(starts: list[int], n: int, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each sorted position: its block's number, first position a and size c, int64 [n]."""
    a = torch.tensor(starts, dtype=torch.int64)
    c = torch.diff(a, append=torch.tensor([n]))
    number = torch.repeat_interleave(torch.arange(len(starts)), c)
    return number.to(device), a[number].to(device), c[number].to(device)


def block_sum(t, number):
    """The sum over each element's block."""
    return torch.zeros_like(t).index_add(0, number, t)[number]


def soft_rank_row(x, eps, kl: bool, descending: bool):
    """Soft ranks [n] of x [n], all finite; the block number [n] of each element."""
    n = len(x)
    theta = -x if descending else x
    s, order = torch.sort(theta, descending=True, stable=True)
    e = float(eps.detach())
    if e == 0:
        starts = [i for i in range(n) if i == 0 or s[i] < s[i - 1]]
    elif kl:
        starts = pool_kl([v / e for v in s.tolist()], [math.log(n - i) for i in range(n)])
    else:
        starts = pool_l2(s.tolist(), e)
    number, a, c = membership(starts, n, x.device)
    d = s - s[a].detach()
    mean_w = n - (2 * a + c - 1).to(s.dtype) / 2
    if e == 0:
        r = mean_w + 0 * d
    elif kl:
        E = torch.exp((d / eps).to(s.dtype))
        r = c * mean_w * E / block_sum(E, number)
    else:
        r = mean_w + ((d - block_sum(d, number) / c) / eps).to(s.dtype)
    back = torch.argsort(order)
    return r[back], number[back]


def soft_sort_row(x, eps, kl: bool, descending: bool):
    """x [n], all finite, sorted softly."""
    n = len(x)
    s = torch.sort(x if descending else -x, descending=True, stable=True)[0]
    e = float(eps.detach())
    i = torch.arange(n, device=x.device)
    if e == 0:
        value = s
    else:
        starts = _sort_starts(s.tolist(), e, kl)
        number, a, c = membership(starts, n, x.device)
        if kl:
            E, z = torch.exp(s - s[a].detach()), (a - i) / eps  # z_i - z_a
            W = torch.exp(z)
            value = (s[a].detach() + torch.log(block_sum(E, number)) + (z - torch.log(block_sum(W, number)))).to(s)
        else:
            mean = s[a].detach() + block_sum(s - s[a].detach(), number) / c
            value = mean + (((2 * a + c - 1).to(s.dtype) / 2 - i) / eps).to(s.dtype)
    return value if descending else -value


def _sort_starts(s: list[float], eps: float, kl: bool) -> list[int]:
    """soft_sort projects rho / eps on the permutahedron of s: the roles of theta and w are exchanged."""
    n = len(s)
    if kl:
        return pool_kl([(n - i) / eps for i in range(n)], s)
    blocks = []
    for i in range(n):
        a, b, S = i, i + 1, 0.0
        while blocks:
            a0, S0 = blocks[-1]
            fall = (b - a0) / (2 * eps) - ((s[a0] - s[a]) + (S0 / (a - a0) - S / (b - a)))
            if fall > 0:
                break
            blocks.pop()
            S = S0 + S + (b - a) * (s[a] - s[a0])
            a = a0
        blocks.append((a, S))
    return [a for a, _ in blocks]


def over_rows(one, x, eps):
    """one(x of the valid entries, eps) for each row; absent entries (-inf) are left to `soft_rank` and `soft_sort`."""
    flat, strengths = x.reshape(eps.numel(), x.shape[-1]), eps.reshape(-1)
    return [one(row, e) for row, e in zip(flat, strengths, strict=True)]


def _widened(x):
    """In float64, with the least number of x's own dtype, which is absent too, at -inf."""
    # added, not filled in: the gradient of a poisoned row is NaN where something is absent, too
    away = torch.zeros_like(x).masked_fill(x <= torch.finfo(x.dtype).min, -math.inf)
    return (x + away).double()


def soft_rank(x, eps, kl: bool, descending: bool):
    """Soft ranks of each row of x [..., n] and the block ids, -1 for an element alone; eps [...], NaN poisons."""
    x = _widened(x)

    def one(row, e):
        if math.isnan(e.detach()):
            return (row * e).to(row.dtype), torch.full_like(row, -1, dtype=torch.int32)
        valid = row > -math.inf
        r, number = soft_rank_row(row[valid], e, kl, descending)
        alone = (torch.bincount(number, minlength=1)[number] == 1) | (e == 0)
        ids = torch.full_like(row, -1, dtype=torch.int32).masked_scatter(valid, number.masked_fill(alone, -1).int())
        return torch.zeros_like(row).masked_scatter(valid, r), ids

    return _stacked(over_rows(one, x, eps), x)


def soft_sort(x, eps, kl: bool, descending: bool):
    """Each row of x [..., n] softly sorted, absent entries last, as -inf; eps [...], NaN poisons."""
    x = _widened(x)

    def one(row, e):
        if math.isnan(e.detach()):
            return ((row * e).to(row.dtype),)
        value = soft_sort_row(row[row > -math.inf], e, kl, descending)
        return (torch.cat([value, row.new_full((len(row) - len(value),), -math.inf)]),)

    return _stacked(over_rows(one, x, eps), x)[0]


def _stacked(rows, x):
    if not rows:
        return x * 1, torch.full_like(x, -1, dtype=torch.int32)
    return [torch.stack(part).reshape(x.shape) for part in zip(*rows, strict=True)]


def correlation(r, t, valid):
    """<r - m_r, t - m_t> / (|r - m_r| |t - m_t|) of each row over its valid entries; 0 where a side is constant.

    In float64, whatever the dtypes are: squares of float32 entries have left its range at 1e20.
    """
    rows = []
    for a, b, keep in zip(
        *(v.reshape(r.shape[:-1].numel(), -1 if r.numel() else 0) for v in (r.double(), t.double(), valid)), strict=True
    ):
        a, b = a[keep], b[keep]
        constant = len(a) < 2 or bool((a == a[0]).all()) or bool((b == b[0]).all())
        if constant:
            rows.append((0 * a).sum() + (0 * b).sum())
            continue
        a, b = a - a.mean(), b - b.mean()
        rows.append((a @ b) / (a.norm() * b.norm()))
    shape = r.shape[:-1]
    return torch.stack(rows).reshape(shape) if rows else (r * t).sum(-1)
