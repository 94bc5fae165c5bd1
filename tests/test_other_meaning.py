# SPDX-License-Identifier: Apache-2.0
"""The table "Same name, other meaning": each row's two columns as formulas that say how they are related."""

import math
import re

import pytest
import torch
from conftest import ROOT

import kdkernels as kd

TABLE = (ROOT / "docs" / "howto" / "porting.md").read_text().split("## Same name, other meaning")[1].split("\n## ")[0]
NAMES = [found[1] for found in re.finditer(r"^\| `(\w+)` \|", TABLE, re.MULTILINE)]


def hsic(K, L, unbiased):
    n = len(K)
    if not unbiased:
        H = torch.eye(n, dtype=K.dtype) - 1 / n
        return (H @ K @ H * L).sum()
    K, L = K - K.diagonal().diag(), L - L.diagonal().diag()
    return (K * L).sum() + K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (K.sum(0) * L.sum(0)).sum()


def check_cka():
    x, y = torch.randn(2, 6, 5, dtype=torch.float64)
    K, L = x @ x.T, y @ y.T
    one, two = (hsic(K, L, u) / (hsic(K, K, u) * hsic(L, L, u)).sqrt() for u in (True, False))
    torch.testing.assert_close(torch.stack([kd.cka(x, y), kd.cka(x, y, unbiased=False)]), torch.stack([one, two]))
    draws = torch.stack([kd.cka(*torch.randn(2, 6, 5)) for _ in range(50)])
    assert draws.min() < 0


def discrepancy(kernel, x, y, unbiased):
    """mean k(x, x') + mean k(y, y') - 2 mean k(x, y)"""
    K, L = kernel(x, x), kernel(y, y)
    if unbiased:
        within = sum((G.sum() - G.trace()) / (len(G) * (len(G) - 1)) for G in (K, L))
    else:
        within = K.mean() + L.mean()
    return within - 2 * kernel(x, y).mean()


def compared(kernel, formula):
    """kd.mmd of a kernel object is that of the formula, in both estimators."""
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64) + 1
    for unbiased in (True, False):
        expected = discrepancy(formula, x, y, unbiased)
        torch.testing.assert_close(kd.mmd(x, y, kernel=kernel, unbiased=unbiased), expected)
    return x, y


def check_mmd():
    gaussian = lambda a, b: torch.exp(-(torch.cdist(a, b) ** 2) / (2 * 0.7**2))  # noqa: E731
    x, y = compared(kd.RBF(0.7), gaussian)
    # geomloss: half the square of the norm of the difference of the means
    ones = torch.cat([torch.full((7,), 1 / 7), torch.full((5,), -1 / 5)]).double()
    half = ones @ gaussian(torch.cat([x, y]), torch.cat([x, y])) @ ones / 2
    torch.testing.assert_close(kd.mmd(x, y, kernel=kd.RBF(0.7), unbiased=False), 2 * half)
    torch.testing.assert_close(kd.mmd(x, y, kernel=kd.RBF(0.7)), discrepancy(gaussian, x, y, True))


def check_RBF():
    gamma = 1 / 4  # of p = 4 features
    compared(kd.RBF(math.sqrt(1 / (2 * gamma))), lambda a, b: torch.exp(-gamma * torch.cdist(a, b) ** 2))
    x = torch.randn(9, 4, dtype=torch.float64)
    K = torch.exp(-(torch.cdist(x, x) ** 2) / (2 * (torch.cdist(x, x) ** 2).median()))
    L = x @ x.T
    expected = hsic(K, L, True) / (hsic(K, K, True) * hsic(L, L, True)).sqrt()
    torch.testing.assert_close(kd.cka(x, x, kernel=(kd.RBF(), kd.Linear())), expected)


def check_Laplacian():
    compared(kd.Laplacian(4.0), lambda a, b: torch.exp(-torch.cdist(a, b) / 4))


def check_Polynomial():
    compared(kd.Polynomial(), lambda a, b: (a @ b.T + 1) ** 2)
    compared(kd.Polynomial(degree=3, scale=1 / 4), lambda a, b: (a @ b.T / 4 + 1) ** 3)  # scikit-learn's


def check_StreamingPCA():
    x = torch.randn(50, 6, dtype=torch.float64) * torch.tensor([9, 7, 5, 3, 2, 1])
    pca = kd.StreamingPCA(6)
    pca.update(x)
    principal = torch.linalg.svd(x - x.mean(0)).Vh[:2]  # [k, c]
    found = pca.components(2)
    assert found.shape == (6, 2) and found.dtype == torch.float32
    torch.testing.assert_close(found.T.abs().double(), principal.abs(), rtol=1e-5, atol=1e-6)


def check_spearman_corr():
    x, y = torch.tensor([1.0, -math.inf, 3, 4, 2]), torch.tensor([2.0, 1, 5, 4, 3])
    finite = x.isfinite()
    torch.testing.assert_close(kd.spearman_corr(x, y), torch.tensor(0.8))
    torch.testing.assert_close(kd.spearman_corr(x[finite], y[finite]), torch.tensor(0.8))
    low = x.where(finite, -9)  # what ranking the infinity gives, 1 - 6 sum d^2 / (n (n^2 - 1))
    torch.testing.assert_close(kd.spearman_corr(low, y), torch.tensor(1 - 6 * 2 / (5 * 24)))
    assert kd.spearman_corr(-x, y).isnan() and kd.spearman_corr(torch.ones(5), y) == 0


def check_soft_sort():
    x = torch.randn(1, 5, dtype=torch.float64)
    for regularization in ("l2", "kl"):
        up = kd.soft_sort(x, regularization)
        torch.testing.assert_close(up, -kd.soft_sort(-x, regularization, descending=True))
        flipped = kd.soft_sort(x, regularization, descending=True).flip(-1)
        assert torch.allclose(up, flipped) == (regularization == "l2")


def check_KDLoss():
    s, t = torch.randn(2, 6, 9, dtype=torch.float64)

    def kl(a, b, tau=1):
        log_a, log_b = (side / tau - (side / tau).logsumexp(-1, keepdim=True) for side in (a, b))
        return (log_a.exp() * (log_a - log_b)).sum(-1).mean()

    def interpolated(beta):
        """TRL's and Liger's, of a teacher with weight beta in the mixture."""
        mixture = (beta * t.softmax(-1) + (1 - beta) * s.softmax(-1)).log()
        return beta * kl(t, mixture) + (1 - beta) * kl(s, mixture)

    loss = kd.losses.KDLoss
    torch.testing.assert_close(loss()(s, t), 16 * kl(t, s, 4))
    torch.testing.assert_close(loss(1.0)(s, t), kl(t, s))
    torch.testing.assert_close(loss(1.0, divergence="reverse")(s, t), kl(s, t))
    torch.testing.assert_close(loss(1.0, divergence="jsd")(s, t), interpolated(0.5))
    torch.testing.assert_close(interpolated(1e-6) / 1e-6, kl(t, s), rtol=1e-4, atol=0)


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


def test_every_row_has_a_check_and_every_check_a_row():
    assert sorted(NAMES) == sorted(CHECKS)
    assert all(hasattr(kd, name) or hasattr(kd.losses, name) for name in NAMES)


@pytest.mark.parametrize("name", CHECKS)
def test_what_the_table_says_of_us_is_so(name):
    CHECKS[name]()
