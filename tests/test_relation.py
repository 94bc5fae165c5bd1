# SPDX-License-Identifier: Apache-2.0
"""The relations: what they do not change with, their edges, their memory."""

import math

import pytest
import torch
from conftest import BACKENDS
from largest import LargestTensor

import kdkernels as kd
from kdkernels.registry import OPS
from kdkernels.relation import pairs, torch_impl

KINDS = ("rkd_distance", "rkd_angle", "pkt")
every = pytest.mark.parametrize("kind", KINDS)


def fast():
    """Each op on each of its backends but the textbook."""
    for kind in KINDS:
        for backend in BACKENDS:
            name = backend if isinstance(backend, str) else backend.values[0]
            if name in OPS[kind].backends and name != "reference":
                yield pytest.param(kind, name, marks=[] if isinstance(backend, str) else backend.marks)


on_every_backend = pytest.mark.parametrize("kind, backend", list(fast()))


def value_and_gradients(kind, x, y, **options):
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    value = getattr(kd, kind)(x, y, **options)
    return value.detach(), *torch.autograd.grad(value.sum(), (x, y))


@every
def test_rotations_shifts_and_scales_change_nothing(kind):
    x, y = torch.randn(12, 6).double(), torch.randn(12, 8).double()
    rotation = torch.linalg.qr(torch.randn(6, 6).double()).Q
    moved = 7 * x @ rotation + (0 if kind == "pkt" else 3)
    torch.testing.assert_close(getattr(kd, kind)(moved, y), getattr(kd, kind)(x, y), rtol=1e-6, atol=0)


@every
def test_the_gradient_is_orthogonal_to_what_changes_nothing(kind):
    x, y = torch.randn(12, 6).double(), torch.randn(12, 8).double()
    _, dx, dy = value_and_gradients(kind, x, y)
    for gradient, features in ((dx, x), (dy, y)):
        assert abs((gradient * features).sum()) < 1e-7 * gradient.norm() * features.norm()  # the scale
        if kind != "pkt":
            assert gradient.sum(0).norm() < 1e-12 * gradient.norm()  # the shift


def test_the_angles_of_a_right_triangle():
    """0, 45, 90 degrees against 60, 60, 60: three vertices, two orders of the other two, of 27 triples."""
    right = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    regular = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]])
    want = 2 * (0.5**2 / 2 + 2 * (math.sqrt(0.5) - 0.5) ** 2 / 2) / 27
    for backend in ("reference", "torch"):
        torch.testing.assert_close(kd.rkd_angle(right, regular, backend=backend).item(), want, rtol=1e-6, atol=0)


def test_opposite_directions_lie_on_the_linear_part_of_the_loss():
    """On a line, with the middle sample moved out: cosines of -1 against 1."""
    line, folded = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [3.0], [2.0]])
    # at sample 1 the others lie on two sides against one, at sample 2 on one against two: |difference| = 2
    want = 2 * 2 * (2 - 0.5) / 27
    for backend in ("reference", "torch"):
        torch.testing.assert_close(kd.rkd_angle(line, folded, backend=backend).item(), want, rtol=1e-6, atol=0)


def test_a_pair_that_is_one_on_one_side_alone_counts_a_half_for_each_angle_of_size_0():
    x, y = torch.eye(3), torch.eye(3)
    x[1] = x[0]
    want = kd.rkd_angle(x.double(), y.double(), backend="reference")
    for backend in ("torch", "auto"):
        torch.testing.assert_close(kd.rkd_angle(x, y, backend=backend).double(), want, rtol=1e-6, atol=0)


@on_every_backend
@pytest.mark.parametrize("distance, error", [(1e-2, 1e-6), (1e-4, 1e-6), (1e-6, 1e-4)])
def test_two_samples_close_together_keep_their_direction(kind, backend, distance, error):
    """Augmentations of one image: their squared distance has the digits that float64 leaves of the norms."""
    x, y = torch.randn(9, 5), torch.randn(9, 6)
    x[4] = x[2] + distance * torch.randn(5)
    exact = value_and_gradients(kind, x.double(), y.double(), backend="reference")
    for got, want in zip(value_and_gradients(kind, x, y, backend=backend), exact, strict=True):
        assert (got - want).norm() < error * want.norm()


@every
def test_identical_samples_are_found_whatever_the_blocks_of_columns(kind, monkeypatch):
    x, y = 100 * torch.randn(17, 301) + 1000, torch.randn(17, 40)
    x[[3, 8]] = x[11].clone()
    whole = value_and_gradients(kind, x, y)
    assert (whole[1][[3, 8, 11]].isfinite()).all()
    if kind != "pkt":
        square = pairs.distances(x[None], None, torch.tensor([17.0]).double()).square[0]
        assert (square == 0).sum() == 17 + 6
    monkeypatch.setitem(pairs.COLUMNS, "cpu", 17 * 29)
    for got, want in zip(value_and_gradients(kind, x, y), whole, strict=True):
        assert (got - want).norm() <= 1e-6 * want.norm()


def test_identical_samples_are_found_in_products_that_are_rounded(monkeypatch):
    """A product of matrices may add up equal rows in unequal order."""
    x, exact = torch.randn(1, 9, 300), pairs.gram
    x[0, [2, 7]] = x[0, 4].clone()
    noise = 8 * torch.finfo(torch.float64).eps * torch.randn(9, 9).double()
    monkeypatch.setattr(pairs, "gram", lambda *a: exact(*a) * (1 + noise))
    square = pairs.distances(x, None, torch.tensor([9.0]).double()).square[0]
    assert (square == 0).sum() == 9 + 6


@every
def test_a_group_that_the_mask_leaves_too_small_is_zero_even_with_nan(kind):
    x, y, mask = torch.randn(3, 7, 4), torch.randn(3, 7, 5), torch.ones(3, 7, dtype=torch.bool)
    mask[1, 1:] = False
    x[1], y[1] = math.nan, math.inf
    value, dx, dy = value_and_gradients(kind, x, y, mask=mask)
    assert value[1] == 0 and (dx[1] == 0).all() and (dy[1] == 0).all()
    assert value[[0, 2]].isfinite().all() and (value[[0, 2]] > 0).all()


@every
def test_features_of_any_size_are_within_reach(kind):
    x, y = torch.randn(9, 5), torch.randn(9, 6)
    want = getattr(kd, kind)(x, y)
    for size in (1e-15, 1e15):
        value, dx, _ = value_and_gradients(kind, size * x, y)
        if kind != "pkt" or size > 1:  # eps beside the norm
            torch.testing.assert_close(value, want, rtol=1e-5, atol=0)
        assert dx.isfinite().all()


@pytest.mark.parametrize(
    "x, y, options, error, message",
    [
        ((1, 4), (1, 4), {}, ValueError, "x and y have 1 rows: {} needs at least"),
        ((6, 4), (5, 4), {}, ValueError, "y has 5 rows, x has 6"),
        ((6, 4), (2, 6, 4), {}, ValueError, r"y has shape \(2, 6, 4\), x has \(6, 4\)"),
        ((6, 4), (6, 3), {"mask": torch.ones(5) > 0}, ValueError, r"mask has shape \(5,\)"),
        ((6, 4), (6, 3), {"mask": torch.ones(6)}, TypeError, "mask is torch.float32: pass a bool tensor"),
    ],
)
@every
def test_bad_input_is_refused_with_the_reason(kind, x, y, options, error, message):
    with pytest.raises(error, match=message.format(kind)):
        getattr(kd, kind)(torch.randn(x), torch.randn(y), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_n_n_p_or_n_n_n_numbers_is_made(kind, monkeypatch):
    n, p = 48, 400
    monkeypatch.setitem(torch_impl.TRIPLETS, "cpu", 4 * n * n)
    x, y = torch.randn(1, n, p), torch.randn(1, n, p)
    with LargestTensor() as seen:
        _, W, _ = torch_impl.forward(x, y, None, kind, 1)
        torch_impl.backward(torch.ones(1), x, None, W, kind)
    assert 0 < seen.elements <= max(n * p, 4 * n * n)
