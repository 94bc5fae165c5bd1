# SPDX-License-Identifier: Apache-2.0
"""SPLoss and GramMSELoss are distances of Gram matrices of the batch, on rows of any kind."""

import pytest
import torch
import torch.nn.functional as F
from formulas import keeps_accuracy_near_the_teacher, same_value_and_gradient

import kdkernels as kd
from kdkernels.losses import GramMSELoss, SPLoss


def similarity(student, teacher):
    """The public formula: Gram matrices of flattened features, rows over their L2 norm, mean over n^2."""
    n = len(student)
    K, L = (F.normalize(x.reshape(n, -1) @ x.reshape(n, -1).T) for x in (student, teacher))
    return (K - L).square().sum() / n**2


def gram_distance(student, teacher):
    K, L = (x.reshape(len(x), -1) @ x.reshape(len(x), -1).T for x in (student, teacher))
    return (K - L).square().mean()


BOTH = pytest.mark.parametrize("make, formula", [(SPLoss, similarity), (GramMSELoss, gram_distance)], ids=["sp", "mse"])


def maps(*shape, teacher=None, dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(*shape, dtype=dtype).requires_grad_(), torch.randn(*(teacher or shape), dtype=dtype)


@BOTH
@pytest.mark.parametrize("student, teacher", [((7, 5), (7, 9)), ((7, 3, 4, 4), (7, 6, 2, 2)), ((1, 5), (1, 5))])
def test_it_is_the_public_formula_on_flattened_features(make, formula, student, teacher):
    student, teacher = maps(*student, teacher=teacher)
    same_value_and_gradient(make()(student, teacher), formula(student, teacher), student)


@BOTH
def test_it_does_not_change_with_a_rotation_of_either_side(make, formula):
    student, teacher = maps(9, 5, teacher=(9, 7))
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    torch.testing.assert_close(make()(student @ rotation, teacher), make()(student, teacher), rtol=1e-9, atol=0)


def test_similarity_does_not_change_with_the_scale_of_either_side():
    student, teacher = maps(9, 5, teacher=(9, 7))
    torch.testing.assert_close(SPLoss()(1e3 * student, teacher / 70), SPLoss()(student, teacher), rtol=1e-9, atol=0)


def test_a_single_sample_has_nothing_to_compare():
    student, teacher = maps(1, 5)
    value = SPLoss()(student, teacher)
    assert value.abs() < 1e-15 and torch.autograd.grad(value, student)[0].abs().max() < 1e-14


def test_a_zero_row_gets_a_small_gradient_where_the_public_code_gives_it_billions():
    student, teacher = maps(7, 5)
    student = student.detach().clone()
    student[2] = 0
    student.requires_grad_()
    value, expected = SPLoss()(student, teacher), similarity(student, teacher)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    got, wanted = (torch.autograd.grad(v, student)[0] for v in (value, expected))
    # of its own row of the matrix none: the direction of a zero row is not defined
    assert wanted[2].abs().max() > 1e9 and got[2].abs().max() < 0.1
    rest = [0, 1, 3, 4, 5, 6]
    torch.testing.assert_close(got[rest], wanted[rest], rtol=1e-9, atol=1e-14)
    zero = torch.zeros(7, 5, requires_grad=True)
    value = SPLoss()(zero, teacher)
    # the teacher's rows have norm 1 each
    assert value.item() == pytest.approx(1 / 7) and (torch.autograd.grad(value, zero)[0] == 0).all()


@BOTH
@pytest.mark.parametrize("n, p", [(64, 256), (64, 12)])
def test_a_student_near_its_teacher_keeps_its_relative_accuracy(make, formula, n, p):
    # an expansion |K|^2 + |L|^2 - 2 <K, L> in float32 is off by 5e-2
    keeps_accuracy_near_the_teacher(make(), formula, (n, p), gradient=1e-3)


@pytest.mark.parametrize("scale", [1e-16, 1e-8, 1e8, 1e16])
def test_rows_of_any_scale_keep_their_accuracy_in_float32(scale):
    student, teacher = maps(32, 12)
    x = (scale * student).detach().float().requires_grad_()
    wide = x.detach().double().requires_grad_()
    got = torch.autograd.grad(SPLoss()(x, teacher.float()), x)[0].double()
    wanted = torch.autograd.grad(SPLoss(backend="reference")(wide, teacher), wide)[0]
    assert (got - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("small", [0, 1])
def test_a_side_whose_products_underflow_counts_as_it_does_at_any_scale(small):
    found = []
    for factor in (1e-22, 1):
        sides = [side.detach().float() for side in maps(32, 12)]
        sides[small] *= factor
        x, y = sides[0].requires_grad_(), sides[1]
        value = SPLoss()(x, y)
        found.append((value.item(), torch.autograd.grad(value, x)[0].double() * (factor if small == 0 else 1)))
    (value, gradient), (at_one, gradient_at_one) = found
    assert value == pytest.approx(at_one, rel=1e-6)
    assert (gradient - gradient_at_one).norm() < 1e-5 * gradient_at_one.norm()


def test_one_level_on_each_side_is_kd_gram_mse():
    student, teacher = maps(6, 5)
    torch.testing.assert_close(GramMSELoss()(student, teacher), kd.gram_mse(student, teacher))
    torch.testing.assert_close(SPLoss(weight=3000.0)(student, teacher) / 3000, SPLoss()(student, teacher))
