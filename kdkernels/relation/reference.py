# SPDX-License-Identifier: Apache-2.0
"""The textbook: one line per equation, the letters of MATH.md, any dtype. x student, y teacher, one row a sample."""

from __future__ import annotations

import torch


def norm(v):
    """|v| along the last dimension, with gradient 0 where it is 0."""
    square = (v * v).sum(-1)
    return torch.where(square == 0, 0, torch.where(square == 0, 1, square).sqrt())


def over(a, b):
    """a / b, 0 where b = 0."""
    return torch.where(b == 0, 0, a / torch.where(b == 0, 1, b))


def smooth_l1(e):
    return torch.where(e.abs() < 1, e * e / 2, e.abs() - 1 / 2)


def differences(x):
    """x_i - x_v as [v, i, p]."""
    return x[None] - x[:, None]


def relative_distances(x):
    """u_ik = d_ik / mu, mu the mean of the distances that are not 0."""
    d = norm(differences(x))
    return over(d, over(d.sum(), (d != 0).sum()))


def rkd_distance(x, y):
    return smooth_l1(relative_distances(x) - relative_distances(y)).mean()


def angles(x):
    """cos of the angle at v between i and k, [v, i, k]."""
    e = differences(x)
    e = over(e, norm(e)[..., None])
    return e @ e.mT


def rkd_angle(x, y):
    return smooth_l1(angles(x) - angles(y)).mean()


def probabilities(x, eps):
    """Rows (cos + 1) / 2 with sum 1; a sample that is 0 has cosine 0 to all."""
    u = x / (norm(x) + eps)[:, None]
    # no gradient to a sample that is 0
    u = torch.where((x == 0).all(-1, keepdim=True), u.detach(), u)
    s = (u @ u.mT + 1) / 2
    return s / s.sum(1, keepdim=True)


def pkt(x, y, eps):
    p, t = probabilities(x, eps), probabilities(y, eps)
    return (t * ((t + eps) / (p + eps)).log()).mean()
