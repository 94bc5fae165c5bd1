# SPDX-License-Identifier: Apache-2.0
"""Isotonic regression of many rows at once: chunks by min-max, then log2(n) levels of merges; no loop over n, no sync.

Merging two solved halves makes at most one new block, a suffix of the left and a prefix of the right. Its value v is
the root of a decreasing function of v, found by a search over the elements of both halves, from the border outwards,
for all rows and pairs together. Sums start at the border of the halves, so they never cancel (MATH.md, "In parallel").

The state is the value V of each element's block. Neighbouring blocks have V_left > V_right, as equals pool, so blocks
are exactly the runs of equal V, and a merge is V = max(V, v) on the left and min(V, v) on the right.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import pad

# absent entries (the end of a row, and what fills it up to a power of two) stand far below and pool with each other
FAR = -1e30
PROBES = 4096  # a search probes several places at once while there are fewer pairs than this: few, large steps


class Squares:
    """l2: a block's value is the mean of y_i = q_i + slope i, q monotone, i the position in the row."""

    def __init__(self, q, slope: int):
        self.q, self.slope = q, slope
        self.start = q + slope * torch.arange(q.shape[-1], dtype=q.dtype, device=q.device)

    def chunks(self, m: int):
        y = _columns(self.start, m)
        first = y[0].clone()
        return _rows(minmax(y - first, None) + first)

    def halves(self, L: int):
        q = self.q.unflatten(-1, (-1, 2 * L))
        d = q - q[..., L : L + 1]
        border = self.start.unflatten(-1, (-1, 2 * L))[..., L : L + 1] - self.slope / 2
        left = pad(d[..., :L].flip(-1).cumsum(-1), (1, 0))
        right = pad(d[..., L:].cumsum(-1), (1, 0))
        half = self.slope / 2

        def value(a, b):
            """The mean over the last a elements of the left and the first b of the right."""
            total = left.gather(-1, a) + right.gather(-1, b)
            return total.div_(a + b).add_(border).add_(b - a, alpha=half)

        return value


class Ratios:
    """kl of ranks: a block's value is log sum exp(p_i) - log sum w_i, w_i = n - i; p falls by less than 40 a step."""

    def __init__(self, p, n_valid):
        self.p, self.n = p, n_valid
        i = torch.arange(p.shape[-1], dtype=p.dtype, device=p.device)
        self.w = (n_valid - i).clamp_(min=1)
        self.start = p - self.w.log()

    def chunks(self, m: int):
        p = _columns(self.p, m)
        first = p[0].clone()
        V = minmax((p - first).exp_(), _columns(self.w.expand_as(self.p), m)).log_().add_(first)
        return _rows(V.clamp_(min=FAR))

    def halves(self, L: int):
        p = self.p.unflatten(-1, (-1, 2 * L))
        border = p[..., L : L + 1]
        # what overflows here is so far above the border that no block reaches it
        E = (p - border).clamp_(max=600).exp_()
        left, right = pad(E[..., :L].flip(-1).cumsum(-1), (1, 0)), pad(E[..., L:].cumsum(-1), (1, 0))
        at = torch.arange(L, p.shape[-2] * 2 * L, 2 * L, device=p.device)[:, None]
        top = 2 * (self.n[..., None] - at) + 1  # the weights of [at - a, at + b) sum to (a + b)(top + a - b) / 2

        def value(a, b):
            R = (a + b) * (top + a - b).clamp_(min=1) / 2
            return (left.gather(-1, a) + right.gather(-1, b)).div_(R).log_().add_(border)

        return value


class Exponentials:
    """kl of sorts: a block's value is log sum exp(p_i) - log sum exp(w_i), both of any range: logarithms throughout."""

    def __init__(self, p, w):
        self.p, self.w = p, w
        self.start = p - w

    def chunks(self, m: int):
        return None

    def halves(self, L: int):
        sides = []
        for t in (self.p, self.w):
            t = t.unflatten(-1, (-1, 2 * L))
            border = t[..., L : L + 1]
            t = t - border
            left, right = torch.logcumsumexp(t[..., :L].flip(-1), -1), torch.logcumsumexp(t[..., L:], -1)
            sides.append((border, pad(left, (1, 0), value=-math.inf), pad(right, (1, 0), value=-math.inf)))

        def value(a, b):
            p, w = (t + torch.logaddexp(left.gather(-1, a), right.gather(-1, b)) for t, left, right in sides)
            return p.sub_(w)

        return value


def _columns(t, m: int):
    """[R, N] as [m, R, N / m]: the same place of every chunk side by side."""
    return t.unflatten(-1, (-1, m)).permute(2, 0, 1).contiguous()


def _rows(t):
    return t.permute(1, 2, 0).contiguous().flatten(-2)


def minmax(num, den):
    """Antitonic regression of each column of num [m, ...] over den (or 1): min over a <= i of max over b >= i of the
    ratio of sums over [a, b]. m^2 / 2 steps on whole slices, for short m."""
    m = len(num)
    whole = torch.empty_like(num)
    best, ratio, num = whole.unbind(), torch.empty_like(num).unbind(), num.unbind()
    den = None if den is None else den.unbind()
    S, D = torch.empty_like(num[0]), torch.empty_like(num[0])
    for a in range(m):
        S.copy_(num[a])
        if den is not None:
            D.copy_(den[a])
        for b in range(a, m):
            if b > a:
                S.add_(num[b])
                if den is not None:
                    D.add_(den[b])
            torch.mul(S, 1.0 / (b - a + 1), out=ratio[b]) if den is None else torch.div(S, D, out=ratio[b])
        for i in range(m - 1, a - 1, -1):
            if i < m - 1:
                torch.maximum(ratio[i], ratio[i + 1], out=ratio[i])
            torch.minimum(best[i], ratio[i], out=best[i]) if a else best[i].copy_(ratio[i])
    return whole


def solve(problem) -> torch.Tensor:
    """The value of each position's block, float64 [R, N], N a power of two."""
    R, N = problem.start.shape
    L = min(N, 16 if R * N >= 1 << 15 else 8)
    V = problem.chunks(L) if L > 1 else None
    if V is None:
        V, L = problem.start, 1
    while L < N:
        V = _merge(V.unflatten(-1, (-1, 2 * L)), problem.halves(L), L).flatten(-2)
        L *= 2
    return V


def _merge(V, value, L: int):
    """V [R, pairs, 2 L], both halves solved: V of the whole."""
    left = V[..., :L].flip(-1)  # from the border outwards, ascending
    right = V[..., L:].neg()  # the same, negated

    def reaches(v):
        """Whether the new block's value is at least v. A block of value v itself is left out on the left: it adds
        nothing to the sign, and its size may hide the rest."""
        return value(torch.searchsorted(left, v), torch.searchsorted(right, -v, right=True)) >= v

    # elements from the border that join: on the left while the new value reaches theirs, on the right while it does
    # not exceed theirs. The ones at the border do, if any does
    c = left.new_zeros((*left.shape[:-1], 2), dtype=torch.int64)
    stride = L
    while stride > 1:
        K = 1
        while (K + 1) * 2 <= stride and left.numel() // L * K * 2 < PROBES:
            K = 2 * K + 1
        stride //= K + 1
        ahead = stride * torch.arange(1, K + 1, device=V.device)
        try_left, try_right = (c[..., :1] + ahead), (c[..., 1:] + ahead)
        above = right.gather(-1, try_right).neg_()
        above = torch.nextafter(above, torch.full_like(above, math.inf))
        found = reaches(torch.cat([left.gather(-1, try_left), above], -1))
        joins = torch.stack([found[..., :K].sum(-1), K - found[..., K:].sum(-1)], -1)
        c = c + stride * joins
    low, high = left.gather(-1, c[..., :1]), right.gather(-1, c[..., 1:])  # the outermost that join
    v = value(torch.searchsorted(left, low, right=True), torch.searchsorted(right, high, right=True))
    v = torch.minimum(torch.maximum(v, low), high.neg_())  # which rounding may not split off again
    apart = left[..., :1] > -right[..., :1]
    out = torch.empty_like(V)
    torch.maximum(V[..., :L], v.masked_fill(apart, -math.inf), out=out[..., :L])
    torch.minimum(V[..., L:], v.masked_fill(apart, math.inf), out=out[..., L:])
    return out
