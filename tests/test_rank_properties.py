# SPDX-License-Identifier: Apache-2.0
"""Soft ranks, soft sorts and rank correlations keep what their definition promises, on every backend."""

import math

import pytest
import torch
from ranking import LARGE, SIZES, adversarial, backends

import kdkernels as kd
from kdkernels.rank import metrics, torch_impl

BACKENDS = backends()
FAST = backends(reference=False)
REGULARIZATIONS = ("l2", "kl")
STRENGTHS = (1e-9, 0.01, 0.3, 1.0, 30.0, "auto")

every = pytest.mark.parametrize("backend", BACKENDS)
fast = pytest.mark.parametrize("backend", FAST)
both = pytest.mark.parametrize("regularization", REGULARIZATIONS)


def rows(n, count=3, dtype=torch.float64):
    return torch.randn(count, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(dtype)


def ulps(got, want):
    """The largest distance in units in the last place of float32, where `want` is float64."""
    unit = torch.nextafter(want.float().abs(), torch.tensor(math.inf)).double() - want.float().abs().double()
    return float(((got.double() - want).abs() / unit).max()) if want.numel() else 0.0


def jacobian(f, x):
    return torch.stack([torch.autograd.grad(f(x)[i], x)[0] for i in range(len(x))])


@every
@both
@pytest.mark.parametrize("strength", STRENGTHS)
def test_soft_ranks_sum_to_n_n_plus_1_over_2(strength, regularization, backend):
    for n in (1, 2, 31, 100):
        r = kd.soft_rank(rows(n), regularization, strength, backend=backend)
        torch.testing.assert_close(r.sum(-1), torch.full((3,), n * (n + 1) / 2, dtype=torch.float64))


@every
@both
def test_soft_ranks_lie_in_the_permutahedron(regularization, backend):
    """The sum of the k largest never exceeds n + ... + (n - k + 1)."""
    for name, x in adversarial(40).items():
        for strength in STRENGTHS:
            r = kd.soft_rank(x, regularization, strength, backend=backend).sort(descending=True).values
            most = torch.arange(40, 0, -1, dtype=torch.float64).cumsum(0)
            assert (r.cumsum(0) <= most * (1 + 1e-12)).all(), (name, strength)


@every
@both
def test_soft_ranks_keep_the_order_of_their_row(regularization, backend):
    for name, x in adversarial(50).items():
        for strength in STRENGTHS:
            r = kd.soft_rank(x, regularization, strength, backend=backend)
            assert (r[x.argsort()].diff() >= -1e-12).all(), (name, strength)


@every
@both
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_shift_changes_no_rank(offset, regularization, backend):
    x = (rows(64) * 1024).round() / 1024  # the shift itself rounds nothing
    for strength in STRENGTHS:
        want = kd.soft_rank(x, regularization, strength, backend=backend)
        got = kd.soft_rank(x + offset, regularization, strength, backend=backend)
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
        got = kd.soft_rank((x + offset).float(), regularization, strength, backend=backend)
        if backend != "reference":  # the textbook rounds in float32 between its steps
            assert ulps(got, want) <= 1, strength


@every
@both
def test_a_small_strength_gives_hard_ranks_and_zero_gradient(regularization, backend):
    x = rows(30).requires_grad_()
    for strength in (1e-9, 0.0):
        r = kd.soft_rank(x, regularization, strength, backend=backend)
        assert torch.equal(r, x.argsort(-1).argsort(-1) + 1.0)
        (g,) = torch.autograd.grad((r * r).sum(), x)
        assert not g.any()


@every
def test_a_large_strength_gives_one_block_in_which_l2_ranks_are_affine(backend):
    x = rows(30)
    r = kd.soft_rank(x, "l2", 1e3, backend=backend)
    torch.testing.assert_close(r, 15.5 + (x - x.mean(-1, keepdim=True)) / 1e3)
    assert (kd.rank_diagnostics(x, 1e3, backend=backend).blocks == 1).all()
    r = kd.soft_rank(x, "kl", 1e3, backend=backend)
    torch.testing.assert_close(r, 465 * torch.softmax(x / 1e3, -1))


@every
def test_a_large_strength_makes_spearman_pearson(backend):
    x, y = rows(30), rows(31)[:, :30]
    got = kd.spearman(x, y, regularization_strength=1e3, backend=backend)
    torch.testing.assert_close(got, kd.pearson(x, y))
    if backend != "reference":  # all ranks lie within 1e-3 of 15.5: float32 has three digits of their differences
        for strength in (1e3, torch.tensor(1e3)):
            single = kd.spearman(x.float(), y.float(), regularization_strength=strength, backend=backend)
            torch.testing.assert_close(single, got.float(), rtol=0, atol=5e-7)


@every
@both
@pytest.mark.parametrize("strength", [0.1, 0.5, 5.0])
def test_the_jacobian_is_symmetric_and_its_rows_and_blocks_sum_to_0(strength, regularization, backend):
    x = rows(14, 1)[0].requires_grad_()
    J = jacobian(lambda t: kd.soft_rank(t, regularization, strength, backend=backend), x)
    torch.testing.assert_close(J, J.T)
    torch.testing.assert_close(J.sum(-1), torch.zeros(14, dtype=torch.float64), atol=1e-12, rtol=0)
    connected = (J != 0).double()
    assert torch.equal(connected, (connected @ connected > 0).double()), "entries are not 0 exactly outside of blocks"


@every
@both
@pytest.mark.parametrize("strength", [0.0, 1e-9, 0.3, 10.0, "auto"])
def test_ties_get_one_rank_and_equal_gradients_from_equal_upstreams(strength, regularization, backend):
    x = torch.tensor([1.0, 0.5, 1.0, -2.0, 0.5, 1.0, 7.0], requires_grad=True)
    upstream = torch.tensor([1.0, 2.0, 1.0, -1.0, 2.0, 1.0, 3.0])
    r = kd.soft_rank(x, regularization, strength, backend=backend)
    (g,) = torch.autograd.grad(r, x, upstream)
    for tie in ([0, 2, 5], [1, 4]):
        assert (r[tie] == r[tie[0]]).all()
        torch.testing.assert_close(g[tie], g[tie[:1]].expand(len(tie)))
    if strength in (0.0, 1e-9):
        assert r.tolist() == [5, 2.5, 5, 1, 2.5, 5, 7]


@every
@both
def test_a_permuted_row_has_permuted_ranks_and_gradients(regularization, backend):
    order = torch.randperm(41)
    for name, x in adversarial(41).items():
        x = x.clone().requires_grad_()
        u = torch.randn(41, dtype=torch.float64)
        r = kd.soft_rank(x, regularization, "auto", backend=backend)
        (g,) = torch.autograd.grad(r, x, u)
        p = x.detach()[order].requires_grad_()
        q = kd.soft_rank(p, regularization, "auto", backend=backend)
        (h,) = torch.autograd.grad(q, p, u[order])
        torch.testing.assert_close(q, r[order], msg=name)
        torch.testing.assert_close(h, g[order], msg=name)


@every
@both
def test_permuted_rows_have_permuted_results(regularization, backend):
    x = rows(33, 6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    r = kd.soft_rank(x, regularization, 0.2, backend=backend)
    assert torch.equal(kd.soft_rank(x[order], regularization, 0.2, backend=backend), r[order])


@every
@both
@pytest.mark.parametrize("strength", [1e-9, 0.3, 10.0])
def test_descending_ranks_are_those_of_the_negated_row(strength, regularization, backend):
    x = rows(25).requires_grad_()
    u = rows(26)[:, :25]
    for function in (kd.soft_rank, kd.soft_sort):
        sign = 1 if function is kd.soft_rank else -1
        got = function(x, regularization, strength, descending=True, backend=backend)
        want = sign * function(-x, regularization, strength, backend=backend)
        torch.testing.assert_close(got, want)
        pair = (torch.autograd.grad((f * u).sum(), x)[0] for f in (got, want))
        torch.testing.assert_close(*pair)


@fast
@both
@pytest.mark.parametrize("n", SIZES)
def test_every_length_and_kind_of_row_equals_the_textbook(n, regularization, backend):
    """Float32 rows within 1 unit in the last place of their float64 ranks; gradients as close."""
    kinds = adversarial(n)
    x = torch.stack([*kinds.values()]).float()
    for strength in (1e-9, 0.02, 1.0, 1e3, "auto"):
        given = x.clone().requires_grad_()
        r = kd.soft_rank(given, regularization, strength, backend=backend)
        assert r.dtype == torch.float32
        upstream = torch.linspace(-1, 1, n).expand_as(r)
        (g,) = torch.autograd.grad(r, given, upstream)
        double = x.double().requires_grad_()
        want = kd.soft_rank(double, regularization, strength, backend="reference")
        (h,) = torch.autograd.grad(want, double, upstream.double())
        assert ulps(r.detach(), want.detach()) <= 1, strength
        # the terms of a gradient, u / eps or r u / eps, may be far larger than their difference
        terms = want.detach().amax() if regularization == "kl" else 1.0
        eps = 1.0 if strength == "auto" else strength
        assert (g - h).abs().max() <= 1e-6 * max(h.abs().max(), 1e-6 * terms / eps), strength


@fast
@pytest.mark.parametrize("n", LARGE)
@pytest.mark.parametrize("strength", [1e-9, 1e-4, 1.0, 1e3])
def test_a_vocabulary_is_ranked_within_one_unit_in_the_last_place(n, strength, backend):
    x = adversarial(n)["logits"].float()[None]
    assert ulps(kd.soft_rank(x, "l2", strength, backend=backend), textbook(x, strength)) <= 1


def textbook(x, strength):
    return kd.soft_rank(x.double(), "l2", strength, backend="reference")


@fast
@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [2049, 4097])
def test_half_rows_return_float32_ranks_and_gradients_of_their_own_dtype(n, dtype, regularization, backend):
    x = rows(n, 2).to(dtype).requires_grad_()
    r = kd.soft_rank(x, regularization, "auto", backend=backend)
    assert r.dtype == torch.float32 and r.isfinite().all()
    want = kd.soft_rank(x.detach().double(), regularization, "auto", backend="reference")
    assert ulps(r.detach(), want) <= 1
    # small enough for float16, where 1 / eps is 600 and r is 2,000; not equal on ties, which is all that kl pools here
    (g,) = torch.autograd.grad(r, x, torch.linspace(-1e-3, 1e-3, n).expand_as(r))
    assert g.dtype == dtype and g.isfinite().all() and g.any()


@fast
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_vocabulary_is_ranked_within_one_unit_in_the_last_place(dtype, backend):
    x = adversarial(128256)["normal"].to(dtype)[None]
    assert ulps(kd.soft_rank(x, "l2", 1e-3, backend=backend), textbook(x, 1e-3)) <= 1


@every
@pytest.mark.parametrize("strength", [0.01, 1e-3, 1e-6])
def test_kl_ranks_of_probabilities_have_finite_gradients(strength, backend):
    """exp(x / eps) overflows here: exp(1 / 0.01) is 2.7e43."""
    x = torch.rand(4, 50, requires_grad=True)
    r = kd.soft_rank(x, "kl", strength, backend=backend)
    (g,) = torch.autograd.grad(r.square().sum(), x)
    assert r.isfinite().all() and g.isfinite().all()
    torch.testing.assert_close(r.sum(-1), torch.full((4,), 1275.0))


@every
@pytest.mark.parametrize("shape, dim", [((7,), 0), ((7,), -1), ((4, 5, 6), 0), ((4, 5, 6), 1), ((4, 5, 6), -1)])
def test_any_dim_of_any_tensor(shape, dim, backend):
    x = torch.randn(shape)
    for function in (kd.soft_rank, kd.soft_sort):
        got = function(x, dim=dim, backend=backend)
        want = function(x.movedim(dim, -1).reshape(-1, shape[dim]), backend=backend)
        torch.testing.assert_close(got.movedim(dim, -1).reshape(want.shape), want)
    assert kd.spearman(x, x + 1, dim=dim, backend=backend).shape == x.select(dim, 0).shape


@every
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,), (0, 0), (3, 0, 2), (2, 1)])
def test_empty_tensors_and_single_elements(shape, backend):
    x = torch.zeros(shape, requires_grad=True)
    for regularization in REGULARIZATIONS:
        for function in (kd.soft_rank, kd.soft_sort):
            value = function(x, regularization, "auto", backend=backend)
            assert value.shape == x.shape
            (g,) = torch.autograd.grad(value.sum(), x)
            assert g.shape == x.shape
    for function in (kd.spearman, kd.spearman_corr):
        value = function(x, x, backend=backend)
        assert value.shape == shape[:-1] and not value.any()
    assert kd.pearson(x, x).shape == shape[:-1]
    found = kd.rank_diagnostics(x, backend=backend)
    assert found.blocks.shape == shape[:-1] and (found.blocks == min(1, shape[-1])).all()


@every
@both
def test_softly_sorted_values_keep_their_sum_and_their_order(regularization, backend):
    for name, x in adversarial(30).items():
        for strength in (0.01, 1.0, 100.0):
            value = kd.soft_sort(x, regularization, strength, backend=backend)
            assert (value.diff() >= -1e-9).all(), name
            if regularization == "l2":
                torch.testing.assert_close(value.sum(), x.sum(), msg=name)


@every
@both
def test_a_small_strength_sorts_and_routes_the_gradient(regularization, backend):
    x = rows(20).requires_grad_()
    value = kd.soft_sort(x, regularization, 1e-6, backend=backend)
    torch.testing.assert_close(value, x.sort(-1).values)
    u = rows(21)[:, :20]
    (g,) = torch.autograd.grad(value, x, u)
    torch.testing.assert_close(g.gather(-1, x.argsort(-1)), u)


@every
@both
def test_the_relative_strength_follows_the_scale_of_the_row(regularization, backend):
    x = rows(50)
    want = kd.soft_rank(x, regularization, ("auto", 2.0), backend=backend)
    for scale in (1e-6, 1e6):
        torch.testing.assert_close(kd.soft_rank(x * scale, regularization, ("auto", 2.0), backend=backend), want)
    eps = 2 * x.std(-1, correction=0) * 12**0.5 / 50
    torch.testing.assert_close(kd.soft_rank(x, regularization, eps, backend=backend), want)


@every
def test_a_constant_row_has_equal_ranks_and_a_small_gradient_under_a_relative_strength(backend):
    x = torch.full((2, 9), 0.1, requires_grad=True)
    r = kd.soft_rank(x, "l2", "auto", backend=backend)
    assert (r == 5).all()
    u = torch.arange(9.0).expand(2, 9)
    (g,) = torch.autograd.grad(r, x, u)
    torch.testing.assert_close(g, u - 4)


@every
@both
def test_a_strength_tensor_is_the_number_it_holds_and_has_a_gradient(regularization, backend):
    x, u = rows(12), rows(13)[:, :12]
    for function in (kd.soft_rank, kd.soft_sort):
        for strength in (0.7, torch.tensor([0.2, 0.7, 3.0], dtype=torch.float64)):
            eps = torch.as_tensor(strength, dtype=torch.float64).clone().requires_grad_()
            value = function(x, regularization, eps, backend=backend)
            if isinstance(strength, float):
                assert torch.equal(value.detach(), function(x, regularization, strength, backend=backend))
            (g,) = torch.autograd.grad((value * u).sum(), eps)

            def shifted(h, function=function, eps=eps):
                return (function(x, regularization, eps.detach() + h, backend=backend) * u).sum(-1)

            slope = (shifted(1e-6) - shifted(-1e-6)) / 2e-6
            torch.testing.assert_close(g, slope if g.dim() else slope.sum(), rtol=1e-6, atol=1e-6)


@fast
def test_an_upstream_that_is_not_finite_poisons_its_own_row(backend):
    x = torch.randn(3, 20, requires_grad=True)
    for bad in (math.nan, math.inf):
        u = torch.ones(3, 20)
        u[1, 4] = bad
        for function in (kd.soft_rank, kd.soft_sort):
            (g,) = torch.autograd.grad(function(x, "l2", 100.0, backend=backend), x, u)
            assert g[[0, 2]].isfinite().all() and not g[1].isfinite().any()


@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("relative", [False, True])
def test_nothing_is_read_by_the_host(relative, kl):
    """A meta tensor has no values: reading one, or a size that depends on one, raises."""
    for shape in ((4, 100), (3000, 40), (1, 1), (2, 3000)):
        x = torch.empty(shape, device="meta")
        strengths = torch.empty(shape[0], device="meta", dtype=torch.float64)
        for given in (None, strengths):
            rank, blocks, eps = torch_impl.rank_forward(x, given, 1.0, relative, kl, True, True)
            g = torch_impl.rank_backward(rank, x, rank, blocks, eps, kl, True)
            value, s, order, start, eps = torch_impl.soft_sort_forward(x, given, 1.0, relative, kl, False)
            h = torch_impl.soft_sort_backward(value, s, order, start, kl)
            assert {t.shape for t in (rank, blocks, g, value, start, h)} == {x.shape}
        run = torch_impl.rank_backward
        torch_impl.rank_strength_gradient(run, g, x, strengths, rank, blocks, eps, kl, True)
        torch_impl.sort_strength_gradient(g, strengths, x, start, eps, kl, True)
        torch_impl.spearman_forward(x, x, 1.0, relative, kl, False, True, True)
        metrics.of_ranks(rank, rank, metrics.drop_pairs(x, x)[2], torch.float32)
        value, moments = metrics.pearson(x, x)
        metrics.pearson_gradient(value, x, x, moments, True, True)
        metrics.diagnose(x, blocks)
