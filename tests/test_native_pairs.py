# SPDX-License-Identifier: Apache-2.0
"""CKA and HSIC in one compiled call a pass: edges of the tiles, sizes that leave float32, rules, groups, threads."""

import pytest
import torch
from broken import rejects
from conftest import needs_native
from formulas import assert_near

import kdkernels as kd
from kdkernels.gram import native_impl
from kdkernels.gram.call import SMALL, Question, call_of
from kdkernels.gram.kernels import spec_of
from kdkernels.gram.torch_impl import forms
from kdkernels.registry import OPS

pytestmark = needs_native(*OPS["hsic"].native)

ESTIMATORS = {"unbiased": {}, "biased": {"unbiased": False}, "uncentred": {"unbiased": False, "center": False}}


def served(kernel, x, y):
    """Whether CKA of these features is one compiled call."""
    problem = Question("cka", kernel, True, True, False, True).problem(spec_of(kernel))
    return native_impl.in_one_call(call_of(problem, x[None], y[None], None, (None, None), 0))


def step(op, x, y, backend, **how):
    """The value and the gradients of both sides."""
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    value = op(x, y, backend=backend, **how)
    return value.detach(), *torch.autograd.grad(value.sum(), (x, y))


def alike(n, p, q):
    """Both sides with a signal in common: an unbiased CKA near 0 is all cancellation."""
    signal = torch.randn(n, min(p, q))
    return tuple(torch.randn(n, width).add_(3).index_add(1, torch.arange(signal.shape[1]), signal) for width in (p, q))


# tiles of 4 and 8 rows, panels of 12, 24 and 48, vectors of 4 to 16; strips of 64 and 128 columns
@pytest.mark.parametrize("n", [4, 7, 8, 9, 23, 24, 25, 47, 48, 49, 65, 131])
@pytest.mark.parametrize("p", [33, 63, 64, 129, 200])
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_every_edge_of_the_tiles_is_the_textbook(n, p, kernel):
    p, q = n + p, 2 * n + p  # wider than long, or linear kernels would meet in feature space
    x, y = alike(n, p, q)
    assert served(kernel, x, y) == (n > forms.FEW)
    how = {"kernel": kernel, "unbiased": n > 8}  # HSIC_1 of a handful of rows is all cancellation
    exact = step(kd.cka, x.double(), y.double(), "reference", **how)
    assert_near(step(kd.cka, x, y, "cpp", **how), exact, 3e-6)


@pytest.mark.parametrize("op", [kd.cka, kd.hsic])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kernel", ["linear", kd.RBF("mean"), kd.RBF(("median", 0.5)), (kd.RBF((4.0, 30.0)), "linear")])
def test_masked_rows_are_never_read_and_groups_are_their_own(op, estimator, kernel):
    x, y, mask = torch.randn(3, 21, 60) + 2, torch.randn(3, 21, 90), torch.rand(3, 21) > 0.3
    mask[1] = False
    mask[1, :5] = True
    poisoned = [torch.where(mask[..., None], t, torch.nan) for t in (x, y)]
    got = step(op, *poisoned, "cpp", kernel=kernel, mask=mask, **ESTIMATORS[estimator])
    assert all((g[~mask] == 0).all() for g in got[1:])
    for g in range(3):
        rows = [t[g, mask[g]].double() for t in (x, y)]
        exact = step(op, *rows, "reference", kernel=kernel, **ESTIMATORS[estimator])
        assert_near([got[0][g], *(t[g, mask[g]] for t in got[1:])], exact, 1e-5)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e-9, 1e9, 1e15, 1e25])
def test_features_of_any_size_have_the_cka_and_the_gradient_of_their_shape(kernel, size):
    x, y = torch.randn(40, 80), torch.randn(40, 80)
    exact = step(kd.cka, x.double() * size, y.double() / size, "reference", kernel=kernel)
    value, dx, dy = step(kd.cka, x * size, y / size, "cpp", kernel=kernel)
    assert_near((value, dx.double() * size, dy.double() / size), (exact[0], exact[1] * size, exact[2] / size), 5e-6)


@pytest.mark.parametrize("factor", [0.2, 30.0, 1000.0])
def test_narrow_and_wide_gaussians_keep_their_digits(factor):
    x, y = alike(60, 70, 70)
    kernel = kd.RBF(("mean", factor))
    # not the textbook, which loses the wide ones in float64 already
    exact = step(kd.cka, x.double(), y.double(), "torch", kernel=kernel)
    assert_near(step(kd.cka, x, y, "cpp", kernel=kernel), exact, 3e-6)


@pytest.mark.parametrize("n", [6, 7])  # an odd and an even number of distances
@pytest.mark.parametrize("rule", ["mean", "median"])
def test_a_rule_left_to_the_compiled_call_is_the_rule(n, rule, monkeypatch):
    x, y, mask = torch.randn(2, n + 2, 40), torch.randn(2, n + 2, 50), torch.ones(2, n + 2, dtype=torch.bool)
    mask[1, -2:] = False
    got = step(kd.cka, x, y, "cpp", kernel=kd.RBF((rule, 1.3)), mask=mask)
    monkeypatch.setattr(native_impl, "follows_rules", lambda *a: False)
    assert_near(got, step(kd.cka, x, y, "cpp", kernel=kd.RBF((rule, 1.3)), mask=mask), 5e-6)


def test_a_bandwidth_as_tensor_has_the_gradient_of_the_textbook():
    x, y, sigma = torch.randn(2, 20, 50), torch.randn(2, 20, 60), torch.tensor([5.0, 8.0])

    def sigmas(dtype, backend):
        s = sigma.to(dtype).requires_grad_()
        value = kd.cka(x.to(dtype), y.to(dtype), kernel=(kd.RBF(s), "linear"), backend=backend)
        return torch.autograd.grad(value @ torch.tensor([1.0, -2.0], dtype=dtype), s)

    assert_near(sigmas(torch.float32, "cpp"), sigmas(torch.float64, "reference"), 3e-6)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_a_constant_side_gives_zero_and_nothing_else(kernel):
    x = torch.randn(50).expand(20, 50) * (1 + 1e-7 * torch.randn(20, 1))
    value, dx, dy = step(kd.cka, x.contiguous(), torch.randn(20, 60), "cpp", kernel=kernel)
    assert value == 0 and not dx.any() and not dy.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_a_row_that_is_not_finite_poisons_its_group_alone(bad, kernel):
    x, y = torch.randn(2, 12, 30), torch.randn(2, 12, 30)
    x[1, 3, 4] = bad
    value, dx, _ = step(kd.cka, x, y, "cpp", kernel=kernel)
    assert value[0].isfinite() and dx[0].isfinite().all() and value[1].isnan()


# one part of the columns and several, rows cut for many threads, groups shared out
@pytest.mark.parametrize("shape", [(1, 300, 700), (1, 70, 5000), (5, 40, 300)], ids=str)
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_the_bits_do_not_depend_on_the_number_of_threads(shape, kernel, same_bits):
    x, y = torch.randn(shape) + 1, torch.randn(shape)
    same_bits(lambda: step(kd.cka, x, y, "cpp", kernel=kernel), 9)


def test_numbers_of_a_bandwidth_are_where_the_features_are():
    x, y, kernel = torch.randn(30, 60), torch.randn(30, 80), kd.RBF((5.0, 9.0))
    native_impl._numbers.cache_clear()
    with torch.device("meta"):
        value = kd.cka(x, y, kernel=kernel, backend="cpp")
    torch.testing.assert_close(value, kd.cka(x, y, kernel=kernel, backend="torch"), rtol=1e-5, atol=0)


def test_one_matrix_a_side_that_asks_is_kept():
    x, y, saved = torch.randn(30, 60), torch.randn(30, 80), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        kd.cka(x.requires_grad_(), y, backend="cpp")
    assert sorted(t.numel() for t in saved) == sorted([x.numel(), y.numel(), 6, 900])


def test_what_it_does_not_serve_stays_where_it_was():
    wide = 4 * SMALL
    full = torch.empty(SMALL, wide)
    assert served("linear", full, full)
    for kernel, n, p, dtype in (
        ("cosine", 8, wide, torch.float32),
        ("linear", 8, 2, torch.float32),  # feature space is cheaper
        ("linear", 8, wide, torch.float64),
        ("linear", SMALL + 1, wide, torch.float32),
    ):
        x = torch.empty(n, p, dtype=dtype)
        assert not served(kernel, x, x)


def test_the_operators_refuse_what_they_would_misread():
    run = torch.ops.kdkernels
    x, mask = torch.randn(2, 6, 5), torch.ones(2, 6, dtype=torch.bool)
    linear, how = (0, 1.0, None), (True, True, True, 1, 4)
    for arguments, message in (
        ((x[0], x, None, *linear, *linear, *how), "x must be float32 features"),
        ((x, x.double(), None, *linear, *linear, *how), "y must be float32 features"),
        ((x, x[:, :4], None, *linear, *linear, *how), "the same groups and rows"),
        ((x, x, mask[:1], *linear, *linear, *how), r"mask must be a contiguous bool tensor \[2, 6\]"),
        ((x, x, None, 1, 1.0, torch.ones(2, 1), *linear, *how), r"sigma_x must be contiguous float64"),
        ((x, x, None, *linear, 7, 1.0, None, *how), "rule_y is 7: give 0 to 3"),
    ):
        with pytest.raises(ValueError, match=message):
            run.pair_statistic(*arguments)
    _, rows, V = run.pair_statistic(x, x, None, *linear, *linear, *how)
    one = torch.ones(2)
    for arguments, message in (
        ((one, x[0], None, rows[:, 0], V[0], True), "x must be float32 features"),
        ((one, x, None, rows[:, 0], V[0, :, 1:], True), "must be what pair_statistic kept"),
        ((one[:1], x, None, rows[:, 0], V[0], True), r"grad must be float32 \[2\]"),
        ((one, x, mask[:, 1:], rows[:, 0], V[0], True), r"mask must be a contiguous bool tensor \[2, 6\]"),
    ):
        with pytest.raises(ValueError, match=message):
            run.pair_gradient(*arguments)


FORWARD, BACKWARD = native_impl.forward, native_impl.backward


def of_kept(change):
    """A gradient from another matrix V."""

    def backward(call, saved, grad):
        return BACKWARD(call, (saved[0], change(saved[1].clone())), grad)

    return backward


def without_diagonal(kept):
    kept.diagonal(dim1=-2, dim2=-1).zero_()
    return kept


SABOTAGE = {
    "V without its diagonal": ("gradient x", {"backward": of_kept(without_diagonal)}),
    "V of the wrong group": ("gradient x", {"backward": of_kept(lambda kept: kept.roll(1, 1))}),
    "V without its last column": (
        "gradient x",
        {"backward": of_kept(lambda kept: torch.nn.functional.pad(kept[..., :-1], (0, 1)))},
    ),
    "ignored mask": ("value", {"forward": lambda call: FORWARD(call._replace(mask=None))}),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_the_contract_rejects(name, monkeypatch):
    assert rejects(monkeypatch, "hsic", *SABOTAGE[name], native_impl, backend="cpp")
