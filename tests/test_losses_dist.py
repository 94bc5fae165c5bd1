# SPDX-License-Identifier: Apache-2.0
"""DISTLoss against the formula of its reference implementation in float64, and its degenerate rows and columns."""

import math

import numpy as np
import pytest
import torch
from formulas import logits

from kdkernels.losses import DISTLoss


def original(z_s, z_t, beta, gamma, tau):
    """The module of the authors' repository."""

    def cosine(a, b, eps=1e-8):
        return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + eps)

    def relation(y_s, y_t):
        return 1 - cosine(y_s - y_s.mean(1).unsqueeze(1), y_t - y_t.mean(1).unsqueeze(1)).mean()

    y_s, y_t = ((z / tau).softmax(dim=1) for z in (z_s, z_t))
    return beta * tau**2 * relation(y_s, y_t), gamma * tau**2 * relation(y_s.transpose(0, 1), y_t.transpose(0, 1))


@pytest.mark.parametrize("beta, gamma, tau", [(1.0, 1.0, 1.0), (2.0, 2.0, 4.0), (0.5, 3.0, 2.5)])
def test_it_is_the_reference_implementation(beta, gamma, tau):
    student, teacher = logits(9, 7)
    total, parts = DISTLoss(beta, gamma, tau)(student, teacher, return_parts=True)
    rows, columns = original(student, teacher, beta, gamma, tau)
    torch.testing.assert_close(parts, {"rows": rows, "columns": columns}, rtol=1e-11, atol=0)
    got, want = (torch.autograd.grad(value, student)[0] for value in (total, rows + columns))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-13)


def test_its_defaults_are_those_of_the_reference_implementation():
    loss = DISTLoss()
    assert (loss.beta, loss.gamma, loss.tau) == (1.0, 1.0, 1.0)


def test_its_correlations_are_numpys():
    student, teacher = logits(9, 7)
    _, parts = DISTLoss()(student, teacher, return_parts=True)
    s, t = student.detach().softmax(1).numpy(), teacher.softmax(1).numpy()
    rows = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(s, t, strict=True)])
    columns = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(s.T, t.T, strict=True)])
    # the 1e-8 beside the norms is felt where probabilities are small
    assert parts["rows"].item() == pytest.approx(rows, rel=1e-6)
    assert parts["columns"].item() == pytest.approx(columns, rel=1e-4)


def test_a_shift_of_the_logits_of_a_row_changes_nothing():
    student, teacher = logits(9, 7)
    moved = DISTLoss()(student + 5 * torch.randn(9, 1), teacher - 100)
    torch.testing.assert_close(moved, DISTLoss()(student, teacher), rtol=1e-10, atol=0)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_equal_probabilities_correlate_zero_with_a_finite_gradient(value):
    student, teacher = logits(5, 8)
    flat = student.detach().clone()
    flat[2] = value
    flat.requires_grad_()
    _, parts = DISTLoss(reduction="sum")(flat, teacher, return_parts=True)
    _, others = DISTLoss(reduction="sum")(flat, teacher, mask=torch.arange(5) != 2, return_parts=True)
    torch.testing.assert_close(parts["rows"] - others["rows"], torch.tensor(1.0).double(), rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(sum(parts.values()), flat)
    assert grad.isfinite().all()


def test_a_batch_of_one_sample_repeated_has_no_columns_to_correlate():
    student, teacher = logits(1, 7)
    same = student.detach().expand(4, 7).clone().requires_grad_()
    total, parts = DISTLoss()(same, teacher.expand(4, 7), return_parts=True)
    torch.testing.assert_close(parts["columns"], torch.tensor(1.0).double(), rtol=1e-6, atol=0)
    assert torch.autograd.grad(total, same)[0].isfinite().all()


def test_a_batch_of_one_row_keeps_its_row_term():
    student, teacher = logits(1, 7)
    with pytest.warns(UserWarning, match="a batch of 1 rows for its column term and needs 2: it gives 0"):
        total, parts = DISTLoss()(student, teacher, return_parts=True)
    (rows, _) = original(student, teacher, 1.0, 1.0, 1.0)
    torch.testing.assert_close(total, rows, rtol=1e-11, atol=0)
    got, want = (torch.autograd.grad(value, student)[0] for value in (total, rows))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-13)
    assert parts["columns"] == 0


def test_a_mask_that_leaves_one_row_leaves_no_column_term():
    student, teacher = logits(5, 7)
    _, parts = DISTLoss()(student, teacher, mask=torch.arange(5) == 2, return_parts=True)
    assert parts["columns"] == 0 and parts["rows"] > 0


def test_a_normalizer_replaces_the_number_of_rows_in_the_row_term_alone():
    student, teacher = logits(8, 7)
    _, plain = DISTLoss()(student, teacher, return_parts=True)
    _, halved = DISTLoss()(student, teacher, normalizer=16, return_parts=True)
    torch.testing.assert_close(halved["rows"] * 2, plain["rows"], rtol=1e-12, atol=0)
    assert halved["columns"].equal(plain["columns"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_logits_of_ten_thousand_stay_finite(dtype):
    student, teacher = ((1e4 * torch.randn(6, 7)).to(dtype) for _ in range(2))
    student.requires_grad_()
    value = DISTLoss()(student, teacher)
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()


def test_bad_arguments_are_named():
    for bad in ({"beta": -1}, {"gamma": math.inf}, {"tau": -2.0}, {"reduction": "none"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            DISTLoss(**bad)
    with pytest.raises(ValueError, match="beta and gamma are both 0"):
        DISTLoss(0, 0)
    student, teacher = logits(4, 7)
    with pytest.raises(ValueError, match=r"teacher_logits has shape \(4, 6\).*same rows and classes"):
        DISTLoss()(student, teacher[:, :6])
    with pytest.raises(ValueError, match=r"student_logits has shape \(7,\): give \[..., C\]"):
        DISTLoss()(student[0], teacher[0])
