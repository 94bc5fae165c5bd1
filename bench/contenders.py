# SPDX-License-Identifier: Apache-2.0
"""What the ops are measured against: the obvious PyTorch, and the best algebra that plain PyTorch can express.

eager     n x n matrices and autograd, as one writes it from the formula
algebra   feature space where it is cheaper, centred rows, scalars from row sums; still plain PyTorch and autograd
compiled  torch.compile of `algebra`

None of them takes the precautions of `kdkernels` against rounding (float64 sums, row means of K, scaling): they are
given that advantage in time. `python -m bench accuracy` shows its price.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

import kdkernels as kd


def eager(case, sigma):
    """f(x, y) -> value: the obvious PyTorch for the case."""
    return _groups(case, _EAGER[case.op](case, sigma))


def algebra(case, sigma):
    """f(x, y) -> value: the best plain PyTorch."""
    return _groups(case, _ALGEBRA.get(case.op, _EAGER[case.op])(case, sigma))


def compiled(case, sigma):
    return torch.compile(algebra(case, sigma), dynamic=False, fullgraph=True)


def ours(case, sigma, backend):
    """f(x, y) -> value through the public function."""
    function, options = getattr(kd, case.op), dict(case.options)
    if case.op != "gram_mse":
        options["kernel"] = _kernel_object(case.kernel, sigma)
    if case.transpose:
        return lambda x, y: function(x.mT, y.mT, backend=backend, **options)
    return lambda x, y: function(x, y, backend=backend, **options)


def _kernel_object(name, sigma):
    if name not in ("rbf", "laplacian"):
        return name
    make = kd.RBF if name == "rbf" else kd.Laplacian
    if sigma is None:
        return make("median")
    if isinstance(sigma, tuple):  # a bandwidth a side
        return make(sigma[0]), make(sigma[1])
    return make(sigma)


def _groups(case, one):
    """The obvious PyTorch has no group dimension: a loop."""
    if case.transpose:
        return lambda x, y: one(x.mT, y.mT)
    if not case.groups:
        return one
    return lambda x, y: torch.stack([one(a, b) for a, b in zip(x, y, strict=True)])


# ---- eager


def gram(x, kernel, sigma):
    """The kernel matrix from the formula; the diagonal of d2 is what rounding makes of zero."""
    if kernel == "cosine":
        x = F.normalize(x, dim=1)
    K = x @ x.T
    if kernel in ("linear", "cosine"):
        return K
    if kernel == "polynomial":
        return (K + 1) ** 2
    s = x.square().sum(1)
    d2 = s[:, None] + s - 2 * K
    if kernel == "rbf":
        return torch.exp(-d2 / (2 * (d2.detach().median() if sigma is None else sigma**2)))
    return torch.exp(-(d2.clamp(min=1e-12) ** 0.5) / sigma)


def hsic_unbiased(K, L):
    """HSIC_1 from the formula."""
    n = len(K)
    K, L = K - K.diagonal().diag(), L - L.diagonal().diag()
    cross = (K * L).sum() + K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (K.sum(0) @ L.sum(0))
    return cross / (n * (n - 3))


def hsic_biased(K, L, center=True):
    if center:
        K, L = (M - M.mean(0) - M.mean(1, keepdim=True) + M.mean() for M in (K, L))
    return (K * L).sum() / (len(K) - 1) ** 2


def _hsic(case):
    if case.options.get("unbiased", True):
        return hsic_unbiased
    center = case.options.get("center", True)
    return lambda K, L: hsic_biased(K, L, center)


def _pair(case, sigma, x, y):
    sx, sy = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    K, L = gram(x, case.kernel, sx), gram(y, case.kernel, sy)
    if case.options.get("row_normalize"):
        K, L = (M / M.diagonal().sqrt()[:, None] for M in (K, L))
    return K, L


def _cka(case, sigma):
    h = _hsic(case)

    def cka(x, y):
        K, L = _pair(case, sigma, x, y)
        return h(K, L) / (h(K, K) * h(L, L)).sqrt()

    return cka


def _eager_hsic(case, sigma):
    h = _hsic(case)
    return lambda x, y: h(*_pair(case, sigma, x, y))


def _mmd(case, sigma):
    def mmd(x, y):
        n, m = len(x), len(y)
        K = gram(torch.cat([x, y]), case.kernel, sigma)
        xx, yy = K[:n, :n], K[n:, n:]
        within = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
        return within - 2 * K[:n, n:].mean()

    return mmd


def _gram_mse(case, sigma):
    if case.options.get("normalize") == "row":
        return lambda x, y: (F.normalize(x @ x.T, dim=1) - F.normalize(y @ y.T, dim=1)).square().mean()
    return lambda x, y: (x @ x.T - y @ y.T).square().mean()


_EAGER = {"cka": _cka, "hsic": _eager_hsic, "mmd": _mmd, "gram_mse": _gram_mse}

# ---- algebra


def _algebra_cka(case, sigma):
    options = case.options
    if options.get("row_normalize") or not options.get("center", True):
        return _cka(case, sigma)
    finish = _scalars(options.get("unbiased", True))
    if case.kernel in ("linear", "cosine"):
        return lambda x, y: _linear(x, y, case.kernel, finish, options.get("unbiased", True))

    def cka(x, y):
        K, L = _pair(case, sigma, x, y)
        if options.get("unbiased", True):
            off = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
            K, L = K * off, L * off
        return finish(K.sum(0), L.sum(0), (K * L).sum(), (K * K).sum(), (L * L).sum())

    return cka


def _scalars(unbiased):
    """CKA from a = K1, b = L1 and the three sums: nothing centred is ever formed."""

    def finish(a, b, kl, kk, ll):
        n = len(a)
        A, B = a.sum(), b.sum()
        r, s = (2 / (n - 2), 1 / ((n - 1) * (n - 2))) if unbiased else (2 / n, 1 / n**2)
        h = kl - r * (a @ b) + s * A * B
        return h / (kk - r * (a @ a) + s * A * A).sqrt() / (ll - r * (b @ b) + s * B * B).sqrt()

    return finish


def _linear(x, y, kernel, finish, unbiased):
    if kernel == "cosine":
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    x, y = x - x.mean(0), y - y.mean(0)
    k, l = x.square().sum(1), y.square().sum(1)
    if len(x) > x.shape[1] + y.shape[1]:
        kl, kk, ll = (x.T @ y).square().sum(), (x.T @ x).square().sum(), (y.T @ y).square().sum()
    else:
        K, L = x @ x.T, y @ y.T
        kl, kk, ll = (K * L).sum(), K.square().sum(), L.square().sum()
    if unbiased:  # rows are centred: the row sums without the diagonal are -k and -l
        return finish(-k, -l, kl - k @ l, kk - k @ k, ll - l @ l)
    return finish(0 * k, 0 * l, kl, kk, ll)


def _algebra_gram_mse(case, sigma):
    naive = _gram_mse(case, sigma)
    if case.options.get("normalize") == "row":
        return naive

    def gram_mse(x, y):
        n, p = x.shape
        if n <= p + y.shape[1]:
            return naive(x, y)
        return ((x.T @ x).square().sum() + (y.T @ y).square().sum() - 2 * (x.T @ y).square().sum()) / n**2

    return gram_mse


_ALGEBRA = {"cka": _algebra_cka, "gram_mse": _algebra_gram_mse}
