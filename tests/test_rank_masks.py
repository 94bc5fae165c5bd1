# SPDX-License-Identifier: Apache-2.0
"""Absent entries (-inf) take no part in ranks and correlations; NaN and +inf poison their own row, and only it."""

import math

import pytest
import torch
from ranking import backends

import kdkernels as kd

every = pytest.mark.parametrize("backend", backends())
both = pytest.mark.parametrize("regularization", ("l2", "kl"))


def rows(n, count=3):
    return torch.randn(count, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


@every
@both
@pytest.mark.parametrize("strength", [0.0, 0.3, "auto"])
def test_absent_entries_have_rank_0_and_leave_the_others_as_if_they_were_not_there(strength, regularization, backend):
    x = rows(20, 4)
    absent = torch.rand(4, 20) < 0.4
    absent[2] = True
    given = x.masked_fill(absent, -math.inf).requires_grad_()
    for descending in (False, True):
        r = kd.soft_rank(given, regularization, strength, descending=descending, backend=backend)
        (g,) = torch.autograd.grad(r.square().sum(), given)
        assert not r[absent].any() and not g[absent].any()
        for row in range(4):
            own = x[row][~absent[row]].requires_grad_()
            want = kd.soft_rank(own, regularization, strength, descending=descending, backend=backend)
            (h,) = torch.autograd.grad(want.square().sum(), own)
            torch.testing.assert_close(r[row][~absent[row]], want)
            torch.testing.assert_close(g[row][~absent[row]], h)


@every
@both
@pytest.mark.parametrize("descending", [False, True])
def test_absent_entries_are_sorted_last_in_either_direction(descending, regularization, backend):
    x = torch.tensor([[3.0, -math.inf, 1.0, 2.0, -math.inf]], requires_grad=True)
    value = kd.soft_sort(x, regularization, 0.1, descending=descending, backend=backend)
    want = kd.soft_sort(torch.tensor([3.0, 1.0, 2.0]), regularization, 0.1, descending=descending, backend=backend)
    torch.testing.assert_close(value[0, :3], want)
    assert (value[0, 3:] == -math.inf).all()
    (g,) = torch.autograd.grad(value[:, :3].sum(), x)
    torch.testing.assert_close(g, torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0]]))


def padded(n, dtype):
    """Pairs of rows with gaps, one without, one of nothing else, one with ties; and which entries are gaps."""
    x, y = (torch.randn(5, n, generator=torch.Generator().manual_seed(n)).to(dtype).roll(k, 0) for k in (0, 1))
    gaps = torch.rand(2, 5, n, generator=torch.Generator().manual_seed(n + 1)) < 0.3
    gaps[:, 0], gaps[0, 1], x[3, 1:3] = False, True, x[3, 0]
    return x, y, gaps


def outcome(f, x, y, gaps, padding):
    """Value and gradients of f of both sides with their gaps padded, those of one side with either kind."""
    x, y = x.masked_fill(gaps[0], padding), y.masked_fill(gaps[1], padding)
    if padding != -math.inf:
        x[:, ::2] = x[:, ::2].masked_fill(gaps[0][:, ::2], -math.inf)
    sides = [side.requires_grad_() for side in (x, y)]
    value = f(*sides)
    if not value.requires_grad:
        return (value,)
    upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view_as(value)
    some = torch.where(value.isfinite(), value, 0).mul(upstream).sum()
    return value.detach(), *torch.autograd.grad(some, sides, allow_unused=True)


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WIDE = torch.linspace(-1, 1, 9, dtype=torch.float64).sin()
STRENGTHS = {"l2": (0.0, 0.3, "auto", torch.tensor(0.5).double()), "kl": (0.3, "auto")}


def functions(backend):
    for regularization, strengths in STRENGTHS.items():
        for strength in strengths:
            how = {"regularization": regularization, "regularization_strength": strength, "backend": backend}
            for op in (kd.soft_rank, kd.soft_sort):
                for descending in (False, True):
                    yield lambda x, y, op=op, how=how, d=descending: op(x, descending=d, **how)
            for hard in (False, True):
                yield lambda x, y, how=how, hard=hard: kd.spearman(x, y, hard_target=hard, **how)
                yield lambda x, y, how=how, hard=hard: kd.spearman(WIDE.expand_as(x), x, hard_target=hard, **how)
            yield lambda x, y, how=how: kd.rank_diagnostics(x, **how).fraction_pooled
    yield lambda x, y: kd.spearman_corr(x, y, backend=backend)
    yield lambda x, y: kd.pearson(x, y, backend=backend if backend == "reference" else "torch")


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_least_number_of_a_dtype_is_absent_bit_for_bit_as_minus_infinity_is(dtype, backend):
    pairs = padded(9, dtype)
    for f in functions(backend):
        want = outcome(f, *pairs, -math.inf)
        for a, b in zip(outcome(f, *pairs, torch.finfo(dtype).min), want, strict=True):
            assert (a is b is None) or torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))
    rank = kd.soft_rank(pairs[0].masked_fill(pairs[2][0], torch.finfo(dtype).min), "l2", "auto", backend=backend)
    assert torch.equal(rank == 0, pairs[2][0])


@every
def test_a_number_next_to_the_least_or_the_least_of_a_narrower_dtype_is_a_number(backend):
    limits = torch.finfo(torch.float32)
    for low in ((1 - limits.eps) * limits.min, torch.finfo(torch.float16).min, torch.finfo(torch.bfloat16).min):
        x = torch.tensor([[low, 1.0, limits.max, -1.0]])
        assert kd.soft_rank(x, "l2", 0.1, backend=backend).tolist() == [[1, 3, 4, 2]]
        assert kd.soft_rank(x, "l2", 0.1, descending=True, backend=backend).tolist() == [[4, 2, 1, 3]]
        for descending in (False, True):
            value = kd.soft_sort(x, "l2", 0.0, descending=descending, backend=backend)
            assert torch.equal(value, x.sort(descending=descending).values)
    wide = torch.tensor([[limits.min, 1.0]]).double()
    assert kd.soft_rank(wide, "l2", 0.1, backend=backend).tolist() == [[1, 2]]


@every
def test_a_tangent_knows_what_is_absent_in_the_dtype_of_the_rows(backend):
    x, _, (gaps, _) = padded(9, torch.float16)
    strength = torch.full((5,), 0.4, dtype=torch.float64)
    f = lambda x, eps: kd.soft_rank(x, "l2", eps, backend=backend)  # noqa: E731
    tangents = [
        torch.func.jvp(f, (x.masked_fill(gaps, padding), strength), (torch.ones_like(x), torch.ones_like(strength)))[1]
        for padding in (-math.inf, torch.finfo(x.dtype).min)
    ]
    assert torch.equal(*tangents) and tangents[0].any()


@every
@both
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.nan])
@pytest.mark.parametrize("descending", [False, True])
def test_a_poisoned_row_is_nan_and_stays_in_its_own_row(descending, bad, regularization, backend):
    clean = rows(16, 3)
    dirty = clean.clone()
    dirty[1, 5] = bad
    for function in (kd.soft_rank, kd.soft_sort):
        outcomes = []
        for x in (clean, dirty):
            x = x.clone().requires_grad_()
            value = function(x, regularization, 0.5, descending=descending, backend=backend)
            (g,) = torch.autograd.grad(value.square().sum(), x)
            assert torch.equal(value.isnan().all(-1), x.isnan().any(-1) | x.isposinf().any(-1))
            assert torch.equal(g.isnan().all(-1), value.isnan().all(-1))
            outcomes.append((value.detach(), g))
        for a, b in zip(*outcomes, strict=True):
            assert torch.equal(a[[0, 2]], b[[0, 2]])


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_poisoned_pair_correlates_to_nan_in_its_own_row(bad, backend):
    x, y = rows(16, 3).requires_grad_(), rows(17, 3)[:, :16].clone()
    y[1, 5] = bad
    y.requires_grad_()
    for function in (kd.spearman, kd.pearson):
        value = function(x, y, backend=backend if function is kd.spearman else "torch")
        assert value.isnan().tolist() == [False, True, False]
        for g in torch.autograd.grad(value.sum(), (x, y)):
            assert g.isnan().all(-1).tolist() == [False, True, False] and g[[0, 2]].isfinite().all()
    assert kd.spearman_corr(x, y, backend=backend).isnan().tolist() == [False, True, False]


@every
def test_pairs_absent_on_either_side_are_dropped_from_both(backend):
    x, y = rows(20, 4), rows(21, 4)[:, :20]
    gone_x, gone_y = torch.rand(4, 20) < 0.3, torch.rand(4, 20) < 0.3
    keep = ~(gone_x | gone_y)
    given = [t.masked_fill(gone, -math.inf).requires_grad_() for t, gone in ((x, gone_x), (y, gone_y))]
    hidden = given[1].detach().masked_fill(gone_x, math.nan).requires_grad_()
    for function in (kd.spearman, kd.pearson, kd.spearman_corr):
        chosen = "torch" if function is kd.pearson else backend
        value = function(*given, backend=chosen)
        torch.testing.assert_close(function(given[0], hidden, backend=chosen), value)
        for row in range(4):
            want = function(x[row][keep[row]], y[row][keep[row]], backend=chosen)
            torch.testing.assert_close(value[row], want)
        if function is not kd.spearman_corr:
            for g in torch.autograd.grad(value.sum(), given):
                assert not g[~keep].any() and g.any(-1).all()


@every
def test_what_cannot_correlate_is_0_with_zero_gradient(backend):
    """All absent, one pair left, and a constant side."""
    x, y = rows(6, 3), rows(7, 3)[:, :6].requires_grad_()
    x[0], x[1, 1:], x[2] = -math.inf, -math.inf, 0.1
    x.requires_grad_()
    for function in (kd.spearman, kd.pearson):
        value = function(x, y, backend=backend if function is kd.spearman else "torch")
        assert value.tolist() == [0, 0, 0]
        for g in torch.autograd.grad(value.sum(), (x, y)):
            assert not g.any()
    assert not kd.spearman_corr(x, y, backend=backend).any()


@every
def test_diagnostics_count_only_what_is_there(backend):
    x = torch.tensor([[1.0, -math.inf, 1.0, 5.0, 9.0], [-math.inf] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]])
    found = kd.rank_diagnostics(x, 0.5, backend=backend)
    assert found.fraction_pooled.tolist() == [0.5, 0, 0] and found.blocks.tolist() == [3, 0, 5]


def waves(x):
    return torch.arange(x.numel(), dtype=x.dtype).sin().reshape(x.shape)


MASKED = {
    "soft_rank": kd.soft_rank,
    "soft_sort": kd.soft_sort,
    "spearman": lambda x, **how: kd.spearman(x, waves(x), **how),
    "pearson": lambda x, **how: kd.pearson(x, waves(x), **how),
    "spearman_corr": lambda x, **how: kd.spearman_corr(x, waves(x), **how),
}


@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.parametrize("name", MASKED)
def test_what_a_mask_leaves_out_is_absent_whatever_it_holds(name, dim):
    x = torch.randn(3, 9, 5, dtype=torch.float64)
    for mask in (torch.rand(3, 9, 5) < 0.7, torch.rand(5) < 0.7, torch.rand(3, 9, 1) < 0.7):
        dirty = torch.where(mask, x, math.nan).requires_grad_()
        given = x.masked_fill(~mask, -math.inf).requires_grad_()
        value, want = MASKED[name](dirty, dim=dim, mask=mask), MASKED[name](given, dim=dim)
        assert value.equal(want)
        if want.requires_grad:
            kept = torch.where(want.isfinite(), want, 0.0).square().sum(), torch.where(value.isfinite(), value, 0.0)
            (g,) = torch.autograd.grad(kept[1].square().sum(), dirty)
            assert g.equal(torch.autograd.grad(kept[0], given)[0]) and not g[~mask.expand_as(g)].any()


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_that_does_not_fit_is_refused(name):
    x = torch.randn(3, 9)
    for mask in (torch.ones(3, dtype=torch.bool), torch.ones(2, 3, 9, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"mask has shape .*: it must broadcast to that of x, \(3, 9\)"):
            MASKED[name](x, mask=mask)
    with pytest.raises(TypeError, match="mask is torch.float32: pass a bool tensor"):
        MASKED[name](x, mask=torch.ones(3, 9))
