# SPDX-License-Identifier: Apache-2.0
"""The drop-in for torchsort: its values, gradients, dtypes and errors; oracles are a formula without pooling and rows
that torchsort 0.1.10 itself computed."""

import itertools
import math

import minmax
import pytest
import torch

import kdkernels as kd
from kdkernels.compat import torchsort

FUNCTIONS = ["soft_rank", "soft_sort"]
REGULARIZATIONS = ["l2", "kl"]
STRENGTHS = [0.1, 1.0, 10.0]


@pytest.fixture(params=FUNCTIONS)
def function(request):
    torch.manual_seed(0)
    return getattr(torchsort, request.param)


def by_the_formula(name, x, regularization, strength):
    rows = [getattr(minmax, name)(row.numpy(), regularization, strength) for row in x.detach()]
    return torch.tensor([row.tolist() for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("regularization", REGULARIZATIONS)
@pytest.mark.parametrize("strength", STRENGTHS)
def test_values_are_the_projection_on_the_permutahedron(function, regularization, strength):
    x = torch.randn(8, 10, dtype=torch.float64)
    expected = by_the_formula(function.__name__, x, regularization, strength)
    result = function(x, regularization=regularization, regularization_strength=strength)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


# what torchsort 0.1.10 gives in float64: strength 0.5 for ranks, 1.5 for sorting
ROW = [0.3, -1.2, 0.35, 2.0, -0.4, 0.3, 1.9, -3.0]
UPSTREAM = [1.0, -2.0, 3.0, 0.5, -1.0, 2.0, 0.0, 4.0]
RECORDED = {
    ("soft_rank", "l2"): (
        [4.825, 2.0, 4.925, 7.6, 3.425, 4.825, 7.4, 1.0],
        [-0.5, 0.0, 3.5, 0.5, -4.5, 1.5, -0.5, 0.0],
    ),
    ("soft_rank", "kl"): (
        [4.830651965945847, 2.0, 5.338696068108304, 8.0, 3.0, 4.830651965945847, 7.0, 1.0],
        [-9.988528497344795, 0.0, 10.315753062797896, 0.0, 0.0, -0.3272245654531005, 0.0, 0.0],
    ),
    ("soft_sort", "l2"): (
        [-2.075, -1.4083333333333, -0.7416666666667, -0.075, 0.3, 0.7916666666667, 1.4583333333333, 2.0],
        [0.625, 0.625, 1.0, 4.0, 0.625, -1.0, 1.0, 0.625],
    ),
    ("soft_sort", "kl"): (
        [-2.5885504, -1.9218838, -1.2552171, -0.5885504, 0.0781162, 0.5853971, 1.2520638, 1.9187305],
        [0.0421253, 0.1887924, 4.2725978, 0.8205520, 0.0848299, 0.0421253, 0.9068502, 1.1421272],
    ),
}


@pytest.mark.parametrize("regularization", REGULARIZATIONS)
def test_rows_that_torchsort_computed_come_out_again_with_their_gradients(function, regularization):
    x = torch.tensor([ROW], dtype=torch.float64, requires_grad=True)
    values, gradient = (torch.tensor([t]).double() for t in RECORDED[function.__name__, regularization])
    result = function(x, regularization, 0.5 if function is torchsort.soft_rank else 1.5)
    result.backward(torch.tensor([UPSTREAM], dtype=torch.float64))
    torch.testing.assert_close(result.detach(), values, rtol=0, atol=1e-6)
    torch.testing.assert_close(x.grad, gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("regularization", REGULARIZATIONS)
@pytest.mark.parametrize("strength", STRENGTHS)
def test_half_rows_give_the_float32_result_rounded_and_gradients_in_their_dtype(
    function, dtype, regularization, strength
):
    x = torch.randn(8, 10).to(dtype).requires_grad_()
    result = function(x, regularization, strength)
    wide = function(x.detach().float(), regularization, strength)
    assert result.dtype == dtype
    # the two may be computed by different schedules
    assert ((result.float() - wide).abs() <= torch.finfo(dtype).eps * wide.abs().clamp(min=1e-3)).all()
    result.sum().backward()
    assert x.grad.dtype == dtype


def test_float16_rows_longer_than_torchsort_can_rank_are_ranked():
    x = torch.randperm(2000).to(torch.float16)[None] / 2
    rank = torchsort.soft_rank(x, regularization_strength=0.1)
    torch.testing.assert_close(rank.float(), (2 * x.float() + 1).to(torch.float16).float())


def test_integers_give_float32_and_doubles_stay_doubles(function):
    assert function(torch.tensor([[3, 1, 2]])).dtype == torch.float32
    assert function(torch.tensor([[3, 1, 2]]).double()).dtype == torch.float64


def test_only_rows_of_a_matrix_and_the_two_regularizations_are_taken(function):
    for x in (torch.randn(5), torch.randn(2, 3, 5), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"'values' should be a 2d-tensor but got torch.Size"):
            function(x)
    with pytest.raises(ValueError, match="'regularization' should be a 'l2' or 'kl'"):
        function(torch.randn(2, 5), regularization="entropy")
    with pytest.raises(ZeroDivisionError, match="regularization_strength is 0"):
        function(torch.randn(2, 5), regularization_strength=0)
    assert function(torch.randn(0, 5)).shape == (0, 5) and function(torch.randn(2, 0)).shape == (2, 0)


def test_a_strength_may_be_a_tensor_and_gets_no_gradient(function):
    x = torch.randn(3, 6, dtype=torch.float64)
    for strength in (torch.tensor(0.7, requires_grad=True), torch.tensor([[0.7], [0.7], [0.7]])):
        torch.testing.assert_close(function(x, "l2", strength), function(x, "l2", 0.7), rtol=1e-6, atol=1e-6)
        assert not function(x, "l2", strength).requires_grad


# [B, 1] is one a row, [n] one a column even where B = n; recorded from torchsort 0.1.10, upstream gradient 0, 1, 4
BROADCAST = {
    "rows": (
        [[0.1], [10.0], [-0.5]],
        [[2.0, 3.0, 1.0], [1.9, 2.0, 2.1], [1.25, 1.75, 3.0]],
        [[0.0, 0.0, 0.0], [-0.1666667, -0.0666667, 0.2333333], [1.0, -1.0, 0.0]],
    ),
    "columns": (
        [0.1, 10.0, -0.5],
        [[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [2.75, 1.0, 2.25]],
        [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [-20.0, 0.0, -4.0]],
    ),
    "entries": (
        [[0.1, 1.0, 2.0], [3.0, 0.2, 1.0], [1.0, 1.0, 5.0]],
        [[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [2.2333333, 1.9833333, 1.7833333]],
        [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [-1.6666667, -0.6666667, 0.4666667]],
    ),
}


@pytest.mark.parametrize("which", BROADCAST)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_tensor_of_strengths_broadcasts_against_the_values_as_in_torchsort(which, dtype):
    strength, ranks, gradient = BROADCAST[which]
    x = torch.tensor([[1.0, 2, 0.5], [1, 2, 3], [0.25, 0, -1]], dtype=dtype, requires_grad=True)
    rank = torchsort.soft_rank(x, "l2", torch.tensor(strength))
    (rank * torch.tensor([0.0, 1, 4], dtype=dtype)).sum().backward()
    bound = 1e-6 if dtype == torch.float64 else 4e-3
    torch.testing.assert_close(rank.tolist(), ranks, rtol=bound, atol=bound)
    torch.testing.assert_close(x.grad.tolist(), gradient, rtol=bound, atol=bound)


def test_strengths_that_have_no_meaning_are_refused(function):
    for shape in ((4,), (2, 3), (2, 1), (1, 1, 3)):
        with pytest.raises(ValueError, match=r"regularization_strength has shape .*: it must broadcast to \(3, 3\)"):
            function(torch.randn(3, 3), "l2", torch.ones(shape))
    for shape in ((3,), (1, 3), (3, 3)):
        with pytest.raises(ValueError, match=r"soft_sort needs one number, or one a row \(3, 1\)"):
            torchsort.soft_sort(torch.randn(3, 3), "l2", torch.ones(shape))


@pytest.mark.parametrize("regularization", REGULARIZATIONS)
def test_a_negative_strength_ranks_downwards_and_is_refused_by_soft_sort(regularization):
    x = torch.randn(3, 6, dtype=torch.float64)
    down = torchsort.soft_rank(-x, regularization, 0.3)
    torch.testing.assert_close(torchsort.soft_rank(x, regularization, -0.3), down)
    torch.testing.assert_close(torchsort.soft_rank(x, regularization, torch.tensor(-0.3).double()), down)
    for strength in (-0.3, torch.tensor(-0.3)):
        with pytest.raises(ValueError, match="soft_sort needs a positive one"):
            torchsort.soft_sort(x, regularization, strength)


# recorded from torchsort 0.1.10 at strength 0.7, upstream gradient 0, 1, 4, 9, 16, 25
INFINITE = {
    (1, 2, -math.inf, 0.5, -math.inf, 2.2): (
        [3.8928571, 5.3214286, math.nan, 3.1785714, math.nan, 5.6071429],
        [-12.5, -11.0714286, -8.5714286, 0.3571429, 8.5714286, 23.2142857],
    ),
    (1, math.inf, math.inf, 0, 3.0, 2): ([2, math.nan, math.nan, 1, 4, 3], [0, -2.1428571, 2.1428571, 0, 0, 0]),
    (math.inf, -math.inf, 1, 2, 3, 3.2): (
        [math.nan, math.nan, 2, 3, 4.3571429, 4.6428571],
        [0, 0, 0, 0, -6.4285714, 6.4285714],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("row", INFINITE)
def test_infinite_values_count_in_the_ranks_of_the_others_as_in_torchsort(row, dtype):
    x = torch.tensor([row, [0.0, 1, 2, 3, 4, 5]], dtype=dtype, requires_grad=True)
    rank = torchsort.soft_rank(x, "l2", 0.7)
    rank[:1].backward(torch.tensor([[0.0, 1, 4, 9, 16, 25]], dtype=dtype))
    expected, gradient = (torch.tensor([t], dtype=torch.float64) for t in INFINITE[row])
    bound = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 2e-2}[dtype]
    torch.testing.assert_close(rank[:1].double(), expected, rtol=bound / 10, atol=bound, equal_nan=True)
    torch.testing.assert_close(x.grad[:1].double(), gradient, rtol=bound / 10, atol=bound)
    assert rank[1].tolist() == [1, 2, 3, 4, 5, 6] and (x.grad[1] == 0).all()


def test_infinities_are_kept_apart_in_half_precision_at_any_strength():
    x = torch.tensor([[1.0, math.inf, 2, -math.inf]], dtype=torch.float16)
    rank = torchsort.soft_rank(x, "l2", 4e4)
    torch.testing.assert_close(rank, torch.tensor([[2.5, math.nan, 2.5, math.nan]]).half(), equal_nan=True)


def test_under_kl_infinite_values_have_no_rank_and_no_gradient_but_the_others_keep_theirs():
    x = torch.tensor([[1, math.inf, 2, 0.5, -math.inf, 2.2]], dtype=torch.float64, requires_grad=True)
    rank = torchsort.soft_rank(x, "kl", 0.7)
    rank.backward(torch.ones_like(rank))
    assert rank.isnan().tolist() == [[False, True, False, False, True, False]]
    assert x.grad.isnan().equal(rank.isnan())
    # one value below them: their ranks are those of five
    alone = torch.tensor([[1, 2, 0.5, -50, 2.2, 50]], dtype=torch.float64)
    expected = by_the_formula("soft_rank", alone, "kl", 0.7)[:, [0, 1, 2, 4]]
    torch.testing.assert_close(rank[:, [0, 2, 3, 5]].detach(), expected)


@pytest.mark.parametrize("regularization", REGULARIZATIONS)
def test_transforms_see_through_what_stands_for_infinities(regularization, nothing_compiled_before):
    values = torch.tensor([[0.3, math.inf, -1.0, 0.9], [0.1, 0.2, -math.inf, 0.4], [1.0, 0.7, 0.1, 0.2]]).double()
    moved = torch.randn_like(values)

    def ranks(v):
        return torchsort.soft_rank(v, regularization, 0.5)

    leaf = values.clone().requires_grad_()
    rows = [torch.autograd.grad(one, leaf, retain_graph=True)[0] for one in ranks(leaf).flatten()]
    jacobian = torch.stack(rows).reshape(3, 4, 3, 4)
    compiled = torch.compile(ranks, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(leaf).sum(), leaf)
    torch.testing.assert_close(got, jacobian.sum((0, 1)), equal_nan=True)
    torch.testing.assert_close(torch.func.jacrev(ranks)(values), jacobian, equal_nan=True)
    tangent = torch.func.jvp(ranks, (values,), (moved,))[1]
    some = slice(None) if regularization == "l2" else slice(2, None)  # a NaN of the Jacobian is one of every tangent
    want = torch.einsum("rirc,rc->ri", jacobian, moved)[some]
    assert want[-1].abs().sum() > 0
    torch.testing.assert_close(tangent[some], want)


def test_soft_sort_of_a_row_with_infinities_is_their_sum_throughout_and_other_rows_are_untouched():
    inf = math.inf
    x = torch.tensor([[1.0, inf, 2], [-inf, 0, 1], [inf, -inf, 1], [3, 1, 2]], requires_grad=True)
    result = torchsort.soft_sort(x, regularization_strength=0.1)
    assert result[0].tolist() == [inf] * 3 and result[1].tolist() == [-inf] * 3 and result[2].isnan().all()
    torch.testing.assert_close(result[3], torch.tensor([1.0, 2, 3]))
    result.backward(torch.tensor([[1.0, 2, 6]] * 4))
    torch.testing.assert_close(x.grad[:3], torch.full((3, 3), 3.0))
    torch.testing.assert_close(x.grad[3], torch.tensor([6.0, 1, 2]))


# float64 sums of a block that holds its least number may leave its range
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
EVERY = itertools.product(FUNCTIONS, REGULARIZATIONS, DTYPES)


@pytest.mark.parametrize("name, regularization, dtype", [e for e in EVERY if e != ("soft_sort", "l2", torch.float64)])
def test_the_least_number_of_a_dtype_counts_as_in_torchsort(name, regularization, dtype):
    """In kd.soft_rank and kd.soft_sort it is absent."""
    function = getattr(torchsort, name)
    limits, x = torch.finfo(dtype), torch.tensor([[0.3, -5000, 1.0, -2.0, 0.4], [3, 1, 2, 5, 4]], dtype=dtype)
    expected, found = by_the_formula(function.__name__, x.double(), regularization, 0.7), []
    if function is torchsort.soft_sort:  # all in one block, of their mean or of the least; ranks are the same far below
        expected[0] = limits.min / (5 if regularization == "l2" else 1)
    for least in (-5000, limits.min):
        x[0, 1] = least
        leaf = x.clone().requires_grad_()
        result = function(leaf, regularization, 0.7)
        found += torch.autograd.grad(result, leaf, torch.tensor([[1.0, -2, 3, 0.5, 4]] * 2, dtype=dtype))
    torch.testing.assert_close(result.double(), expected, rtol=4 * limits.eps, atol=4 * limits.eps)
    torch.testing.assert_close(*found, rtol=2 * limits.eps, atol=0)


def test_nan_stays_in_its_row(function):
    x = torch.tensor([[1, math.nan, 3], [1, 2, 3]])
    assert function(x, "l2", 0.1).isnan().tolist() == [[True] * 3, [False] * 3]


def test_the_names_are_torchsorts_and_kdkernels_itself_does_not_load_them(python):
    assert set(torchsort.__all__) == {"soft_rank", "soft_sort"}
    done = python("-c", "import sys, kdkernels; assert not any('kdkernels.compat' in name for name in sys.modules)")
    assert done.returncode == 0, done.stderr
    x = torch.randn(4, 7)
    torch.testing.assert_close(torchsort.soft_rank(x), kd.soft_rank(x))
