# SPDX-License-Identifier: Apache-2.0
"""The textbook of the Nystrom family: one line per equation of MATH.md, plain autograd, n x n where it is written so.

Letters: C = k(X, Z), W = k(Z, Z), Phi = C W^(-1/2), K~ = Phi Phi'. Statistics are float64; features have the dtype of
the rows, at least float32, and W is formed and factored in float64, as the definition of the op says.
"""

import torch


def kernel(x, z, name, params):
    """k(x_i, z_j); params: (degree, scale, coef0) of a polynomial, the bandwidths of rbf and laplacian."""
    if name == "linear":
        return x @ z.T
    if name == "polynomial":
        degree, scale, coef0 = params
        return (scale * (x @ z.T) + coef0) ** degree
    if name == "cosine":
        return unit_rows(x) @ unit_rows(z).T
    d2 = squared_distances(x, z)
    if name == "rbf":
        return sum(torch.exp(-d2 / (2 * s**2)) for s in params)
    d = torch.where(d2 == 0, torch.ones_like(d2), d2).sqrt() * (d2 != 0)
    return sum(torch.exp(-d / s) for s in params)


def unit_rows(x):
    """A zero row stays zero, with gradient 0."""
    norm = x.norm(dim=1, keepdim=True)
    return x * (norm > 0) / torch.where(norm > 0, norm, torch.ones_like(norm))


def squared_distances(x, z):
    """|x_i|^2 + |z_j|^2 - 2 x_i . z_j of rows centred at the landmarks' mean; what is rounding of 0 becomes 0."""
    mean = z.mean(0)
    x, z = x - mean, z - mean
    s = x.square().sum(1)[:, None] + z.square().sum(1)
    d2 = s - 2 * x @ z.T
    return d2 * (d2 > 16 * torch.finfo(x.dtype).eps * s)


def features(x, z, name, params, whiten, jitter):
    """Phi [n, m]: Phi Phi' = C W^+ C'. NaN if a landmark holds it."""
    wide = [p.double() if isinstance(p, torch.Tensor) else p for p in params]
    W = kernel(z.double(), z.double(), name, wide)
    C = kernel(x, z, name, params)
    if not W.isfinite().all():
        return C * torch.nan
    if whiten == "cholesky":
        R = torch.linalg.cholesky(jittered(W, jitter))
        return torch.linalg.solve_triangular(R.T.to(C.dtype), C, upper=True, left=False)
    return C @ inverse_root(W, jitter).to(C.dtype)


def jittered(W, jitter):
    mean = W.diagonal().mean()
    return W + jitter * torch.where(mean == 0, torch.ones_like(mean), mean) * torch.eye(
        len(W), dtype=W.dtype, device=W.device
    )


def inverse_root(W, jitter):
    """W^(-1/2), symmetric; eigenvalues up to jitter times the mean diagonal (or rounding) count as 0."""
    lam, U = torch.linalg.eigh(W)
    keep = lam > torch.maximum(jitter * W.diagonal().mean(), len(W) * torch.finfo(lam.dtype).eps * lam[-1]).detach()
    root = torch.where(keep, torch.where(keep, lam, torch.ones_like(lam)).rsqrt(), torch.zeros_like(lam))
    return U * root @ U.T


def whitener(W, whiten, jitter):
    """A with Phi = C A."""
    if whiten == "sqrt":
        return inverse_root(W, jitter)
    R = torch.linalg.cholesky(jittered(W, jitter))
    return torch.linalg.inv(R).T


def hsic_of(K, L, unbiased):
    """HSIC_1 (Song et al. 2012), a sum over U-centred matrices, if unbiased, else tr(K H L H)/(n-1)^2."""
    n = len(K)
    if unbiased:
        off = 1 - torch.eye(n, dtype=K.dtype, device=K.device)
        K, L = (u_centred(A * off) * off for A in (K, L))
        return (K * L).sum() / (n * (n - 3))
    H = torch.eye(n, dtype=K.dtype, device=K.device) - 1 / n
    return (H @ K @ H * L).sum() / (n - 1) ** 2


def u_centred(K):
    """K_ij - (K_i. + K_.j) / (n - 2) + K.. / ((n - 1) (n - 2)) (Szekely & Rizzo 2014)."""
    n, rows = len(K), K.sum(0)
    return K - (rows[:, None] + rows) / (n - 2) + rows.sum() / ((n - 1) * (n - 2))


def hsic(phi, psi, unbiased):
    return hsic_of(phi @ phi.T, psi @ psi.T, unbiased)


def cka(phi, psi, unbiased):
    K, L = phi @ phi.T, psi @ psi.T
    kk, ll, kl = (hsic_of(A, B, unbiased) for A, B in ((K, K), (L, L), (K, L)))
    # a side whose centred matrix is rounding is constant: 0 by convention; NaN stays NaN
    least = (32 * torch.finfo(K.dtype).eps / max(len(K) - 1, 1)) ** 2
    if not (kk > least * K.square().sum() and ll > least * L.square().sum()):
        undefined = kk * ll * kl
        return undefined if undefined.isnan() else nothing(phi, psi)
    return kl / (kk.sqrt() * ll.sqrt())


def transfer(phi, psi, normalize):
    """|K~_S - K~_T|_F^2, over |K~_T|_F^2 if normalize: 0 where that is 0."""
    K, L = phi @ phi.T, psi @ psi.T
    total = (K - L).square().sum()
    if not normalize:
        return total
    norm2 = L.square().sum()
    return total / norm2 if norm2 != 0 else nothing(phi, psi)


def nothing(*tensors):
    """0, with a gradient of 0 to all of them whatever they hold."""
    return sum(t[:0].sum() for t in tensors)


def transfer_quality(s, t, matrix):
    """|K_S - K_T|_F / |K_T|_F, 0 where the norm is 0; matrix(x) = k(x, x)."""
    K, L = matrix(s), matrix(t)
    return (K - L).norm() / L.norm() if L.norm() != 0 and (K - L).norm() != 0 else nothing(s, t)


def select(x, m, method, columns, diagonal, draws, keep):
    """Indices [m] by inverse cumulative weights; columns(i) = k(X, x_i) (for k-means++: squared distances)."""
    n = len(x)
    chosen, weight = [], torch.where(keep, diagonal.double(), 0.0)
    factor = torch.zeros(n, 0, dtype=diagonal.dtype, device=x.device)
    floor = n * torch.finfo(diagonal.dtype).eps * diagonal.max()
    nearest = torch.full_like(diagonal, torch.inf)
    for u in draws:
        free = keep.clone()
        free[chosen] = False
        free = free if free.any() else keep
        weight = torch.where(free & (weight > floor), weight, 0.0)
        weight = weight if weight.sum() > 0 else free.double()
        if method == "greedy":
            i = int(weight.argmax())
        else:
            cumulative = weight.cumsum(0)
            i = min(int(torch.searchsorted(cumulative, u * cumulative[-1], right=True)), n - 1)
        chosen.append(i)
        column = columns(i)
        if method == "kmeans++":
            nearest = torch.minimum(nearest, column)
            weight = torch.where(keep, nearest.double(), 0.0)
            floor = n * torch.finfo(diagonal.dtype).eps * nearest[keep].max() * 0
        else:
            column = column - factor @ factor[i]
            column = column / column[i].clamp(min=torch.finfo(column.dtype).tiny).sqrt()
            factor = torch.cat([factor, column[:, None]], 1)
            weight = (diagonal - factor.square().sum(1)).clamp(min=0).double()
    return torch.tensor(chosen, device=x.device)
