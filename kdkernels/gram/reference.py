# SPDX-License-Identifier: Apache-2.0
"""The textbook of the Gram family: one line per equation of MATH.md, n x n matrices, plain autograd. The oracle.

Letters: K, L the kernel matrices of x and y, H = I - 11'/n. Nothing here shares algebra with the fast backends.
All of it is float64, whatever the inputs are, and only the value is rounded: float32 squares end at 1e19, and off the
origin, or between clusters far apart, nothing would be left of what they cancel to.
"""

import torch


def kernel_matrix(x, kernel):
    """K_ij = k(x_i, x_j) for one group, x [n, p]."""
    if kernel.name == "linear":
        return x @ x.T
    if kernel.name == "polynomial":
        return (kernel.scale * (x @ x.T) + kernel.coef0) ** kernel.degree
    if kernel.name == "cosine":
        norm = x.norm(dim=1, keepdim=True)
        unit = unit_of(x, norm)
        return unit @ unit.T
    d2 = squared_distances(x)
    sigmas = bandwidths(kernel.sigma, d2)
    if kernel.name == "rbf":
        return sum(torch.exp(-d2 / (2 * s**2)) for s in sigmas)
    d = torch.where(d2 == 0, torch.ones_like(d2), d2).sqrt() * (d2 != 0)
    return sum(torch.exp(-d / s) for s in sigmas)


def squared_distances(x):
    """|x_i - x_j|^2 = |x_i|^2 + |x_j|^2 - 2 x_i . x_j of the centred rows; what is rounding of a zero becomes zero."""
    x = x - x.mean(0)
    s = x.square().sum(1)
    d2 = s[:, None] + s - 2 * x @ x.T
    return d2 * (d2 > 16 * torch.finfo(x.dtype).eps * (s[:, None] + s))


def bandwidths(sigma, d2):
    """The bandwidths as a list; a rule gives sigma^2 = factor^2 * (median or mean of d2, zero diagonal included)."""
    if isinstance(sigma, torch.Tensor):
        return [sigma.to(d2)]
    if not isinstance(sigma[0], str):
        return list(sigma)
    rule, factor = sigma
    d2 = d2.detach().flatten()
    middle = d2.sort().values
    median = (middle[(len(middle) - 1) // 2] + middle[len(middle) // 2]) / 2
    s2 = median if rule == "median" and median > 0 else d2.mean()
    return [factor * torch.where(s2 > 0, s2, torch.ones_like(s2)).sqrt()]


def unit_of(rows, norm):
    """Rows over their norms; one of norm 0 stays 0, with gradient 0."""
    return rows * (norm != 0) / torch.where(norm != 0, norm, torch.ones_like(norm))


def row_normalized(K):
    """K_ij / sqrt(K_ii), rows only, as in the public code of RCKA."""
    k = K.diagonal()
    return unit_of(K, torch.where(k != 0, k, torch.ones_like(k)).sqrt()[:, None] * (k != 0)[:, None])


def hsic_of(K, L, unbiased, center):
    """HSIC_1 (Song et al. 2012) if unbiased, else tr(K H L' H)/(n-1)^2; without H if not centred.

    HSIC_1 = sum_ij K~_ij L~_ij / (n (n - 3)) of U-centred matrices (Szekely & Rizzo 2014), whose terms do not cancel.
    """
    n = len(K)
    if unbiased:
        return (u_centred(K) * u_centred(L)).sum() / (n * (n - 3))
    if center:
        H = torch.eye(n, dtype=K.dtype, device=K.device) - 1 / n
        K, L = H @ K @ H, H @ L @ H
    return (K * L).sum() / max(n - 1, 1) ** 2


def u_centred(K):
    """K~_ij = K_ij - (K_i. + K_.j) / (n - 2) + K.. / ((n - 1) (n - 2)) of K without its diagonal, 0 on the diagonal."""
    n, off = len(K), 1 - torch.eye(len(K), dtype=K.dtype, device=K.device)
    K = K * off
    rows = K.sum(0)
    return off * (K - (rows[:, None] + rows) / (n - 2) + rows.sum() / ((n - 1) * (n - 2)))


def gram_pair(x, y, kernels, row_normalize):
    K, L = kernel_matrix(x, kernels[0]), kernel_matrix(y, kernels[1])
    return (row_normalized(K), row_normalized(L)) if row_normalize else (K, L)


def hsic_one(x, y, kernels, unbiased, center, row_normalize):
    K, L = gram_pair(x, y, kernels, row_normalize)
    return hsic_of(K, L, unbiased, center)


def cka_one(x, y, kernels, unbiased, center, row_normalize):
    K, L = (M / largest(M) for M in gram_pair(x, y, kernels, row_normalize))
    kk, ll, kl = (hsic_of(A, B, unbiased, center) for A, B in ((K, K), (L, L), (K, L)))
    # a side whose centred matrix is rounding is constant: 0 by convention; NaN stays NaN
    least = (8 * torch.finfo(K.dtype).eps / max(len(K) - 1, 1)) ** 2
    if not (kk > least * K.square().sum() and ll > least * L.square().sum()):
        undefined = kk * ll * kl
        return undefined if undefined.isnan() else zero_of(x, y, *(k.sigma for k in kernels))
    return kl / (kk.sqrt() * ll.sqrt())


def largest(K):
    """A bound of its entries that is no variable: CKA does not see the unit of K, and cubes of 1e60 overflow."""
    top = K.detach().abs().max()
    return torch.where((top > 0) & top.isfinite(), top, torch.ones_like(top))


def gram_mse_one(x, y, normalize, reduction):
    """sum_ij (K_ij - L_ij)^2, rows first divided by their L2 norm if normalize = "row" (SP); mean divides by n^2."""
    K, L = x @ x.T, y @ y.T
    if normalize == "row":
        K, L = unit_rows(K), unit_rows(L)
    total = (K - L).square().sum()
    return total / len(x) ** 2 if reduction == "mean" else total


def unit_rows(K):
    norm2 = K.square().sum(1, keepdim=True)
    return unit_of(K, torch.where(norm2 > 0, norm2, torch.ones_like(norm2)).sqrt() * (norm2 > 0))


def mmd_one(x, y, kernel, unbiased):
    """mean k(x, x') + mean k(y, y') - 2 mean k(x, y); unbiased leaves i = j out of the first two means."""
    n, m = len(x), len(y)
    K = kernel_matrix(torch.cat([x, y]), kernel)
    xx, yy, xy = K[:n, :n], K[n:, n:], K[:n, n:]
    if unbiased:
        within = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
        return within - 2 * xy.mean()
    return xx.mean() + yy.mean() - 2 * xy.mean()


def over_groups(function, x, y, kernels, mask, minimum):
    """`function` of each group's kept rows; a group whose mask leaves fewer than `minimum` gives 0."""
    if x.dim() == 2:
        return over_groups(function, x[None], y[None], kernels, None if mask is None else mask[None], minimum)[0]
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    x, y, values = x.double(), y.double(), []
    for g in range(len(x)):
        keep = slice(None) if mask is None else mask[g]
        xg, yg = x[g][keep], y[g][keep]
        enough = len(xg) >= minimum
        pair = tuple(k.of_group(g) for k in kernels)
        values.append(function(xg, yg, pair) if enough else zero_of(xg, yg, *(k.sigma for k in pair)))
    return torch.stack(values).to(dtype)


def zero_of(x, y, *sigmas):
    """0, with a gradient of 0 to all of them whatever they hold."""
    empty = [x[:0], y[:0], *(s.flatten()[:0] for s in sigmas if isinstance(s, torch.Tensor))]
    return sum(t.sum().to(x.dtype) for t in empty)
