# SPDX-License-Identifier: Apache-2.0
"""The textbook: one line per equation, the letters of MATH.md, any dtype. z student, y teacher, one row a sample."""

from __future__ import annotations

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


def jensen_shannon(z, y, tau):
    p, q = log_p(z, tau).exp(), log_p(y, tau).exp()
    d = (p - q) / torch.where(p + q == 0, 1, p + q)
    log_p_of_m, log_q_of_m = (torch.where(r == 0, 0, x).log1p() for r, x in ((p, d), (q, -d)))
    return tau**2 / 2 * (p * log_p_of_m + q * log_q_of_m).sum(-1)


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
