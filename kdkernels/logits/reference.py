# SPDX-License-Identifier: Apache-2.0
"""The textbook: one line per equation, the letters of MATH.md, any dtype. z student, y teacher, one row a sample."""

from __future__ import annotations

import math

import torch


def log_p(z, tau):
    return (z / tau).log_softmax(-1)


def kl(q, log_q, log_p):
    """sum_c q_c (log q_c - log p_c), each class with p_c - q_c beside it, which add up to 0: no term is negative."""
    w = torch.where(q == 0, 0, log_p - log_q)
    near = w.abs() < 1
    v = torch.where(near, w, 0)
    return torch.where(near & (q > 0), q * (v.expm1() - v), log_p.exp() - q - q * w).sum(-1)


def distillation_kl(z, y, tau):
    log_q = log_p(y, tau)
    return tau**2 * kl(log_q.exp(), log_q, log_p(z, tau))


def divergence(z, y, tau, b, u, v):
    """tau^2 [u KL(q || m) + v KL(p || m)], m = b q + (1 - b) p; with u = v = 0 tau^2 / 2 sum_c |p_c - q_c|."""
    of_z, of_y = log_p(z, tau), log_p(y, tau)
    p, q = of_z.exp(), of_y.exp()
    if u == v == 0:
        d = p - q
        side = torch.where(d == 0, 0, d / d.abs()).detach()  # NaN where a side is, which abs() would not hand on
        value = (d * side).sum(-1) / 2
    else:
        of_m = of_z if b == 0 else of_y if b == 1 else log_mixture(of_y, of_z, b)
        value = u * kl(q, of_y, of_m) + v * kl(p, of_z, of_m)
    return (tau**2 * value[..., None])[..., 0]


def log_mixture(log_q, log_p, b):
    """log(b q + (1 - b) p), from the larger of both, which equal ones are exactly; -inf where both are 0."""
    closed = (log_q == -math.inf) & (log_p == -math.inf)
    log_q, log_p = (torch.where(closed, 0, x) for x in (log_q, log_p))
    w = log_p - log_q
    from_p = log_p + (b * torch.where(w > 0, -w, 0).expm1()).log1p()
    from_q = log_q + ((1 - b) * torch.where(w > 0, 0, w).expm1()).log1p()
    return torch.where(closed, -math.inf, torch.where(w > 0, from_p, from_q))


def mixed_label(a, b, lam, C):
    """lam e_a + (1 - lam) e_b, [R, C]."""
    e = torch.eye(C, dtype=lam.dtype, device=lam.device)
    return lam[:, None] * e[a] + (1 - lam[:, None]) * e[b]


def target(y, clean, permutation, label, lam, tau, mix):
    """q = k_1 p_t(y) + k_2 [lam p_t(clean) + (1 - lam) p_t(clean[permutation])] + k_3 label."""
    q = mix[0] * log_p(y, tau).exp() + mix[2] * label
    if mix[1]:
        p = log_p(clean, tau).exp()
        q = q + mix[1] * (lam[:, None] * p + (1 - lam[:, None]) * p[permutation])
    return q


def cross_entropy(q, log_p):
    """-sum_c q_c log p_c, a class with q_c = 0 adding nothing."""
    return -(q * torch.where(q == 0, 0, log_p)).sum(-1)


def mixed_distillation(z, y, a, b, lam, tau, alpha, clean, permutation, mix):
    label = mixed_label(a, b, lam, z.shape[-1])
    value = 0
    if alpha < 1:
        value = value + (1 - alpha) * cross_entropy(label, log_p(z, 1))
    if alpha > 0:
        q = target(y, clean, permutation, label, lam, tau, mix)
        value = value + alpha * tau**2 * kl(q, q.log(), log_p(z, tau))
    return value


def mixup(x, lam, permutation):
    """lam_i x_i + (1 - lam_i) x_permutation(i)."""
    lam = lam.reshape(-1, *[1] * (x.dim() - 1))
    return lam * x + (1 - lam) * x[permutation]
