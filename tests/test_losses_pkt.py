# SPDX-License-Identifier: Apache-2.0
"""PKT against the reference implementation's formula, stated again in float64, and where that gives NaN."""

import pytest
import torch
from formulas import value_and_gradient

import kdkernels as kd
from kdkernels import losses


def published(student, teacher, eps=1e-7):
    """As passalis/probabilistic_kt and RepDistiller have it, for rows that are not 0."""
    shares = []
    for x in (student.flatten(1), teacher.flatten(1)):
        x = x / ((x**2).sum(1, keepdim=True).sqrt() + eps)
        similarity = (x @ x.T + 1) / 2
        shares.append(similarity / similarity.sum(1, keepdim=True))
    p, t = shares
    return torch.mean(t * torch.log((t + eps) / (p + eps)))


@pytest.mark.parametrize("shape", [(12, 7), (9, 3, 4, 4)])
def test_value_and_gradient_are_those_of_the_published_formula(shape):
    student, teacher = torch.randn(shape).double(), torch.randn(shape[0], 11).double()
    want = value_and_gradient(published, student, teacher)
    torch.testing.assert_close(value_and_gradient(losses.PKTLoss(), student, teacher), want, rtol=1e-9, atol=1e-13)


def test_eps_stands_beside_the_norm():
    """Rows as short as eps: it halves their cosines."""
    student, teacher = 1e-7 * torch.randn(12, 3).double(), torch.randn(12, 5).double()
    want = value_and_gradient(published, student, teacher)
    got = value_and_gradient(losses.PKTLoss(), student, teacher)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=0)
    assert (got[0] - losses.PKTLoss()(1e7 * student, teacher)).abs() > 0.1 * got[0]


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_zero_row_is_finite_and_has_cosine_0_to_all(side):
    student, teacher = torch.randn(8, 5), torch.randn(8, 6)
    (student if side == "student" else teacher)[2] = 0
    value, gradient = value_and_gradient(losses.PKTLoss(), student, teacher)
    torch.testing.assert_close(value.double(), published(student.double(), teacher.double()), rtol=1e-6, atol=0)
    assert gradient.isfinite().all() and (gradient[2] == 0).all() == (side == "student")


def test_a_student_close_to_its_teacher_under_a_large_mean_keeps_its_digits():
    teacher = torch.randn(40, 64).relu() + 30
    student = teacher + 1e-3 * torch.randn(40, 64)
    exact = value_and_gradient(losses.PKTLoss(), student.double(), teacher.double())
    value, gradient = value_and_gradient(losses.PKTLoss(), student, teacher)
    assert (value - exact[0]).abs() < 1e-6 * exact[0].abs()
    assert (gradient - exact[1]).norm() < 1e-6 * exact[1].norm()


def test_the_gradient_does_not_lengthen_a_row():
    student, teacher = torch.randn(12, 7), torch.randn(12, 5)
    _, gradient = value_and_gradient(losses.PKTLoss(weight=30000.0), student, teacher)
    assert ((gradient * student).sum(1).abs() < 1e-5 * gradient.norm(dim=1) * student.norm(dim=1)).all()


def test_the_op_gives_the_teachers_gradient_too():
    student, teacher = torch.randn(8, 5).double(), torch.randn(8, 6).double().requires_grad_()
    want = torch.autograd.grad(published(student, teacher), teacher)
    torch.testing.assert_close(torch.autograd.grad(kd.pkt(student, teacher), teacher), want)
