# SPDX-License-Identifier: Apache-2.0
"""The losses as the public implementations write them, one function each: what `kd.losses` is measured against.

Student before teacher, features in, a scalar out; the gradient is autograd's. Formulas of RepDistiller's classes, of
the public ICKD and RCKA code and of the transfer-learning libraries' `mmd_rbf`; none takes masks or mixed dtypes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def sp(student, teacher):
    n = len(student)
    K, L = (F.normalize(x.flatten(1) @ x.flatten(1).T, dim=1) for x in (student, teacher))
    return (K - L).square().sum() / n**2


def gram_mse(student, teacher):
    K, L = (x.flatten(1) @ x.flatten(1).T for x in (student, teacher))
    return (K - L).square().mean()


def mmd(student, teacher, multiplier=2.0, number=5):
    """All pairs of both sides as differences, [2n, 2n, p]."""
    n, rows = len(student), torch.cat([student, teacher])
    d2 = (rows[None] - rows[:, None]).square().sum(2)
    width = d2.detach().sum() / (len(rows) ** 2 - len(rows)) / multiplier ** (number // 2)
    K = sum(torch.exp(-d2 / (width * multiplier**i)) for i in range(number))
    return (K[:n, :n] + K[n:, n:] - K[:n, n:] - K[n:, :n]).mean()


def mmd_products(student, teacher):
    """The same with one Gram matrix for the distances: what a careful reader of the formula writes."""
    n, rows = len(student), torch.cat([student, teacher])
    square = rows.square().sum(1)
    d2 = (square[:, None] + square - 2 * rows @ rows.T).clamp(min=0)
    width = d2.detach().sum() / (len(rows) ** 2 - len(rows))
    K = sum(torch.exp(-d2 / (width * 2.0**i)) for i in range(-2, 3))
    return (K[:n, :n] + K[n:, n:] - 2 * K[:n, n:]).mean()


def nst(student, teacher):
    s, t = (F.normalize(x.flatten(2), dim=2) for x in to_smaller(student, teacher))
    return square_kernel(t, t).mean().detach() + square_kernel(s, s).mean() - 2 * square_kernel(s, t).mean()


def square_kernel(a, b):
    """(a_i . b_j)^2 of all channels through all their products, [B, C_b, C_a, L]."""
    return (a[:, None] * b[:, :, None]).sum(-1).square()


def ickd(student, teacher):
    B, C = student.shape[:2]
    G = [F.normalize(x.flatten(2) @ x.flatten(2).mT, dim=2) for x in (student, teacher)]
    return (G[0] - G[1]).square().sum() / (B * C)


def fsp(student, teacher):
    flows = [[flow(*layers) for layers in zip(side, side[1:], strict=False)] for side in (student, teacher)]
    return sum((s - t).square().mean() for s, t in zip(*flows, strict=True))


def flow(below, above):
    below, above = to_smaller(below, above)
    return (below.flatten(2)[:, None] * above.flatten(2)[:, :, None]).mean(-1)


def at(student, teacher, p=2):
    a = [F.normalize(x.pow(p).mean(1).flatten(1)) for x in to_smaller(student, teacher)]
    return (a[0] - a[1]).square().mean()


def to_smaller(a, b):
    height, width = a.shape[2], b.shape[2]
    if height > width:
        return F.adaptive_avg_pool2d(a, (width, width)), b
    return (a, F.adaptive_avg_pool2d(b, (height, height))) if height < width else (a, b)


def rcka(student, teacher):
    """Both logit terms with their Gram matrices; the class term's is C x C."""
    return -15 * aligned(teacher, student, rows=True) - 15 * aligned(teacher.T, student.T, rows=True)


def aligned(x, y, rows=False):
    """Uncentred CKA by traces of products of n x n matrices."""
    K, L = x @ x.T, y @ y.T
    if rows:
        K, L = (G / G.diagonal().sqrt()[:, None] for G in (K, L))
    return (K @ L.T).trace() / ((K @ K.T).trace() * (L @ L.T).trace()).sqrt()


def pcka(student, teacher):
    """A loop over the channels of a level; backward of each index fills a tensor of all of them, as it does there."""
    size = [-(-n // 16) * 16 for n in teacher.shape[2:]]
    x, y = (patches(side, size) for side in (student, teacher))
    return -15 * sum(aligned(y[c], x[c]) for c in range(len(x))) / len(x)


def patches(maps, size):
    x = F.interpolate(maps.transpose(0, 1), size, mode="bilinear")
    C, B, H, W = x.shape
    x = x.reshape(C, B, H // 16, 16, W // 16, 16).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(C, -1, B * 256).contiguous()


def pkt(student, teacher, eps=1e-7):
    P, Q = (shares(side, eps) for side in (student, teacher))
    return (Q * torch.log((Q + eps) / (P + eps))).mean()


def shares(x, eps):
    x = x / (x.square().sum(1, keepdim=True).sqrt() + eps)
    K = (x @ x.T + 1) / 2
    return K / K.sum(1, keepdim=True)


def cc(student, teacher):
    difference = (student - teacher).abs()
    return (difference[:-1] * difference[1:]).sum(1).mean()


def rkd_angle(student, teacher):
    """Cosines of all triplets from unit differences, [n, n, p]."""
    s, t = (cosines(side) for side in (student, teacher))
    return F.smooth_l1_loss(s, t.detach())


def cosines(x):
    unit = F.normalize(x[None] - x[:, None], dim=2)
    return torch.bmm(unit, unit.mT).flatten()


def rkd_distance(student, teacher):
    s, t = (relative_distances(side) for side in (student, teacher))
    return F.smooth_l1_loss(s, t.detach())


def relative_distances(x):
    square = x.square().sum(1)
    d = (square[:, None] + square - 2 * x @ x.T).clamp(min=1e-12).sqrt()
    d = d * (1 - torch.eye(len(x), dtype=x.dtype, device=x.device))
    return d / d[d > 0].mean()


def kd(student, teacher, tau=4.0):
    q = F.softmax(teacher / tau, 1)
    return F.kl_div(F.log_softmax(student / tau, 1), q, reduction="batchmean") * tau**2


def dist(student, teacher, tau=1.0):
    p, q = (F.softmax(side / tau, 1) for side in (student, teacher))
    return tau**2 * (1 - correlation(p, q).mean() + 1 - correlation(p.T, q.T).mean())


def correlation(a, b):
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1)
