# SPDX-License-Identifier: Apache-2.0
"""KDLoss against the formula in float64, and what belongs to losses over rows: tokens, labels, normaliser."""

import pytest
import torch
import torch.nn.functional as F
from formulas import logits

import kdkernels as kd
from kdkernels.losses import KDLoss


def by_the_book(student, teacher, tau, divergence):
    p, q = (teacher / tau).softmax(-1), (student / tau).softmax(-1)
    m = (p + q) / 2
    rows = {
        "forward": (p * (p / q).log()).sum(-1),
        "reverse": (q * (q / p).log()).sum(-1),
        "jsd": ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2,
    }
    return rows[divergence] * tau**2


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_it_is_tau_squared_times_the_divergence_averaged_over_rows(tau, divergence):
    student, teacher = logits(9, 7)
    rows = by_the_book(student, teacher, tau, divergence)
    loss = KDLoss(tau, divergence=divergence)
    torch.testing.assert_close(loss(student, teacher), rows.mean(), rtol=1e-12, atol=0)
    summed = KDLoss(tau, divergence=divergence, reduction="sum")
    torch.testing.assert_close(summed(student, teacher), rows.sum(), rtol=1e-12, atol=0)


def test_forward_is_what_distillation_scripts_write_with_kl_div():
    student, teacher = logits(9, 7)
    script = F.kl_div(F.log_softmax(student / 4, 1), F.softmax(teacher / 4, 1), reduction="batchmean") * 4**2
    torch.testing.assert_close(KDLoss(tau=4.0)(student, teacher), script, rtol=1e-12, atol=0)


def test_jsd_does_not_change_when_the_sides_are_swapped_and_is_at_most_log_2():
    student, teacher = logits(9, 7, scale=50.0)
    loss = KDLoss(tau=1.0, divergence="jsd")
    torch.testing.assert_close(loss(student, teacher), loss(teacher, student), rtol=1e-12, atol=0)
    assert 0 < loss(student, teacher) <= torch.tensor(2.0).log()


@pytest.mark.parametrize("tau", [1.0, 4.0])
@pytest.mark.parametrize("classes", [10, 152_000])
def test_jsd_of_equal_logits_is_zero_and_of_near_ones_right(classes, tau):
    student = torch.randn(4, classes)
    teacher = student + 1e-3 * torch.randn(4, classes)
    loss = KDLoss(tau, divergence="jsd")
    assert loss(student, student) == 0
    exact = [side.double().requires_grad_() for side in (student, teacher)]
    rows = by_the_book(*exact, tau, "jsd").mean()
    value, student = loss(student.requires_grad_(), teacher), student
    torch.testing.assert_close(value.double(), rows, rtol=2e-4, atol=0)
    found, expected = torch.autograd.grad(value, student)[0], torch.autograd.grad(rows, exact[0])[0]
    assert (found - expected).norm() < 5e-4 * expected.norm()


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_a_class_closed_on_both_sides_adds_nothing_and_leaves_the_gradient_finite(divergence):
    student, teacher = logits(9, 7)
    closed = [torch.cat([side.detach(), torch.full((9, 1), -torch.inf)], 1) for side in (student, teacher)]
    closed[0].requires_grad_()
    loss = KDLoss(divergence=divergence)
    value, expected = loss(*closed), loss(student, teacher)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(value, closed[0])
    torch.testing.assert_close(grad[:, :7], torch.autograd.grad(expected, student)[0], rtol=1e-9, atol=1e-12)
    assert (grad[:, 7] == 0).all()


def test_a_class_the_teacher_wants_and_the_student_excludes_is_infinitely_far():
    student, teacher = logits(2, 3)
    excluded = student.detach().clone()
    excluded[0, 1] = -torch.inf
    assert KDLoss()(excluded, teacher) == torch.inf


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_logits_of_a_thousand_stay_finite_in_float16(divergence):
    student, teacher = (1000 * torch.randn(5, 7) for _ in range(2))
    student = student.half().requires_grad_()
    value = KDLoss(tau=1.0, divergence=divergence)(student, teacher.half())
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()


def test_a_float64_normalizer_leaves_the_dtype_of_the_loss():
    student, teacher = (side.float() for side in logits(4, 7))
    assert KDLoss()(student, teacher, normalizer=torch.tensor(4.0, dtype=torch.float64)).dtype == torch.float32


def test_bad_arguments_are_named():
    student, teacher = logits(4, 7)
    for bad in ({"tau": 0.0}, {"tau": float("inf")}, {"divergence": "js"}, {"reduction": "batchmean"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            KDLoss(**bad)
    loss = KDLoss()
    with pytest.raises(ValueError, match=r"teacher_logits has shape \(4, 6\).*same rows and classes"):
        loss(student, teacher[:, :6])
    with pytest.raises(ValueError, match=r"labels has shape \(3,\): one entry a row of student_logits is \(4,\)"):
        loss(student, teacher, labels=torch.zeros(3, dtype=torch.long))
    with pytest.raises(TypeError, match="labels is torch.float32: give class indices"):
        loss(student, teacher, labels=torch.zeros(4))
    with pytest.raises(ValueError, match="normalizer is 0: give a positive number"):
        loss(student, teacher, normalizer=0)
    with pytest.raises(ValueError, match=r"normalizer has shape \(2,\)"):
        loss(student, teacher, normalizer=torch.ones(2))
    with pytest.raises(ValueError, match="reduction='mean'"):
        KDLoss(reduction="sum")(student, teacher, normalizer=4)


def test_logits_without_classes_are_refused():
    with pytest.raises(ValueError, match="student_logits is empty"):
        KDLoss()(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match="student_logits has shape"):
        KDLoss()(torch.zeros(3, 0), torch.zeros(3, 0))


def test_values_are_looked_at_under_debug_checks_before_the_op_runs():
    student, teacher = torch.zeros(3, 4), torch.tensor([[0.0, float("nan"), 0, 0]]).expand(3, 4)
    assert KDLoss()(student, teacher).isnan()
    with kd.debug_checks(), pytest.raises(ValueError, match="teacher_logits holds NaN or infinity"):
        KDLoss()(student, teacher)
