# SPDX-License-Identifier: Apache-2.0
"""The ranking family once more, in NumPy alone: sequential pool-adjacent-violators with sums in long double.

Independent of the package, because the sanitizer legs import only NumPy and the module under test. Shape letters: R
rows, n elements of a row; s is a row sorted descending; a block is the positions [a, b).
"""

import math

import numpy as np

Wide = np.longdouble
SMALLEST_SPREAD = 2.0**-1022


def pool_l2(s, eps, w):
    """Blocks [(a, b)] of the decreasing fit to s - eps w; neighbours pool unless the fit falls strictly."""
    y = s.astype(Wide) - Wide(s[0]) - Wide(eps) * (w.astype(Wide) - Wide(w[0]))
    blocks = []
    for i in range(len(s)):
        a, c, total = i, 1, y[i]
        while blocks and blocks[-1][2] * c <= total * blocks[-1][1]:
            a, c0, total0 = blocks.pop()
            c, total = c + c0, total + total0
        blocks.append((a, c, total))
    return [(a, a + c) for a, c, _ in blocks]


def pool_kl(s, eps, w):
    """The same for log sum exp(s / eps) - log sum exp(w) of a block."""
    z, w = (s.astype(Wide) - Wide(s[0])) / Wide(eps), w.astype(Wide) - Wide(w[0])
    blocks = []
    for i in range(len(s)):
        a, Z, V = i, Wide(1), Wide(1)
        while blocks:
            a0, Z0, V0 = blocks[-1]
            if (z[a0] - z[a]) - (w[a0] - w[a]) + np.log(Z0 / Z) - np.log(V0 / V) > 0:
                break
            blocks.pop()
            Z, V, a = Z0 + Z * np.exp(z[a] - z[a0]), V0 + V * np.exp(w[a] - w[a0]), a0
        blocks.append((a, Z, V))
    ends = [a for a, _, _ in blocks[1:]] + [len(s)]
    return [(a, b) for (a, _, _), b in zip(blocks, ends, strict=True)]


def poisoned(row):
    return bool(np.isnan(row).any() or np.isposinf(row).any())


def strength_of(row, factor, strength, relative):
    """eps of one row: strength * factor, times the spread of the valid elements if relative; NaN if poisoned."""
    if poisoned(row):
        return math.nan
    eps = strength * factor
    if relative:
        x = row[row > -np.inf].astype(np.float64)
        spread = 1.0
        if len(x):
            d = x - x.max()
            d = (d - d.mean()).astype(Wide)
            found = float(np.sqrt(12 * (d * d).mean()) / len(x))
            spread = max(found, SMALLEST_SPREAD) if d.any() else 1.0
        eps *= spread
    return eps


def rank_row(row, eps, kl, descending):
    """(rank float64 [n], block float64 [n]): the block's first position, -1 alone or absent."""
    n = len(row)
    rank, block = np.zeros(n), np.full(n, -1)
    if math.isnan(eps):
        return np.full(n, np.nan), block
    at = np.flatnonzero(row > -np.inf)
    theta = row[at].astype(np.float64) * (-1 if descending else 1)
    order = np.argsort(-theta, kind="stable")
    s, m = theta[order], len(theta)
    if m == 0:
        return rank, block
    w = np.arange(m, 0, -1.0)
    blocks = pool_kl(s, eps, np.log(w)) if kl and eps > 0 else pool_l2(s, eps, w)
    for a, b in blocks:
        c, mean_w = b - a, m - (a + b - 1) / 2
        part = s[a:b].astype(Wide) - Wide(s[a])
        if eps == 0:
            r = np.full(c, mean_w)
        elif kl:
            e = np.exp(part / Wide(eps))
            r = c * mean_w * e / e.sum()
        else:
            r = mean_w + (part - part.sum() / c) / Wide(eps)
        rank[at[order[a:b]]] = r
        if c > 1:
            block[at[order[a:b]]] = a
    return rank, block


def rank_rows(x, strengths, strength, relative, kl, descending):
    """(rank [R, n], block [R, n], eps [R]) in float64."""
    factor = np.ones(len(x)) if strengths is None else np.broadcast_to(strengths, len(x))
    eps = np.array([strength_of(row, f, strength, relative) for row, f in zip(x, factor, strict=True)])
    rank, block = np.zeros(x.shape), np.zeros(x.shape, np.int64)
    for r, row in enumerate(x):
        rank[r], block[r] = rank_row(row, eps[r], kl, descending)
    return rank, block, eps


def rank_gradient_row(u, rank, block, eps, kl, descending):
    """d<u, rank>/dx of one row from its blocks, any ids; float64 [n]."""
    if math.isnan(eps):
        return np.full(len(u), np.nan)
    u, g = u.astype(Wide), np.zeros(len(u))
    for one in np.unique(block[block >= 0]):
        at = np.flatnonzero(block == one)
        if eps == 0:
            continue
        if kl:
            r = rank[at].astype(Wide)
            g[at] = r * (u[at] - (r * u[at]).sum() / r.sum()) / Wide(eps)
        else:
            g[at] = (u[at] - u[at].mean()) / Wide(eps)
    return -g if descending else g


def rank_rows_backward(grad, rank, block, eps, kl, descending):
    rows = zip(grad, rank, block, eps, strict=True)
    return np.stack([rank_gradient_row(*row, kl, descending) for row in rows]) if len(grad) else np.zeros(grad.shape)


def sort_row(s, eps, kl):
    """(value [n], start [n]) of a row sorted descending with absent entries last."""
    n = len(s)
    if math.isnan(eps):
        return np.full(n, np.nan), np.arange(n)
    m = int((s > -np.inf).sum())
    value, start = np.full(n, -np.inf), np.arange(n)
    if m == 0:
        return value, start
    v = s[:m].astype(np.float64)
    if eps == 0:
        value[:m] = v
        return value, start
    z = np.arange(m, 0, -1.0)
    blocks = pool_kl(z, eps, v) if kl else pool_l2(z, eps, v)
    for a, b in blocks:
        part, steps = v[a:b].astype(Wide) - Wide(v[a]), -np.arange(b - a).astype(Wide) / Wide(eps)
        if kl:
            value[a:b] = v[a] + (steps - np.log(np.exp(steps).sum()) + np.log(np.exp(part).sum()))
        else:
            value[a:b] = v[a] + (part.sum() / (b - a) + steps - steps.sum() / (b - a))
        start[a:b] = a
    return value, start


def sort_rows(s, strengths, strength, relative, kl):
    factor = np.ones(len(s)) if strengths is None else np.broadcast_to(strengths, len(s))
    eps = np.array([strength_of(row, f, strength, relative) for row, f in zip(s, factor, strict=True)])
    value, start = np.zeros(s.shape), np.zeros(s.shape, np.int64)
    for r, row in enumerate(s):
        value[r], start[r] = sort_row(row, eps[r], kl)
    return value, start, eps


def sort_rows_backward(grad, s, start, kl):
    """Block mean of the gradient (l2), block softmax of s times its block sum (kl); absent entries get 0."""
    g = np.zeros(s.shape)
    for r, row in enumerate(s):
        if poisoned(row):
            g[r] = np.nan
            continue
        valid = row > -np.inf
        for a in np.unique(start[r][valid]):
            at = np.flatnonzero((start[r] == a) & valid)
            u, v = grad[r][at].astype(Wide), row[at].astype(Wide)
            e = np.exp(v - v.max()) if kl else np.ones(len(at))
            g[r][at] = e / e.sum() * u.sum()
    return g


def spearman_row(x, y, strength, relative, kl, hard_target):
    """(rho, d rho/dx, d rho/dy, |r - m|, |t - m|, eps of x, eps of y) of one row pair; 1 for what does not exist."""
    n = len(x)
    nothing = 0.0, np.zeros(n), np.zeros(n), 1.0, 1.0, 1.0, 1.0
    # a pair absent on either side goes first, whatever the other side holds
    at = np.flatnonzero((x != -np.inf) & (y != -np.inf))
    if poisoned(x[at]) or poisoned(y[at]):
        return math.nan, np.full(n, np.nan), np.full(n, np.nan), 1.0, 1.0, 1.0, 1.0
    if len(at) < 2:
        return nothing
    eps_x = strength_of(x[at], 1.0, strength, relative)
    eps_y = 0.0 if hard_target else strength_of(y[at], 1.0, strength, relative)
    r, block_x = rank_row(x[at], eps_x, kl, False)
    t, block_y = rank_row(y[at], eps_y, kl, False)
    if (x[at] == x[at][0]).all() or (y[at] == y[at][0]).all():
        return nothing
    m = (len(at) + 1) / 2
    r0, t0 = (r - m).astype(Wide), (t - m).astype(Wide)
    length_r, length_t = np.sqrt((r0 * r0).sum()), np.sqrt((t0 * t0).sum())
    if not length_r > 0 or not length_t > 0:
        return nothing
    rho = (r0 * t0).sum() / (length_r * length_t)
    dx, dy = np.zeros(n), np.zeros(n)
    u = ((t0 / length_t - rho * r0 / length_r) / length_r).astype(np.float64)
    dx[at] = rank_gradient_row(u, r, block_x, eps_x, kl, False)
    if not hard_target:
        u = ((r0 / length_r - rho * t0 / length_t) / length_t).astype(np.float64)
        dy[at] = rank_gradient_row(u, t, block_y, eps_y, kl, False)
    return float(rho), dx, dy, float(length_r), float(length_t), eps_x, eps_y
