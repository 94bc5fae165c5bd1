# SPDX-License-Identifier: Apache-2.0
"""CKA of all layer pairs: the textbook's value for each pair, in either form, at any tile; nothing n x n; errors."""

import pytest
import torch
from conftest import BACKENDS

import kdkernels as kd
from kdkernels.analysis import sums

KERNELS = ["linear", "cosine", "rbf", "laplacian", "polynomial"]


def network(n, widths, seed, mean=3.0, dtype=torch.float64):
    """ReLU-like features with a mean, each layer its own scale, that share a signal."""
    generator = torch.Generator().manual_seed(seed)
    signal = torch.randn(n, 8, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    layers = []
    for place, p in enumerate(widths):
        mix = torch.randn(8, p, generator=generator, dtype=torch.float64)
        noise = torch.randn(n, p, generator=generator, dtype=torch.float64)
        layers.append(((signal @ mix + 2 * noise).relu() * 10.0**place + mean).to(dtype))
    return layers


def textbook(xs, ys, **how):
    pair = lambda x, y: kd.cka(x.double(), y.double(), backend="reference", **how)  # noqa: E731
    return torch.stack([torch.stack([pair(x, y) for y in ys]) for x in xs])


# 5: hardly enough rows; 61: prime
@pytest.mark.parametrize("n", [5, 61])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_each_entry_is_the_cka_of_its_pair(kernel, unbiased, n):
    xs, ys = network(n, (3, 40, 9), 0), network(n, (17, 5), 1)
    found = kd.cka_matrix(xs, ys, kernel=kernel, unbiased=unbiased)
    assert found.dtype == torch.float64 and found.shape == (3, 2)
    torch.testing.assert_close(found, textbook(xs, ys, kernel=kernel, unbiased=unbiased), rtol=0, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS[1:])  # the textbook has no defence against cancellation
@pytest.mark.parametrize("kernel", KERNELS)
def test_float32_features_with_a_large_mean_keep_their_digits(kernel, backend):
    xs, ys = network(90, (30, 70), 0, 30.0, torch.float32), network(90, (20,), 1, 3.0, torch.float32)
    found = kd.cka_matrix(xs, ys, kernel=kernel, backend=backend)
    torch.testing.assert_close(found.double(), textbook(xs, ys, kernel=kernel), rtol=0, atol=1e-6)


# edges: the last tile is full, is one row, is nearly full
@pytest.mark.parametrize("n", [192, 129, 191])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_tiles_give_what_the_whole_matrix_gives(kernel, unbiased, n, monkeypatch):
    xs, ys = network(n, (30, 3), 0, dtype=torch.float32), network(n, (70,), 1, dtype=torch.float32)
    expected = textbook(xs, ys, kernel=kernel, unbiased=unbiased)
    monkeypatch.setattr(sums, "in_feature_space", lambda *_: False)
    monkeypatch.setattr(sums, "LEAST_TILE", 64)
    monkeypatch.setattr(sums, "BYTES", 3 * 4 * 64**2)
    assert sums.edge(n, 3, 4) == 64
    found = kd.cka_matrix(xs, ys, kernel=kernel, unbiased=unbiased, backend="torch")
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("kernel", ["linear", "cosine"])
def test_feature_space_gives_what_tiles_give(kernel, unbiased, monkeypatch):
    xs, ys = network(300, (5, 30), 0, 30.0, torch.float32), network(300, (7, 2, 12), 1, dtype=torch.float32)
    problem = sums.problem_of((kd.Linear(), kd.Linear()), unbiased)
    assert sums.in_feature_space(problem, 300, (5, 30), (7, 2, 12))
    found = kd.cka_matrix(xs, ys, kernel=kernel, unbiased=unbiased)
    torch.testing.assert_close(found.double(), textbook(xs, ys, kernel=kernel, unbiased=unbiased), rtol=0, atol=1e-6)


def test_feature_space_is_for_layers_narrower_than_the_batch_and_linear_kernels():
    linear = sums.problem_of((kd.Linear(), kd.Linear()), True)
    rbf = sums.problem_of((kd.RBF(1.0), kd.RBF(1.0)), True)
    assert not sums.in_feature_space(linear, 128, [4096] * 20, [4096] * 20)
    assert sums.in_feature_space(linear, 10_000, [64] * 20, [64] * 20)
    assert not sums.in_feature_space(rbf, 10_000, [64] * 20, [64] * 20)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_the_layers_of_one_network_give_a_symmetric_matrix_with_ones_on_the_diagonal(kernel):
    xs = network(50, (60, 70, 80), 0, dtype=torch.float32)
    found = kd.cka_matrix(xs, xs, kernel=kernel)
    torch.testing.assert_close(found, found.T, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.diagonal(), torch.ones(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(found, kd.cka_matrix(xs, [x.clone() for x in xs], kernel=kernel), rtol=0, atol=1e-6)


def test_each_side_may_have_its_own_kernel_and_each_layer_its_own_dtype():
    xs, ys = network(40, (6, 20), 0), network(40, (9,), 1)
    pair = (kd.RBF("mean"), kd.Cosine())
    torch.testing.assert_close(kd.cka_matrix(xs, ys, kernel=pair), textbook(xs, ys, kernel=pair), rtol=0, atol=1e-9)
    mixed = [xs[0].bfloat16(), xs[1].float()]
    found = kd.cka_matrix(mixed, [ys[0].half()])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), textbook(mixed, [ys[0].half()]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_constant_layer_has_no_similarity_and_a_nan_stays_in_its_layer(kernel):
    xs = network(40, (6, 20, 8), 0, dtype=torch.float32)
    clean = kd.cka_matrix(xs, xs, kernel=kernel)
    xs[1] = torch.full((40, 20), 7.3)
    xs[2] = xs[2].clone()
    xs[2][3, 1] = torch.nan
    found = kd.cka_matrix(xs, [xs[0], xs[1]], kernel=kernel)
    assert found[1].eq(0).all() and found[0, 1] == 0
    assert found[2, 0].isnan()
    torch.testing.assert_close(found[0, 0], clean[0, 0])


def test_a_layer_that_is_constant_up_to_rounding_has_terms_of_zero():
    u, everything = torch.rand(9, dtype=torch.float64), slice(0, 9)
    K, L = (u[:, None] + u)[None], torch.randn(1, 9, 9, dtype=torch.float64)  # K is the sum that centring takes away
    found = sums.Sums(1, 1, 9, K)
    found.add(K, L + L.mT, everything, everything)
    one = torch.ones(1, dtype=torch.float64)
    problem = sums.problem_of((kd.Linear(), kd.Linear()), False)
    h = found.finish(problem, 9, (one, one), torch.finfo(torch.float32).eps, same=False)
    assert h.kk == 0 and h.kl == 0 and h.ll > 0


def test_the_features_may_be_strided_and_get_no_gradient():
    wide = torch.randn(30, 12, requires_grad=True)
    found = kd.cka_matrix([wide[:, ::2], wide.T[:6].T], [wide])
    assert not found.requires_grad
    torch.testing.assert_close(found.double(), textbook([wide[:, ::2], wide[:, :6]], [wide]), rtol=0, atol=1e-6)


def test_autocast_does_not_round_the_products():
    xs = network(40, (20, 30), 0, 30.0, torch.float32)
    expected = kd.cka_matrix(xs, xs[:1])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kd.cka_matrix(xs, xs[:1]), expected)


def test_the_same_bits_come_twice():
    xs, ys = network(600, (40, 50), 0, dtype=torch.float32), network(600, (60, 30), 1, dtype=torch.float32)
    for kernel in ("linear", "rbf"):
        assert torch.equal(kd.cka_matrix(xs, ys, kernel=kernel), kd.cka_matrix(xs, ys, kernel=kernel))


def test_a_layer_s_gram_matrix_is_computed_once_not_once_a_pair(monkeypatch):
    made = []
    tile = sums.tile
    monkeypatch.setattr(sums, "tile", lambda side, *rest: made.append(side) or tile(side, *rest))
    xs, ys = network(40, (60, 70, 80), 0), network(40, (50, 90), 1)
    kd.cka_matrix(xs, ys)
    assert len(made) == len({id(side) for side in made}) == 5


def test_tiles_of_all_layers_stay_within_the_budget():
    for layers in (2, 40, 400):
        edge = sums.edge(100_000, layers, 4)
        assert edge == sums.LEAST_TILE or edge**2 * layers * 4 <= sums.BYTES
        assert edge <= 1024


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"xs": []}, ValueError, "xs is an empty list"),
        ({"ys": torch.randn(8, 3)}, TypeError, "ys is a Tensor: give a list of feature tensors"),
        ({"ys": [torch.randn(7, 3)]}, ValueError, r"ys\[0\] has 7 rows, xs\[0\] has 8"),
        ({"xs": [torch.randn(8, 3), torch.randn(8, 3, 2, 2)]}, ValueError, r"xs\[1\].flatten\(1\)"),
        ({"xs": [torch.ones(8, 3, dtype=torch.int64)]}, TypeError, r"xs\[0\] is torch.int64"),
        ({"xs": [torch.randn(3, 3)], "ys": [torch.randn(3, 3)]}, ValueError, "have 3 rows.* needs at least 4"),
        ({"kernel": "gaussian"}, ValueError, "kernel is 'gaussian'"),
        ({"backend": "triton"}, ValueError, "backend is 'triton'"),
    ],
)
def test_a_wrong_argument_is_named_with_the_fix(change, error, message):
    given = {"xs": [torch.randn(8, 3)], "ys": [torch.randn(8, 5)], **change}
    with pytest.raises(error, match=message):
        kd.cka_matrix(given.pop("xs"), given.pop("ys"), **given)
