# SPDX-License-Identifier: Apache-2.0
"""Correlation congruence against the formulas of the two libraries, stated again in float64."""

import math

import pytest
import torch
from formulas import value_and_gradient

from kdkernels import losses, native
from kdkernels.losses import cc


def neighbour(student, teacher):
    """RepDistiller's."""
    apart = (student - teacher).abs()
    return sum((apart[i] * apart[i + 1]).sum() for i in range(len(apart) - 1)) / (len(apart) - 1)


def taylor(student, teacher, gamma=0.4, order=2):
    """torchdistill's, entry by entry of a power series."""
    K, L = (
        math.exp(-2 * gamma) * sum((2 * gamma) ** p / math.factorial(p) * (x @ x.T) ** p for p in range(order + 1))
        for x in (student, teacher)
    )
    return torch.dist(K, L, 2) / len(student) ** 2


@pytest.mark.parametrize(
    "module, formula",
    [
        (losses.CCLoss(), neighbour),
        (losses.CCLoss("taylor"), taylor),
        (losses.CCLoss("taylor", gamma=0.7, order=5), lambda s, t: taylor(s, t, 0.7, 5)),
    ],
    ids=["neighbour", "taylor", "order 5"],
)
def test_value_and_gradient_are_those_of_the_librarys_formula(module, formula):
    student, teacher = torch.randn(11, 5).double(), torch.randn(11, 5).double()
    want = value_and_gradient(formula, student, teacher)
    torch.testing.assert_close(value_and_gradient(module, student, teacher), want, rtol=1e-11, atol=1e-13)


def test_on_unit_rows_a_long_series_is_the_rbf_kernel():
    x, y = (torch.nn.functional.normalize(torch.randn(9, p).double()) for p in (4, 6))
    rbf = [torch.exp(-0.4 * torch.cdist(side, side) ** 2) for side in (x, y)]
    got = losses.CCLoss("taylor", order=20, normalize=True)(5 * x, 0.1 * y)
    torch.testing.assert_close(got, torch.dist(*rbf) / 81, rtol=1e-9, atol=0)


def test_a_student_that_is_its_teacher_has_gradient_zero():
    teacher = torch.randn(9, 4)
    for module in (losses.CCLoss(), losses.CCLoss("taylor"), losses.CCLoss("taylor", normalize=True)):
        value, gradient = value_and_gradient(module, teacher, teacher)
        assert value == 0 and (gradient == 0).all()


def test_a_zero_row_has_a_finite_gradient():
    student, teacher = torch.randn(9, 4), torch.randn(9, 4)
    student[3] = 0
    value, gradient = value_and_gradient(losses.CCLoss("taylor", normalize=True), student, teacher)
    assert value.isfinite() and gradient.isfinite().all() and (gradient[3] == 0).all()


def test_a_student_close_to_its_teacher_keeps_its_digits():
    teacher = torch.randn(40, 64) / 8
    student = teacher + 1e-4 * torch.randn(40, 64)
    for module in (losses.CCLoss(), losses.CCLoss("taylor")):
        exact = value_and_gradient(module, student.double(), teacher.double())
        value, gradient = value_and_gradient(module, student, teacher)
        assert (value - exact[0]).abs() < 1e-6 * exact[0]
        assert (gradient - exact[1]).norm() < 1e-6 * exact[1].norm()


def test_the_neighbour_variant_needs_one_width():
    with pytest.raises(ValueError, match=r"teacher_features\[1\] has rows of 5 features.*of 4"):
        losses.CCLoss()([torch.randn(6, 3), torch.randn(6, 4)], [torch.randn(6, 3), torch.randn(6, 5)])
    assert losses.CCLoss("taylor")(torch.randn(6, 4), torch.randn(6, 5)).isfinite()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"variant": "rbf"}, "variant is 'rbf': give one of"),
        ({"gamma": 0}, "gamma is 0: give a number > 0"),
        ({"order": 0}, "order is 0: give at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        losses.CCLoss(**options)


why = native.lack("cpu", cc.NATIVE)


@pytest.mark.native
@pytest.mark.skipif(why is not None, reason=why or "loaded")
@pytest.mark.parametrize("shape", [(2, 1), (3, 15), (7, 16), (5, 33), (33, 1100), (2, 2, 5), (3, 9, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_pass_is_the_composition_in_value_gradient_and_second_derivative(shape, dtype):
    student, teacher = torch.randn(*shape, 2)[..., 0].to(dtype), torch.randn(shape)
    student[..., 1, 0] = teacher[..., 1, 0] = 3.0  # a difference of 0 has gradient 0
    factor = torch.randn(shape[:-2])
    exact = student.detach().double().requires_grad_()
    want = cc.neighbours((exact - teacher.double()).abs(), None)
    (gradient,) = torch.autograd.grad((want * factor).sum(), exact, create_graph=True)
    x = student.detach().float().requires_grad_()
    for a, b in ((x, teacher), (x.mT.contiguous().mT, teacher.flip(0).flip(0))):
        got = cc.Neighbours.apply(a, b)
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
        (dx,) = torch.autograd.grad((got * factor).sum(), x, create_graph=True)
        torch.testing.assert_close(dx.double(), gradient, rtol=1e-6, atol=1e-7)
        second = [
            torch.autograd.grad((d * d).sum(), at, retain_graph=True)[0] for d, at in ((dx, x), (gradient, exact))
        ]
        torch.testing.assert_close(second[0].double(), second[1], rtol=1e-5, atol=1e-6)
    assert torch.equal(cc.Neighbours.apply(x.detach(), teacher), cc.Neighbours.apply(x, teacher))


@pytest.mark.native
@pytest.mark.skipif(why is not None, reason=why or "loaded")
def test_a_loss_of_float32_rows_takes_the_compiled_pass(monkeypatch):
    student, teacher = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    want = losses.CCLoss()(student, teacher)
    assert "Neighbours" in type(want.grad_fn.next_functions[0][0]).__name__
    monkeypatch.setattr(cc, "runs_compiled", lambda *how: False)
    torch.testing.assert_close(losses.CCLoss()(student, teacher), want)


@pytest.mark.native
@pytest.mark.skipif(why is not None, reason=why or "loaded")
def test_the_compiled_pass_shows_nan_and_refuses_what_it_cannot_read():
    x, y = torch.randn(1, 6, 20), torch.randn(1, 6, 20)
    x[0, 2, 17] = math.nan
    value, slope = torch.ops.kdkernels.neighbour_rows(x, y, True)
    nan = slope.isnan().nonzero()
    assert value.isnan() and nan.tolist() == [[0, 1, 17], [0, 2, 17], [0, 3, 17]]
    x[0, 2, 17], x[0, 5, 3] = 0, math.inf
    assert torch.ops.kdkernels.neighbour_rows(x, y, False)[0] == math.inf
    for bad, message in (
        ((x.double(), y), "x must be float32 rows"),
        ((x, y[..., :3]), r"y is \[1, 6, 3\] and x is \[1, 6, 20\]"),
        ((x[:, :1], y[:, :1]), "x has 1 rows: a neighbour needs 2"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.kdkernels.neighbour_rows(*bad, True)
