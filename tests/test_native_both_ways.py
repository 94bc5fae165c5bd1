# SPDX-License-Identifier: Apache-2.0
"""The compiled CKA between rows and between columns: every edge of its blocks and strips against float64, refusals."""

import pytest
import torch
from conftest import needs_native

from kdkernels.gram import both_ways
from kdkernels.gram.both_ways import cka_both_ways
from kdkernels.losses import RCKALoss
from kdkernels.registry import OPS

pytestmark = needs_native(*OPS["cka"].native)


def pair(*shape, size=1.0):
    x, noise = torch.randn(shape), torch.randn(shape)
    return (x + 0.2) * size, (x + noise) / 2 * size


def value_and_gradient(x, y, columns=True, native=True):
    x = x.detach().requires_grad_()
    values = cka_both_ways(x, y, columns, native)
    upstream = torch.linspace(0.5, 2, values.numel(), dtype=values.dtype).view(values.shape)
    return values.detach(), torch.autograd.grad(values, x, upstream)[0]


def assert_exact(x, y, columns=True, eps=3e-6):
    value, gradient = value_and_gradient(x, y, columns)
    exact, slope = value_and_gradient(x.double(), y.double(), columns, native=False)
    assert (value.double() - exact).abs().max() <= 3e-7
    assert (gradient.double() - slope).abs().max() <= eps * slope.abs().max()


@pytest.fixture
def calls(monkeypatch):
    """The names of the compiled operators as they run."""
    seen = []
    for name in ("_native_fwd", "_native_bwd"):
        function = getattr(both_ways, name)

        def record(*arguments, name=name, function=function):
            seen.append(name)
            return function(*arguments)

        monkeypatch.setattr(both_ways, name, record)
    return seen


# a vector is 4, 8 or 16, a tile 16 rows, a strip 128 columns; symmetric products are cut from 128 rows on, others from
# 256, at a multiple of 16 and into eight at most; a piece is 32 rows or 32 vectors
@pytest.mark.parametrize("n", [2, 15, 17, 33, 127, 128, 129, 255, 256, 271, 529, 600])
@pytest.mark.parametrize("columns", [True, False])
def test_every_edge_of_blocks_and_tiles_is_the_textbook(n, columns):
    assert_exact(*pair(n, 620), columns)


@pytest.mark.parametrize("C", [33, 127, 128, 129, 255, 257])
def test_every_edge_of_the_strips_is_the_textbook(C):
    assert_exact(*pair(17, C))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_tasks_are_shared_out_without_loss(threads, count):
    threads(count)
    for shape in ((150, 700), (3, 40, 90)):
        assert_exact(*pair(*shape))


@pytest.mark.parametrize("shape", [(40, 9), (300, 20), (3, 33, 8), (2, 5, 70), (2, 3, 20, 30)])
def test_turned_matrices_and_groups_are_the_textbook(shape, calls):
    assert_exact(*pair(*shape))
    assert calls == ["_native_fwd", "_native_bwd"]


def test_a_side_may_be_the_other():
    x, _ = pair(150, 300)
    value, gradient = value_and_gradient(x, x)
    torch.testing.assert_close(value, torch.ones(2), rtol=0, atol=3e-7)
    assert gradient.abs().max() < 1e-8  # 1e-4 for other pairs


@pytest.mark.parametrize("size", [1e12, 1e-12])
@pytest.mark.parametrize("columns", [True, False])
def test_sizes_whose_fourth_power_leaves_float32_do_no_harm(size, columns):
    assert_exact(*pair(40, 70, size=size), columns)


def test_features_may_be_of_two_widths_where_only_rows_are_compared():
    x, y = pair(20, 70)
    assert_exact(x, y[:, :33], columns=False)


@pytest.mark.parametrize("columns", [True, False])
def test_rows_of_zeros_and_sides_of_zeros_are_as_without_the_library(columns):
    x, y = pair(270, 300)
    x[7], x[:, 5], y[261], y[:, 299] = 0, 0, 0, 0
    assert_exact(x, y, columns)
    for a, b in ((x, 0 * y), (0 * x, y), (x * 1e-25, y), (x, y * 1e-25)):  # products of the last two are 0 in float32
        value, gradient = value_and_gradient(a, b, columns)
        assert (value == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("columns", [True, False])
def test_what_is_too_small_to_be_squared_counts_as_zero(native, columns):
    x, y = pair(40, 70)
    for a, b in ((x * 1e-20, y), (x * 1e-22, y), (x, y * 1e-20)):
        value, gradient = value_and_gradient(a, b, columns, native)
        assert (value == 0).all() and (gradient == 0).all()
    zeroed, tiny = x.clone(), x.clone()
    zeroed[3], tiny[3] = 0, x[3] * 1e-22
    if columns:
        zeroed[:, 5], tiny[:, 5] = 0, x[:, 5] * 1e-21
    for a, b in zip(*(value_and_gradient(z, y, columns, native) for z in (tiny, zeroed)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("native", [True, False])
def test_a_side_whose_squares_just_fit_float32_is_not_zero(native):
    x, y = pair(40, 24)
    value, _ = value_and_gradient(x * 1.5e18, y, native=native)
    torch.testing.assert_close(value, value_and_gradient(x, y)[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_is_passed_on(bad, side):
    sides = pair(270, 300)
    sides[side][269, 3] = bad
    value, gradient = value_and_gradient(*sides)
    assert value.isnan().all() and gradient.isnan().any()


def test_a_call_repeats_its_bits_and_keeps_nothing_without_a_gradient():
    x, y = pair(150, 300)
    first, second = (value_and_gradient(x, y) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    value, products, *_ = both_ways._forward(x, y, True, True, 0)
    assert torch.equal(value, first[0]) and products.numel() == 0


def test_the_loss_calls_it_for_float32_and_its_own_backend_alone(calls):
    x, y = pair(40, 70)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = RCKALoss()(x.requires_grad_(), y.bfloat16())
    mixed.backward()
    assert calls == ["_native_fwd", "_native_bwd"]
    RCKALoss(backend="torch")(x, y), RCKALoss()(x.double(), y)
    assert len(calls) == 2
    strided = torch.randn(70, 40).mT
    torch.testing.assert_close(RCKALoss()(strided, y), RCKALoss(backend="torch")(strided, y), rtol=1e-6, atol=0)
    assert len(calls) == 3


def test_arguments_that_do_not_fit_are_refused():
    run, again = torch.ops.kdkernels.both_ways.default, torch.ops.kdkernels.both_ways_backward.default
    x, y = pair(2, 8, 12)
    for arguments, name in (((x[0, 0], y[0, 0]), "x has 1"), ((x.double(), y), "x must"), ((x, y[:, :7]), "y must")):
        with pytest.raises((ValueError, RuntimeError), match=f"both_ways: {name}"):
            run(*arguments, True)
    with pytest.raises((ValueError, RuntimeError), match="y must"):
        run(x, y[..., :11].contiguous(), True)
    value, *kept = run(x, y, True)
    grad = torch.ones_like(value)
    for at, name in enumerate(("products", "weights", "norms", "numbers")):
        broken = [part[..., 1:].contiguous() if k == at else part for k, part in enumerate(kept)]
        with pytest.raises((ValueError, RuntimeError), match=f"both_ways_backward: {name} must"):
            again(grad, x, y, *broken, True)
    with pytest.raises((ValueError, RuntimeError), match="both_ways_backward: grad must"):
        again(grad[:, :1], x, y, *kept, True)
