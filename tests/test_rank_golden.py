# SPDX-License-Identifier: Apache-2.0
"""Numbers that others published or compute: the paper's examples, scipy's ranks and correlations, brute force."""

import itertools
from fractions import Fraction

import numpy
import pytest
import torch
from ranking import adversarial, backends

import kdkernels as kd

scipy_stats = pytest.importorskip("scipy.stats")

every = pytest.mark.parametrize("backend", backends())


@every
@pytest.mark.parametrize(
    "x, strength, want",
    [
        ([8, 0, 5, 3, 2, 1, 6, 7, 9], 1.0, [8, 1, 5, 4, 3, 2, 6, 7, 9]),
        ([5, 1, 2], 2.0, [3, 1.25, 1.75]),
        ([5, 1, 2], 1.0, [3, 1, 2]),
        ([5, 1, 2], 100.0, [2 + 7 / 300, 2 - 5 / 300, 2 - 2 / 300]),
    ],
)
def test_soft_ranks_of_the_literature(x, strength, want, backend):
    got = kd.soft_rank(torch.tensor(x, dtype=torch.float64), "l2", strength, backend=backend)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))


@every
def test_a_kl_rank_worked_out_by_hand(backend):
    """Gaps of 0.1 < log(3/2), log(2/1): one block, R = 6."""
    x = torch.tensor([0.0, 0.1, 0.2], dtype=torch.float64)
    torch.testing.assert_close(kd.soft_rank(x, "kl", 1.0, backend=backend), 6 * torch.softmax(x, 0))
    # gaps of 1 are more than both logarithms: hard
    assert kd.soft_rank(10 * x, "kl", 1.0, backend=backend).tolist() == [1, 2, 3]


@every
def test_softly_sorted_values_worked_out_by_hand(backend):
    x = torch.tensor([5.0, 1.0, 2.0], dtype=torch.float64)
    # gaps of 1 and 3: strength 0.5 pools none but the wide one, which 1 / 0.5 cannot hold apart
    got = kd.soft_sort(x, "l2", 0.25, backend=backend)
    assert got.tolist() == [1, 2, 5]
    got = kd.soft_sort(x, "l2", 0.5, backend=backend)
    torch.testing.assert_close(got, torch.tensor([1, 2.5, 4.5], dtype=torch.float64))


def projection_by_search(theta, strength):
    """The point of the permutahedron nearest to theta / eps, by trying every partition of the sorted row, exactly."""
    n = len(theta)
    z = sorted((Fraction(t) / Fraction(strength) for t in theta), reverse=True)
    best = None
    for cuts in itertools.product((False, True), repeat=n - 1):
        borders = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), n]
        point = []
        for a, b in itertools.pairwise(borders):
            shift = Fraction(sum(range(n - b + 1, n - a + 1)), b - a) - sum(z[a:b]) / (b - a)
            point += [value + shift for value in z[a:b]]
        inside = all(sum(sorted(point, reverse=True)[:k]) <= sum(range(n - k + 1, n + 1)) for k in range(1, n + 1))
        distance = sum((p - q) ** 2 for p, q in zip(point, z, strict=True))
        if inside and (best is None or distance < best[0]):
            best = distance, dict(zip(z, point, strict=True))
    return [float(best[1][Fraction(t) / Fraction(strength)]) for t in theta]


@every
@pytest.mark.parametrize("strength", [0.25, 1.0, 4.0])
def test_an_l2_rank_is_the_nearest_point_of_the_permutahedron(strength, backend):
    for seed in range(4):
        theta = torch.randint(-8, 8, (6,), generator=torch.Generator().manual_seed(seed)).double() / 4
        want = torch.tensor(projection_by_search(theta.tolist(), strength), dtype=torch.float64)
        torch.testing.assert_close(kd.soft_rank(theta, "l2", strength, backend=backend), want)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_hard_ranks_average_ties_as_scipys(dtype, backend):
    for name, x in adversarial(60).items():
        x = x.to(dtype)
        want = torch.from_numpy(scipy_stats.rankdata(x.double().numpy()))
        got = kd.soft_rank(x, "l2", 0.0, backend=backend)
        assert torch.equal(got.double(), want), name


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_hard_correlations_equal_scipys(dtype, backend):
    kinds = adversarial(60)
    for (name, x), y in zip(kinds.items(), reversed(kinds.values()), strict=True):
        x, y = x.to(dtype), (y + x).to(dtype)
        if (x == x[0]).all() or (y == y[0]).all():
            continue
        want = scipy_stats.spearmanr(x.double().numpy(), y.double().numpy()).statistic
        assert float(kd.spearman_corr(x, y, backend=backend)) == pytest.approx(want, abs=1e-6), name
        soft = kd.spearman(x, y, regularization_strength=1e-30, backend=backend)
        assert float(soft) == pytest.approx(want, abs=1e-6), name
        want = scipy_stats.pearsonr(x.double().numpy(), y.double().numpy()).statistic
        assert float(kd.pearson(x, y)) == pytest.approx(want, abs=1e-6), name


def test_pearson_keeps_its_digits_under_an_offset():
    x, y = torch.randn(2, 500, dtype=torch.float64)
    y = y + x
    for offset in (1e3, 1e5):
        a, b = (x + offset).float(), (y - offset).float()
        want = numpy.corrcoef(a.double().numpy(), b.double().numpy())[0, 1]
        assert float(kd.pearson(a, b)) == pytest.approx(want, abs=2e-7)


@every
@pytest.mark.parametrize("strength", [0.3, 1e3])
def test_the_isotonic_step_equals_scikit_learns(strength, backend):
    isotonic = pytest.importorskip("sklearn.isotonic")
    for name, x in adversarial(200).items():
        s, order = x.sort(descending=True)
        w = numpy.arange(200, 0, -1)
        v = isotonic.isotonic_regression(s.numpy() / strength - w, increasing=False)
        want = torch.empty_like(x).scatter_(0, order, s / strength - torch.from_numpy(v.copy()))
        got = kd.soft_rank(x, "l2", strength, backend=backend)
        # the difference of s / eps and its regression loses the digits of s / eps
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11 * float(x.abs().max() / strength + 200), msg=name)
