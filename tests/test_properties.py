# SPDX-License-Identifier: Apache-2.0
"""What must hold of the Gram family whatever the data: invariances, symmetry, limits, degenerate inputs, memory."""

import math

import pytest
import torch
from conftest import BACKENDS, FAST
from hypothesis import given, settings
from hypothesis import strategies as st
from largest import LargestTensor

import kdkernels as kd

KERNELS = ["linear", "polynomial", "cosine", "rbf", "laplacian"]
# the polynomial kernel knows where the origin is, and the cosine kernel how far away it is
TRANSLATED = ["linear", "rbf", "laplacian"]
SCALED = ["linear", "cosine", "rbf", "laplacian"]


def related(n=40, p=6, q=5, dtype=torch.float32, mean=1.0):
    x = torch.randn(n, p, dtype=dtype) + mean
    return x, torch.randn(n, q, dtype=dtype) + x[:, :1]


def rotation(p, dtype=torch.float32):
    return torch.linalg.qr(torch.randn(p, p, dtype=dtype)).Q


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("unbiased", [True, False])
def test_cka_of_a_side_with_itself_is_one(kernel, unbiased, backend):
    x, _ = related()
    assert kd.cka(x, x, kernel=kernel, unbiased=unbiased, backend=backend).item() == pytest.approx(1.0, abs=5e-6)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kernel", KERNELS)
def test_cka_is_one_for_a_rotated_copy(kernel, backend):
    x, _ = related()
    got = kd.cka(x, x @ rotation(6), kernel=kernel, backend=backend)
    assert got.item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kernel", SCALED)
@pytest.mark.parametrize("scale", [1e-3, 7.0, 1e4])
def test_cka_does_not_see_the_scale_of_a_side(kernel, scale, backend):
    x, y = related()
    got = kd.cka(scale * x, y, kernel=kernel, backend=backend)
    assert got.item() == pytest.approx(kd.cka(x, y, kernel=kernel, backend=backend).item(), abs=3e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [31, 1100])
def test_the_slope_of_a_laplacian_knows_in_which_direction_a_near_pair_lies(backend, rows):
    """MMD of points on a line: sum_j w_j exp(-|x_i - x_j|) sign(x_i - x_j), however near they are."""
    x, y = (torch.linspace(start, start + 4, rows)[:, None].clone() for start in (-2, -1.9))
    x[rows // 3] = x[rows // 2 + 1] + 1e-4
    found = torch.autograd.grad(kd.mmd(x.requires_grad_(), y, kernel=kd.Laplacian(1.0), backend=backend), x)[0]
    slopes = [torch.exp(-d.abs()) * d.sign() for d in (x.detach().double() - side.double().T for side in (x, y))]
    wanted = 2 * (slopes[1].mean(1) / rows - slopes[0].sum(1) / (rows * (rows - 1)))
    of_a_pair = 2 / (rows * (rows - 1))
    torch.testing.assert_close(found[:, 0].double(), wanted, rtol=0, atol=0.01 * of_a_pair)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kernel", TRANSLATED)
def test_cka_does_not_see_where_a_side_lies(kernel, backend):
    x, y = related(mean=0.0)
    x = (x * 64).round() / 64  # so that a mean of 512 rounds nothing away
    got = kd.cka(x + 512, y, kernel=kernel, backend=backend)
    assert got.item() == pytest.approx(kd.cka(x, y, kernel=kernel, backend=backend).item(), abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(4, 60), p=st.integers(1, 70), q=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_cka_hsic_and_gram_mse_are_symmetric_in_their_sides(n, p, q, seed):
    torch.manual_seed(seed)
    x, y = related(n, p, q, torch.float64)
    for f in (kd.cka, kd.hsic, kd.gram_mse):
        torch.testing.assert_close(f(x, y, backend="torch"), f(y, x, backend="torch"), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(kd.mmd(x, x + 1, backend="torch"), kd.mmd(x + 1, x, backend="torch"))


@settings(max_examples=25, deadline=None)
@given(n=st.integers(4, 60), p=st.integers(1, 70), q=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_no_order_of_the_samples_changes_a_value(n, p, q, seed):
    torch.manual_seed(seed)
    x, y = related(n, p, q, torch.float64)
    order = torch.randperm(n)
    for kernel in ("linear", "rbf"):
        want = kd.cka(x, y, kernel=kernel, backend="torch")
        got = kd.cka(x[order], y[order], kernel=kernel, backend="torch")
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 60), p=st.integers(1, 70), q=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_biased_cka_and_gram_mse_are_where_they_must_be(n, p, q, seed):
    torch.manual_seed(seed)
    x, y = related(n, p, q)
    assert -1e-6 <= kd.cka(x, y, unbiased=False, backend="torch").item() <= 1 + 1e-6
    assert kd.gram_mse(x, y, backend="torch").item() >= 0
    assert kd.gram_mse(x, x, backend="torch").item() == 0


@pytest.mark.parametrize("backend", FAST)
def test_rbf_becomes_linear_as_sigma_grows_in_float32(backend):
    """K is then 1 - 1e-6 and all of its digits are in the 1: the naive one-pass sum has none left."""
    x, y = related(n=200)
    linear = kd.cka(x.double(), y.double(), backend="reference").item()
    for sigma, close in ((30.0, 5e-3), (1e3, 1e-5), (1e5, 1e-5)):
        assert kd.cka(x, y, kernel=kd.RBF(sigma), backend=backend).item() == pytest.approx(linear, abs=close)


FAR = kd.RBF(("median", 5.0))
RELU_CASES = [
    (n, kernel, scale, mean)
    for n in (64, 1024)
    for kernel in ("linear", "cosine", "rbf", FAR)
    for scale in (1.0, 1000.0)
    for mean in (3.0, 30.0)
]
LARGE_CASES = [
    (4096, "linear", 1.0, 30.0),
    (4096, "cosine", 1e3, 30.0),
    (4096, "rbf", 1.0, 3.0),
    (4096, FAR, 1e3, 30.0),
]


@pytest.mark.parametrize(
    "n, kernel, scale, mean",
    RELU_CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in LARGE_CASES],
    ids=str,
)
def test_cka_of_relu_features_is_right_to_1e_6_in_float32(n, kernel, scale, mean):
    x = (torch.randn(n, 48).relu() + mean) * scale
    y = (x @ torch.randn(48, 40) / 7 + torch.randn(n, 40) * scale).relu() + mean * scale
    if n > 1024 and kernel in ("rbf", FAR):  # the reference takes the median of all pairs, the others of a subset
        median = torch.cdist(x[:1024].double(), x[:1024].double()).square().median().sqrt().item()
        kernel = kd.RBF(median if kernel == "rbf" else 5 * median)
    exact = kd.cka(x.double(), y.double(), kernel=kernel, backend="reference")
    assert abs(kd.cka(x, y, kernel=kernel, backend="torch").item() - exact.item()) <= 1e-6


def test_unbiased_cka_does_not_drift_with_the_batch_size():
    x = torch.randn(4096, 64)
    y = x @ torch.randn(64, 64) / 8 + 0.7 * torch.randn(4096, 64)
    means = {}
    for unbiased in (True, False):
        for n in (16, 256):
            groups = [t[: 4096 // n * n].reshape(-1, n, 64) for t in (x, y)]
            means[unbiased, n] = kd.cka(*groups, unbiased=unbiased, backend="torch").mean().item()
    assert abs(means[True, 16] - means[True, 256]) < 0.02
    assert means[False, 16] - means[False, 256] > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("value", [0.0, 3.1, 300.0])
def test_cka_with_a_constant_side_is_zero_with_zero_gradient(kernel, unbiased, value, backend):
    x = torch.full((11, 5), value, requires_grad=True)
    y = torch.randn(11, 4, requires_grad=True)
    cka = kd.cka(x, y, kernel=kernel, unbiased=unbiased, backend=backend)
    grads = torch.autograd.grad(cka, (x, y))
    assert cka.item() == 0 and not any(g.any() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("f", [kd.cka, kd.hsic, kd.mmd], ids=lambda f: f.__name__)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_or_infinity_in_a_row_that_counts_gives_nan(f, kernel, bad, backend):
    x, y = related(9, 4, 4)
    x[3, 2] = bad
    assert f(x, y, kernel=kernel, backend=backend).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [None, "row"])
def test_gram_mse_of_nan_is_nan(normalize, backend):
    x, y = related(9, 4, 4)
    y[3, 2] = math.nan
    assert kd.gram_mse(x, y, normalize=normalize, backend=backend).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_group_leaves_the_others_alone(backend):
    x, y = torch.randn(3, 9, 4), torch.randn(3, 9, 4)
    clean = kd.cka(x, y, kernel="rbf", backend=backend)
    x[1, 0, 0] = math.nan
    dirty = kd.cka(x, y, kernel="rbf", backend=backend)
    assert dirty[1].isnan() and torch.equal(dirty[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kept, defined", [(0, False), (1, False), (3, False), (4, True)])
def test_a_mask_that_leaves_too_few_rows_gives_zero_even_when_they_hold_nan(kept, defined, backend):
    x = torch.randn(9, 4, requires_grad=True)
    y = torch.randn(9, 4)
    if not defined:
        y[0] = math.nan
    cka = kd.cka(x, y, mask=torch.arange(9) < kept, backend=backend)
    (gradient,) = torch.autograd.grad(cka, x)
    assert (cka.item() != 0) == defined and bool(gradient.any()) == defined and not gradient.isnan().any()


@pytest.mark.parametrize("backend", FAST)
def test_a_zero_row_has_cosine_zero_and_a_finite_gradient(backend):
    x, y = related(9, 4, 4, torch.float64)
    x[2] = 0
    x.requires_grad_()
    cka = kd.cka(x, y, kernel="cosine", backend=backend)
    torch.testing.assert_close(cka, kd.cka(x, y, kernel="cosine", backend="reference"))
    assert torch.autograd.grad(cka, x)[0].isfinite().all()


@pytest.mark.parametrize("backend", FAST)
def test_two_equal_rows_have_a_finite_laplacian_gradient(backend):
    x, y = related(9, 4, 4)
    x[2] = x[5]
    x.requires_grad_()
    cka = kd.cka(x, y, kernel="laplacian", backend=backend)
    assert torch.autograd.grad(cka, x)[0].isfinite().all()


class LargestInside(LargestTensor):
    """Inside the package's operators too."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        from kdkernels.gram import operator

        inner = {"gram_fwd": operator._forward, "gram_bwd": operator._backward}.get(
            function._schema.name.split("::")[1]
        )
        if inner is not None:
            with self:
                return tuple(args[0].new_empty(0) if t is None else t for t in inner(*args, **(kwargs or {})))
        return super().__torch_dispatch__(function, types, args, kwargs)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    "call",
    [
        lambda x, y, b: kd.cka(x, y, backend=b),
        lambda x, y, b: kd.cka(x, y, kernel="rbf", backend=b),
        lambda x, y, b: kd.cka(x, y, kernel="polynomial", unbiased=False, row_normalize=True, backend=b),
        lambda x, y, b: kd.mmd(x, y, kernel=kd.Laplacian("mean"), backend=b),
        lambda x, y, b: kd.gram_mse(x, y, normalize="row", backend=b),
    ],
    ids=["linear", "rbf", "row-normalised", "mmd", "gram_mse"],
)
def test_nothing_of_size_n_by_n_is_made_forward_or_backward(call, backend):
    n, p = 4096, 24
    x, y = torch.randn(n, p, requires_grad=True), torch.randn(n, p, requires_grad=True)
    with LargestInside() as seen:
        torch.autograd.grad(call(x, y, backend), (x, y))
    # the largest are a tile, the sorted distances of a bandwidth rule, and the features
    assert n * p <= seen.elements <= n * n / 8


def test_the_textbook_does_make_n_by_n():
    x, y = torch.randn(300, 3), torch.randn(300, 3)
    with LargestInside() as seen:
        kd.cka(x, y, backend="reference")
    assert seen.elements == 300 * 300


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    "call",
    [
        lambda x, y, b: kd.hsic(x, y, backend=b),
        lambda x, y, b: kd.mmd(x, y, kernel="linear", unbiased=False, backend=b),
        lambda x, y, b: kd.gram_mse(x, y, backend=b),
    ],
)
def test_what_overflows_is_infinite_and_no_nan(call, backend):
    x, y = (1e30 * t.float() for t in related(9, 4, 4))
    assert call(x, y, backend).isinf()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kernel", ["rbf", "laplacian", kd.RBF("mean")])
def test_a_bandwidth_rule_is_not_rounded_by_autocast(kernel, backend):
    x, y = (t.float() for t in related(9, 40, 40))
    plain = kd.mmd(x, y, kernel=kernel, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert kd.mmd(x, y, kernel=kernel, backend=backend).equal(plain)


@pytest.mark.parametrize("backend", FAST)
def test_a_float64_call_finds_the_bandwidth_of_a_half_side_in_float64(backend):
    x, y = related(9, 4, 4, torch.float64)
    y = y.half()
    want = kd.cka(x, y.double(), kernel="rbf", backend=backend)
    assert kd.cka(x, y, kernel="rbf", backend=backend).equal(want)


def test_features_at_float64_landmarks_have_a_float64_bandwidth():
    x, z = related(9, 4, 4, torch.float64)
    x = x.half()
    assert kd.nystrom_features(x, z, backend="torch").equal(kd.nystrom_features(x.double(), z, backend="torch"))
