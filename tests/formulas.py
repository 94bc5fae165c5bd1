# SPDX-License-Identifier: Apache-2.0
"""A loss against its formula: features to compare, value and gradient together, and the case where both sides agree."""

import torch


def maps(student, teacher, dtype=torch.float64):
    """Features of these shapes, the student's with a gradient."""
    torch.manual_seed(0)
    return torch.randn(*student, dtype=dtype).requires_grad_(), torch.randn(*teacher, dtype=dtype)


def logits(*shape, scale=3.0):
    """Both sides alike, the student's with a gradient."""
    torch.manual_seed(0)
    student, teacher = (scale * torch.randn(*shape, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher


def value_and_gradient(f, student, teacher):
    student = student.detach().requires_grad_()
    value = f(student, teacher)
    return value.detach(), torch.autograd.grad(value, student)[0]


def assert_near(got, want, eps=2e-6):
    """Tensor by tensor, relative to the largest number of each."""
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b.double()).abs().max() <= eps * b.double().abs().max()


def same_value_and_gradient(value, expected, students, rtol=1e-9):
    """Gradients relative to their largest element; `students` is a tensor or a list of them."""
    torch.testing.assert_close(value, expected, rtol=rtol, atol=0)
    for got, wanted in zip(*(torch.autograd.grad(v, students) for v in (value, expected)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=rtol, atol=1e-14 + rtol * wanted.abs().max().item())


def keeps_accuracy_near_the_teacher(loss, formula, *shapes, value=1e-3, gradient=2e-3):
    """Student = teacher + 1e-3 noise in float32: an expansion into squares would leave no digit of the difference.

    One shape: features; several: a list of levels. formula(student, teacher) is the float64 value.
    """
    torch.manual_seed(0)
    teacher = [torch.randn(*shape) for shape in shapes]
    student = [(t + 1e-3 * torch.randn_like(t)).requires_grad_() for t in teacher]
    exact = [s.detach().double().requires_grad_() for s in student]
    sides = (student, teacher), (exact, [t.double() for t in teacher])
    if len(shapes) == 1:
        sides = [[side[0] for side in pair] for pair in sides]
    found, expected = loss(*sides[0]), formula(*sides[1])
    torch.testing.assert_close(found.double(), expected, rtol=value, atol=0)
    for got, wanted in zip(torch.autograd.grad(found, student), torch.autograd.grad(expected, exact), strict=True):
        assert (got.double() - wanted).norm() < gradient * wanted.norm()
