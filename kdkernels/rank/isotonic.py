# SPDX-License-Identifier: Apache-2.0
"""Isotonic regression of many rows at once: log2(n) levels of pairwise merges, no loop over n, no host sync.

Merging two solved halves makes at most one new block, a suffix of the left and a prefix of the right. Its value v is
the root of a decreasing function of v, found by bisection over the blocks of the left, then over those of the right,
for all rows and pairs together. Sums start at the border of the halves, so they never cancel (MATH.md, "In parallel").

The state is the value V of each element's block. Neighbouring blocks have V_left > V_right, as equals pool, so blocks
are exactly the runs of equal V.
"""

from __future__ import annotations

import torch

# absent entries (the end of a row, and what fills it up to a power of two) stand far below and far apart
FAR, APART = -1e30, -1e20


class Squares:
    """l2: a block's value is the mean of y_i = q_i + slope i, q monotone, i the position in the row."""

    def __init__(self, q, slope: int):
        self.q, self.slope = q, slope
        self.start = q + slope * torch.arange(q.shape[-1], dtype=q.dtype, device=q.device)

    def halves(self, L: int):
        q = self.q.unflatten(-1, (-1, 2 * L))
        d = q - q[..., L : L + 1]
        y = self.start.unflatten(-1, (-1, 2 * L))[..., L : L + 1]
        left, right = _suffix_sums(d[..., :L]), _prefix_sums(d[..., L:])
        slope = self.slope

        def value(a, b):
            """Mean of the block of a elements of the left and b of the right."""
            total = left.gather(-1, L - a) + right.gather(-1, b)
            return y + total / (a + b) + (slope / 2) * (b - a - 1)

        return value


def _suffix_sums(t):
    return torch.nn.functional.pad(t.flip(-1).cumsum(-1).flip(-1), (0, 1))


def _prefix_sums(t):
    return torch.nn.functional.pad(t.cumsum(-1), (1, 0))


class Exponentials:
    """kl: a block's value is log sum exp(p_i) - log sum exp(w_i)."""

    def __init__(self, p, w):
        self.p, self.w = p, w
        self.start = p - w

    def halves(self, L: int):
        sides = []
        for t in (self.p, self.w):
            t = t.unflatten(-1, (-1, 2 * L))
            border = t[..., L : L + 1]
            t = t - border
            left = torch.logcumsumexp(t[..., :L].flip(-1), -1)
            right = torch.logcumsumexp(t[..., L:], -1)
            sides.append((border, left, right))

        def value(a, b):
            out = []
            for border, left, right in sides:
                total = torch.logaddexp(_or_nothing(left, a), _or_nothing(right, b))
                out.append(border + total)
            return out[0] - out[1]

        return value


def _or_nothing(sums, count):
    return torch.where(count > 0, sums.gather(-1, (count - 1).clamp(min=0)), -torch.inf)


def solve(problem) -> torch.Tensor:
    """The value of each position's block, float64 [R, N], N a power of two, for a problem whose start is [R, N]."""
    V = problem.start
    N, L = V.shape[-1], 1
    while L < N:
        V = _merge(V.unflatten(-1, (-1, 2 * L)), problem.halves(L), L).flatten(-2)
        L *= 2
    return V


def _merge(V, value, L: int):
    """V [R, pairs, 2 L], both halves solved: V of the whole."""
    left, right = (-V[..., :L]).contiguous(), (-V[..., L:]).contiguous()  # ascending

    # the block of value v itself adds nothing to the sign that decides about it, and its size may hide the rest
    def left_joins(v):
        """Whether the left block of value -v joins: the rest of what a block of its value would take lies above."""
        return value(L - torch.searchsorted(left, v, right=True), torch.searchsorted(right, v, right=True)) >= -v

    def right_joins(v):
        return value(L - torch.searchsorted(left, v), torch.searchsorted(right, v)) <= -v

    # the first left element that joins, the last right one; those at the border do, if any does
    j, k = torch.full_like(left[..., :1], L - 1, dtype=torch.int64), torch.zeros_like(left[..., :1], dtype=torch.int64)
    step = L // 2
    while step:
        try_j, try_k = j - step, k + step
        j = torch.where(left_joins(left.gather(-1, try_j)), try_j, j)
        k = torch.where(right_joins(right.gather(-1, try_k)), try_k, k)
        step //= 2
    # whole blocks, also where rounding denies that the one at the border joins
    a = L - torch.searchsorted(left, left.gather(-1, j))
    b = torch.searchsorted(right, right.gather(-1, k), right=True)
    touch = left[..., -1:] >= right[..., :1]
    i = torch.arange(2 * L, device=V.device)
    joined = touch & (i >= L - a) & (i < L + b)
    return torch.where(joined, value(a, b), V)
