# SPDX-License-Identifier: Apache-2.0
"""The Gram ops equal their definitions, written again here as plain NumPy sums that share no code with the package."""

import math

import numpy as np
import pytest
import torch
from conftest import BACKENDS

import kdkernels as kd


def features(n, p, q, seed=0, mean=0.4):
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((n, p)) + mean
    return x, 0.5 * generator.standard_normal((n, q)) + x[:, :1]


def tensors(*arrays):
    return [torch.tensor(a) for a in arrays]


def matrix(x, k):
    return np.array([[k(a, b) for b in x] for a in x])


def squared_distances(x):
    return matrix(x, lambda a, b: ((a - b) ** 2).sum())


# name -> (the kernel argument, k(a, b))
KERNELS = {
    "linear": ("linear", lambda a, b: a @ b),
    "polynomial": (kd.Polynomial(3, 0.5, 2.0), lambda a, b: (0.5 * (a @ b) + 2.0) ** 3),
    "cosine": ("cosine", lambda a, b: a @ b / math.sqrt((a @ a) * (b @ b))),
    "rbf": (kd.RBF(1.3), lambda a, b: math.exp(-((a - b) @ (a - b)) / (2 * 1.3**2))),
    "laplacian": (kd.Laplacian(1.3), lambda a, b: math.exp(-math.sqrt((a - b) @ (a - b)) / 1.3)),
    "sum": (kd.RBF((0.5, 2.0)), lambda a, b: sum(math.exp(-((a - b) @ (a - b)) / (2 * s**2)) for s in (0.5, 2.0))),
}


def hsic_by_loops(K, L, unbiased, center):
    n = len(K)
    if not unbiased:
        if center:
            H = np.eye(n) - np.full((n, n), 1 / n)
            return np.trace(K @ H @ L.T @ H) / (n - 1) ** 2
        return sum(K[i, j] * L[i, j] for i in range(n) for j in range(n)) / (n - 1) ** 2
    # Song et al. 2012, as the U-statistic it estimates: averages over distinct indices
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    first = sum(K[i, j] * L[i, j] for i, j in pairs) / (n * (n - 1))
    second = sum(K[i, j] * L[q, r] for i, j in pairs for q, r in pairs if not {i, j} & {q, r})
    third = sum(K[i, j] * L[i, q] for i, j in pairs for q in range(n) if q not in (i, j))
    return first + second / (n * (n - 1) * (n - 2) * (n - 3)) - 2 * third / (n * (n - 1) * (n - 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("unbiased, center", [(True, True), (False, True), (False, False)])
def test_hsic_is_its_definition(kernel, unbiased, center, backend):
    x, y = features(9, 3, 4)
    argument, k = KERNELS[kernel]
    expected = hsic_by_loops(matrix(x, k), matrix(y, k), unbiased, center)
    got = kd.hsic(*tensors(x, y), kernel=argument, unbiased=unbiased, center=center, backend=backend)
    assert got.item() == pytest.approx(expected, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("kernel", ["linear", "polynomial", "rbf"])
def test_row_normalised_cka_divides_each_row_by_the_root_of_its_diagonal(kernel, center, backend):
    x, y = features(11, 3, 4)
    argument, k = KERNELS[kernel]
    K, L = ((M / np.sqrt(np.diag(M))[:, None]) for M in (matrix(x, k), matrix(y, k)))
    h = [hsic_by_loops(A, B, False, center) for A, B in ((K, L), (K, K), (L, L))]
    got = kd.cka(*tensors(x, y), kernel=argument, unbiased=False, center=center, row_normalize=True, backend=backend)
    assert got.item() == pytest.approx(h[0] / math.sqrt(h[1] * h[2]), rel=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_mmd_is_its_definition(kernel, unbiased, backend):
    x, y = features(7, 3, 3)
    y = y[:5] + 0.7
    argument, k = KERNELS[kernel]
    means = []
    for a, b in ((x, x), (y, y), (x, y)):
        same = a is b
        terms = [k(u, v) for i, u in enumerate(a) for j, v in enumerate(b) if not (same and unbiased and i == j)]
        means.append(sum(terms) / len(terms))
    got = kd.mmd(*tensors(x, y), kernel=argument, unbiased=unbiased, backend=backend)
    assert got.item() == pytest.approx(means[0] + means[1] - 2 * means[2], rel=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gram_mse_is_the_squared_distance_of_the_gram_matrices(reduction, backend):
    x, y = features(9, 3, 4)
    expected = ((x @ x.T - y @ y.T) ** 2).sum() / (81 if reduction == "mean" else 1)
    got = kd.gram_mse(*tensors(x, y), reduction=reduction, backend=backend)
    assert got.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_normalised_gram_mse_is_the_similarity_preserving_loss(backend):
    """Tung & Mori 2019: maps flattened, G = normalize(Q Q'), and the mean square of the difference over b^2."""
    x, y = tensors(*features(9, 6, 4))
    student, teacher = (torch.nn.functional.normalize(z @ z.T, p=2, dim=1) for z in (x, y))
    expected = (student - teacher).square().sum() / 9**2
    got = kd.gram_mse(x, y, normalize="row", backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cka_of_published_data_has_the_published_values(backend):
    np.random.seed(1337)
    X = np.random.randn(100, 10)
    Y = np.random.randn(100, 10) + X
    x, y = tensors(X, Y)
    rbf = kd.RBF(("median", 0.5))
    assert kd.cka(x, y, unbiased=False, backend=backend).item() == pytest.approx(0.5576132566, abs=5e-11)
    assert kd.cka(x, y, backend=backend).item() == pytest.approx(0.5134564895, abs=5e-11)
    assert kd.cka(x, y, kernel=rbf, unbiased=False, backend=backend).item() == pytest.approx(0.6548311823, abs=5e-11)


# an even and an odd number of distances, and one pair only
@pytest.mark.parametrize("n", [2, 6, 7, 30])
@pytest.mark.parametrize("rule, factor", [("median", 1.0), ("median", 0.5), ("mean", 1.0), ("mean", 2.0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bandwidth_rule_is_the_root_of_numpys_median_or_mean_of_all_pairs(n, rule, factor, backend):
    x, y = features(n, 3, 3)
    d2 = [squared_distances(z) for z in (x, y)]
    middle = [np.median(d) or d.mean() for d in d2] if rule == "median" else [d.mean() for d in d2]
    sides = [kd.RBF(factor * math.sqrt(m)) for m in middle]
    how = {"unbiased": False, "backend": backend}
    got = kd.cka(*tensors(x, y), kernel=kd.RBF((rule, factor)), **how)
    torch.testing.assert_close(got, kd.cka(*tensors(x, y), kernel=tuple(sides), **how), rtol=1e-9, atol=1e-12)


def test_a_mean_bandwidth_has_its_closed_form():
    x, _ = features(12, 4, 1)
    closed = 2 * ((x**2).sum(1).mean() - (x.mean(0) ** 2).sum())
    assert squared_distances(x).mean() == pytest.approx(closed, rel=1e-12)


@pytest.mark.parametrize("rule", ["median", "mean"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bandwidth_rule_sees_each_group_by_itself_and_no_masked_row(rule, backend):
    arrays = [features(n, 3, 2, seed=n) for n in (9, 6, 7)]
    x, y = torch.full((3, 9, 3), 1e3, dtype=torch.float64), torch.full((3, 9, 2), -1e3, dtype=torch.float64)
    mask = torch.zeros(3, 9, dtype=torch.bool)
    for g, pair in enumerate(arrays):
        for whole, part in zip((x, y), tensors(*pair), strict=True):
            whole[g, : len(part)] = part * (1 + g)
        mask[g, : len(pair[0])] = True
    how = {"kernel": kd.RBF(rule), "backend": backend}
    got = kd.hsic(x, y, mask=mask, **how)
    alone = [kd.hsic(*(t * (1 + g) for t in tensors(*pair)), **how) for g, pair in enumerate(arrays)]
    torch.testing.assert_close(got, torch.stack(alone), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_median_of_zero_falls_back_to_the_mean(backend):
    x, y = tensors(*features(8, 3, 3))
    x[:6] = x[0]  # more than half of all pairs at distance 0
    sigma = math.sqrt(squared_distances(x.numpy()).mean())
    got = kd.hsic(x, y, kernel=("rbf", "linear"), backend=backend)
    torch.testing.assert_close(got, kd.hsic(x, y, kernel=(kd.RBF(sigma), "linear"), backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_mmd_joins_both_samples_before_it_takes_the_median(backend):
    x, y = features(8, 3, 3)
    y = y[:5] + 2
    sigma = math.sqrt(np.median(squared_distances(np.concatenate([x, y]))))
    got = kd.mmd(*tensors(x, y), backend=backend)
    torch.testing.assert_close(got, kd.mmd(*tensors(x, y), kernel=kd.RBF(sigma), backend=backend))


def test_above_1024_rows_the_median_is_that_of_a_strided_subset():
    x = torch.randn(1500, 3, dtype=torch.float64)
    subset = x[torch.arange(1024) * 1500 // 1024]
    sigma = math.sqrt(np.median(((subset[:, None] - subset[None]) ** 2).sum(-1).numpy()))
    y = x[:, :2] + torch.randn(1500, 2, dtype=torch.float64)
    got = kd.hsic(x, y, kernel=("rbf", "linear"), backend="torch")
    torch.testing.assert_close(got, kd.hsic(x, y, kernel=(kd.RBF(sigma), "linear"), backend="torch"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_equals_leaving_the_rows_out(backend):
    x, y = tensors(*features(12, 3, 4))
    mask = torch.rand(12) > 0.3
    for f, kernel in ((kd.cka, "linear"), (kd.cka, "rbf"), (kd.hsic, "polynomial")):
        got = f(x, y, kernel=kernel, mask=mask, backend=backend)
        torch.testing.assert_close(got, f(x[mask], y[mask], kernel=kernel, backend=backend), rtol=1e-9, atol=1e-12)


def test_the_reference_under_autocast_keeps_its_precision():
    x, y = (t.float() for t in tensors(*features(12, 3, 4)))
    with torch.autocast("cpu", torch.bfloat16):
        got = kd.cka(x, y, backend="reference"), kd.mmd(x, x + 1, backend="reference")
    torch.testing.assert_close(got[0], kd.cka(x, y, backend="reference"), rtol=0, atol=0)
    torch.testing.assert_close(got[1], kd.mmd(x, x + 1, backend="reference"), rtol=0, atol=0)
