# SPDX-License-Identifier: Apache-2.0
"""RKD against the reference implementations' formulas, stated again in float64, and on what they do not define."""

import pytest
import torch
import torch.nn.functional as F
from formulas import value_and_gradient

import kdkernels as kd
from kdkernels import losses


def published_distances(x):
    """Distances as lenscloth/RKD and RepDistiller have them, over the mean of those above 0."""
    square = (x * x).sum(1)
    d = (square[:, None] + square - 2 * x @ x.T).clamp(min=1e-12).sqrt() * (1 - torch.eye(len(x), dtype=x.dtype))
    return d / d[d > 0].mean()


def published_angles(x):
    e = F.normalize(x[None] - x[:, None], dim=2)
    return e @ e.transpose(1, 2)


def published(student, teacher, of):
    return F.smooth_l1_loss(of(student.flatten(1)), of(teacher.flatten(1)))


FORMULAS = {losses.RKDDistanceLoss: published_distances, losses.RKDAngleLoss: published_angles}
both = pytest.mark.parametrize("module", FORMULAS, ids=lambda module: module.__name__)


@both
@pytest.mark.parametrize("shape", [(12, 7), (9, 3, 4, 4)])
def test_value_and_gradient_are_those_of_the_published_formula(module, shape):
    student, teacher = torch.randn(shape).double(), torch.randn(shape[0], 2, 11).double().flatten(1)
    want = value_and_gradient(lambda s, t: published(s, t, FORMULAS[module]), student, teacher)
    got = value_and_gradient(module(), student, teacher)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_the_joint_loss_is_25_distances_and_50_angles():
    student, teacher = torch.randn(12, 7).double(), torch.randn(12, 5).double()
    total, parts = losses.RKDLoss()(student, teacher, return_parts=True)
    want = {"rkd_distance": 25 * published(student, teacher, published_distances)}
    want["rkd_angle"] = 50 * published(student, teacher, published_angles)
    torch.testing.assert_close(parts, want, rtol=1e-9, atol=0)
    torch.testing.assert_close(total, sum(want.values()), rtol=1e-9, atol=0)
    assert losses.RKDLoss(angle=0)(student, teacher).equal(parts["rkd_distance"])
    assert list(losses.RKDLoss(distance=0)(student, teacher, return_parts=True)[1]) == ["rkd_angle"]


def test_factors_that_leave_nothing_are_refused():
    with pytest.raises(ValueError, match="distance and angle are both 0"):
        losses.RKDLoss(0, 0)
    with pytest.raises(ValueError, match="angle is -1: give a number >= 0"):
        losses.RKDLoss(angle=-1)


def test_two_rows_have_a_distance_and_no_angle():
    student, teacher = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5)
    assert losses.RKDLoss(angle=0)(student, teacher) == 0  # the one distance is its own mean
    with pytest.warns(UserWarning, match="a batch of 2 rows and needs 3"):
        assert losses.RKDLoss()(student, teacher) == 0


@both
def test_features_far_from_zero_and_a_student_close_to_its_teacher_keep_their_digits(module):
    teacher = torch.randn(40, 64).relu() + 30
    student = teacher + 1e-3 * torch.randn(40, 64)
    exact = value_and_gradient(module(), student.double(), teacher.double())
    value, gradient = value_and_gradient(module(), student, teacher)
    assert (value - exact[0]).abs() < 1e-6 * exact[0]
    assert (gradient - exact[1]).norm() < 1e-6 * exact[1].norm()


@both
def test_a_shift_that_the_features_hold_exactly_changes_no_digit(module):
    """Integers below 2^24: centred they are the same numbers, raw their products would fill float64."""
    student, teacher = (torch.randint(2, (9, 2000)).float() for _ in range(2))
    want = value_and_gradient(module(), student, teacher)
    got = value_and_gradient(module(), student + 2.0**23, teacher - 2.0**23)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


@both
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_identical_samples_have_finite_gradients(module, side):
    student, teacher = torch.randn(8, 5), torch.randn(8, 6)
    for features, name in ((student, "student"), (teacher, "teacher")):
        if side in (name, "both"):
            features[3] = features[5]
    value, gradient = value_and_gradient(module(), student, teacher)
    assert value.isfinite() and gradient.isfinite().all() and gradient.norm() > 0
    alike = value_and_gradient(module(), torch.ones(8, 5), teacher)
    assert alike[0].isfinite() and (alike[1] == 0).all()


def test_the_public_ops_are_what_the_modules_compute():
    student, teacher = torch.randn(9, 5), torch.randn(9, 6)
    assert losses.RKDDistanceLoss()(student, teacher).equal(kd.rkd_distance(student, teacher))
    assert losses.RKDAngleLoss()(student, teacher).equal(kd.rkd_angle(student, teacher))
