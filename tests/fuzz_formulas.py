# SPDX-License-Identifier: Apache-2.0
"""The fuzzer's formulas, written from the papers for float64 tensors: no line is shared with the package or its tests.

Each has the name and arguments of the op that it judges. A kernel is a tuple, ("rbf", sigma) or ("cosine",).
"""

import math

import numpy as np
import torch

ZERO = torch.zeros((), dtype=torch.float64)


def in_groups(function):
    """For x and y [n, ...] or groups of them, on the rows that masks keep (one mask, or one a side)."""

    def of_groups(x, y, *, mask=None, **options):
        masks = mask if isinstance(mask, (tuple, list)) else (mask, mask)
        if x.dim() > 2:
            groups = zip(x, y, *([None] * len(x) if m is None else m for m in masks), strict=True)
            return torch.stack([of_groups(a, b, mask=m, **options) for a, b, *m in groups])
        return function(*(t if m is None else t[m] for t, m in zip((x, y), masks, strict=True)), **options)

    return of_groups


def over(a, b):
    """a / b, and 0 where b is 0."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


def root(a):
    return torch.where(a == 0, 0.0, torch.where(a == 0, 1.0, a).sqrt())


def unit(t):
    return over(t, root(t.square().sum(-1, keepdim=True)))


def squared_distances(x, z):
    return (x[:, None] - z[None]).square().sum(-1)


def bandwidth(x, sigma):
    """A number, or that of a rule: sigma^2 is the median or mean of all squared distances, the diagonal's zeros too."""
    if not isinstance(sigma, str):
        return sigma
    d2 = squared_distances(x, x).detach().flatten()
    s2 = d2.quantile(0.5) if sigma == "median" and d2.quantile(0.5) > 0 else d2.mean()
    return math.sqrt(s2) or 1.0


def kernel_between(x, z, kernel, ruling):
    """k(x_i, z_j), a rule of the bandwidth being that of `ruling`."""
    name, *parameters = kernel
    if name == "linear":
        return x @ z.T
    if name == "polynomial":
        degree, scale, offset = parameters
        return (scale * x @ z.T + offset) ** degree
    if name == "cosine":
        return unit(x) @ unit(z).T
    sigmas = parameters[0] if isinstance(parameters[0], tuple) else parameters
    d2, sigmas = squared_distances(x, z), [bandwidth(ruling, s) for s in sigmas]
    return sum((-d2 / (2 * s**2)).exp() if name == "rbf" else (-root(d2) / s).exp() for s in sigmas)


def matrix(x, kernel, unbiased, center, row_normalize):
    """(K, K centred): U-centred (Szekely & Rizzo 2014; HSIC_1 is a product of two) or H K H (Gretton et al. 2005)."""
    if center and not row_normalize and kernel[0] == "linear":
        x = x - x.mean(0)  # which no centred statistic sees
    n, K = len(x), kernel_between(x, x, kernel, x)
    if row_normalize:
        K = over(K, root(K.diagonal())[:, None])
    if not unbiased:
        return K, K - K.mean(0) - K.mean(1, keepdim=True) + K.mean() if center else K
    off = 1 - torch.eye(n, dtype=K.dtype)
    K = K * off
    return K, off * (K - (K.sum(0) + K.sum(1, keepdim=True)) / (n - 2) + K.sum() / ((n - 1) * (n - 2)))


@in_groups
def hsic(x, y, *, kernel, unbiased=True, center=True, row_normalize=False):
    n = len(x)
    if n < (4 if unbiased else 1 + center):
        return ZERO
    (K, KC), (L, LC) = (matrix(t, k, unbiased, center, row_normalize) for t, k in zip((x, y), kernel, strict=True))
    total = (KC * LC).sum()
    if min(KC.abs().max() / K.abs().max(), LC.abs().max() / L.abs().max()) < 1e-5:  # a constant side: of first order
        total = ((K * LC).sum() + (KC * L).sum()) / 2
    return total / (n * (n - 3) if unbiased else max(n - 1, 1) ** 2)


@in_groups
def cka(x, y, *, kernel, unbiased=True, center=True, row_normalize=False):
    if len(x) < (4 if unbiased else 1 + center):
        return ZERO
    pairs = [matrix(t, k, unbiased, center, row_normalize) for t, k in zip((x, y), kernel, strict=True)]
    if any(C.abs().max() <= 1e-13 * K.abs().max() for K, C in pairs):  # a constant side
        return ZERO
    return math.prod([C / C.norm() for _, C in pairs]).sum()


@in_groups
def mmd(x, y, *, kernel, unbiased=True):
    n, m = len(x), len(y)
    if min(n, m) < (2 if unbiased else 1):
        return ZERO
    both = torch.cat([x, y])
    K = kernel_between(both, both, kernel, both)
    means = ((t.sum() - unbiased * t.trace()) / (len(t) * (len(t) - unbiased)) for t in (K[:n, :n], K[n:, n:]))
    return sum(means) - 2 * K[:n, n:].mean()


@in_groups
def gram_mse(x, y, *, normalize=None, reduction="mean"):
    K, L = (unit(t @ t.T) if normalize else t @ t.T for t in (x, y))
    squares = (K * K).sum() + (L * L).sum()  # an error in float32 is one of these terms
    total = (squares.detach() if normalize else squares) - 2 * (K * L).sum()
    return total / (max(len(x), 1) ** 2 if reduction == "mean" else 1)


def smooth_l1(a, b):
    e = (a - b).abs()
    return torch.where(e < 1, e**2 / 2, e - 0.5).mean()


def distinct(t):
    """Squared distances, as exact as squares of rows in float64; nearer ones are 0 (relation/MATH.md, "Precision")."""
    d2, size = squared_distances(t, t), (t - t.mean(0)).square().sum(-1).detach()
    size = size[:, None] + size
    return torch.where(d2 <= 64 * torch.finfo(torch.float64).eps * size, 0.0, (d2 + size) - size)


@in_groups
def rkd_distance(x, y):
    d = [root(distinct(t)) for t in (x, y)]
    return smooth_l1(*(over(t, t.sum() / (t > 0).sum().clamp(min=1)) for t in d)) if len(x) > 1 else ZERO


@in_groups
def rkd_angle(x, y):
    e = [unit(t[None] - t[:, None]) for t in (x, y)]
    return smooth_l1(*(t @ t.mT for t in e)) if len(x) > 2 else ZERO


def distillation_kl(student, teacher, *, tau, reduction="mean"):
    top = ((t / tau) - (t / tau).amax(-1, keepdim=True).detach() for t in (student, teacher))
    p, q = (t - t.logsumexp(-1, keepdim=True) for t in top)
    w = torch.where(teacher > -torch.inf, p - q, 0.0)
    small = w.clamp(max=1)
    # p and q add up to the same, so that p - q may join q log(q / p): a small value keeps its digits
    terms = torch.where((w == small) & (q > -torch.inf), q.exp() * (small.expm1() - small), p.exp() - q.exp() * (1 + w))
    plain = -(q.exp() * w)  # whose gradient is a difference of probabilities
    rows = tau**2 * (terms.detach() + plain - plain.detach()).sum(-1)
    return rows if reduction == "none" else getattr(rows, reduction)()


def generalized_jsd(student, teacher, *, tau, beta, reduction="mean"):
    p, q = (torch.log_softmax(t / tau, -1) for t in (student, teacher))
    there = (p > -torch.inf, q > -torch.inf)
    p, q = (torch.where(t > -torch.inf, t, -800.0) for t in (p, q))
    m = torch.logaddexp(q + math.log(beta), p + math.log1p(-beta))
    # r log r - r + 1 with r = p / m: what is added up to 0, so that a small value keeps its digits
    terms = [
        torch.where(has, (t - m).exp() * (t - m) - (t - m).expm1(), 1.0) for t, has in zip((p, q), there, strict=True)
    ]
    rows = tau**2 * (m.exp() * ((1 - beta) * terms[0] + beta * terms[1])).sum(-1)
    return rows if reduction == "none" else getattr(rows, reduction)()


def projected_mse(s, t, basis, *, channel_dim=1, reduction="mean", mask=None):
    difference = (s - t).movedim(channel_dim, -1)
    keep = torch.ones(len(s), dtype=torch.bool) if mask is None else mask
    keep = keep.reshape(keep.shape + (1,) * (s.dim() - 1 - keep.dim())).expand(difference.shape[:-1])
    square = (torch.where(keep[..., None], difference, 0.0) @ basis).square()
    if reduction == "none":
        return square.reshape(len(s), -1).sum(1) / (basis.shape[1] * keep.reshape(len(s), -1).sum(1).clamp(min=1))
    return square.sum() / (basis.shape[1] * keep.sum().clamp(min=1) if reduction == "mean" else 1)


def nystrom_features(x, landmarks, *, kernel, jitter):
    C, W = (kernel_between(t, landmarks, kernel, x) for t in (x, landmarks))
    R = torch.linalg.cholesky(W + jitter * W.trace() / len(W) * torch.eye(len(W), dtype=W.dtype))
    return torch.linalg.solve_triangular(R, C.T, upper=False).T


def nystrom_cka(x, y, x_landmarks, y_landmarks, *, kernel, jitter, unbiased=True, mask=None):
    x, y = (t if mask is None else t[mask] for t in (x, y))
    if len(x) < (4 if unbiased else 2):
        return ZERO
    sides = zip((x, y), (x_landmarks, y_landmarks), kernel, strict=True)
    phi = [nystrom_features(*pair, kernel=k, jitter=jitter) for *pair, k in sides]
    return cka(*phi, kernel=(("linear",), ("linear",)), unbiased=unbiased)


def blocks_of(z, w, kl):
    """Pool adjacent violators: how many positions each block has; values of blocks fall from left to right."""
    blocks = []
    for a, b in zip(z.tolist(), w.tolist(), strict=True):
        blocks.append((a, b, 1))
        while len(blocks) > 1 and blocks[-2][0] - blocks[-2][1] <= blocks[-1][0] - blocks[-1][1]:
            (a, b, c), (d, e, f) = blocks.pop(-2), blocks.pop()
            pooled = [np.logaddexp(s, t) if kl else (c * s + f * t) / (c + f) for s, t in ((a, d), (b, e))]
            blocks.append((*pooled, c + f))
    return [count for *_, count in blocks]


def projected(z, w, kl):
    """P(z, w) of Blondel et al. 2020 for falling z and w: z - v, v isotonic."""
    blocks = zip(*(t.split(blocks_of(z, w, kl)) for t in (z, w)), strict=True)
    return torch.cat([a - (a.logsumexp(0) - b.logsumexp(0) if kl else (a - b).mean()) for a, b in blocks] or [z])


def strength_of(row, strength):
    """A number, or c standard deviations of the row in units of a gap of n even points: c sqrt(12) / n."""
    if not isinstance(strength, (tuple, str)):
        return strength
    spread = float(row.detach().std(correction=0)) * math.sqrt(12) / len(row) if len(row.unique()) > 1 else 1.0
    return (1.0 if strength == "auto" else strength[1]) * spread


def ranks_of(row, regularization, strength):
    kl, rho = regularization == "kl", torch.arange(len(row), 0, -1, dtype=row.dtype)
    s, order = row.sort(descending=True, stable=True)
    found = projected(s / strength_of(row, strength), rho.log() if kl else rho, kl)
    return (found.exp() if kl else found)[order.argsort()]


def on_rows(function, dim, mask, *sides):
    """`function(which are present on all sides, the present ones of each side)` of each row along dim."""
    keep = torch.stack([*(t > -torch.inf for t in sides), *([] if mask is None else [mask])]).all(0)
    keep, *moved = (t.movedim(dim, -1) for t in (keep, *sides))
    rows = zip(*(t.reshape(-1, t.shape[-1]) for t in (keep, *moved)), strict=True)
    out = torch.stack([function(there, *(row[there] for row in each)) for there, *each in rows])
    return out.reshape(keep.shape[:-1] + out.shape[1:])


def soft_rank(x, *, regularization, regularization_strength, dim=-1, descending=False, mask=None):
    def one(there, row):
        ranks = ranks_of(-row if descending else row, regularization, regularization_strength)
        return row.new_zeros(there.shape).index_put((there,), ranks)

    return on_rows(one, dim, mask, x).movedim(-1, dim)


def soft_sort(x, *, regularization, regularization_strength, dim=-1, descending=False, mask=None):
    def one(there, row):
        sign, rho = 1 if descending else -1, torch.arange(len(row), 0, -1, dtype=row.dtype)
        s = (sign * row).sort(descending=True, stable=True).values
        found = projected(rho / strength_of(row, regularization_strength), s, regularization == "kl")
        return torch.cat([sign * found, row.new_full([len(there) - len(row)], -torch.inf)])

    return on_rows(one, dim, mask, x).movedim(-1, dim)


def average_ranks(row, *_):
    return ((row[:, None] > row).sum(1) + (row[:, None] >= row).sum(1) + 1).to(row) / 2


def spearman(x, y, *, regularization, regularization_strength, dim=-1, hard_target=False, mask=None):
    def one(_, *sides):
        if any(len(t.unique()) < 2 for t in sides):
            return ZERO
        ways = zip((ranks_of, average_ranks if hard_target else ranks_of), sides, strict=True)
        ranks = (way(t, regularization, regularization_strength) - (len(t) + 1) / 2 for way, t in ways)
        return math.prod(r / r.norm() for r in ranks).sum()

    return on_rows(one, dim, mask, x, y)
