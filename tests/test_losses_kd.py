# SPDX-License-Identifier: Apache-2.0
"""KDLoss against the formula in float64, and what belongs to losses over rows: tokens, labels, normaliser."""

import pytest
import torch
import torch.nn.functional as F
from formulas import logits

import kdkernels as kd
from kdkernels.losses import KDLoss


def kl(a, b):
    return (a * (a / b).log()).sum(-1)


def by_the_book(student, teacher, tau, divergence, beta=0.5, alpha=0.1):
    """P is the teacher: GKD's D_JSD(beta), and DistiLLM's skew KL and skew reverse KL of its alpha."""
    p, q = (teacher / tau).softmax(-1), (student / tau).softmax(-1)
    m = beta * p + (1 - beta) * q
    rows = {
        "forward": kl(p, q),
        "reverse": kl(q, p),
        "jsd": beta * kl(p, m) + (1 - beta) * kl(q, m),
        "skew": kl(p, alpha * p + (1 - alpha) * q),
        "skew_reverse": kl(q, (1 - alpha) * p + alpha * q),
        "tvd": (p - q).abs().sum(-1) / 2,
    }
    return rows[divergence] * tau**2


EVERY = ["forward", "reverse", "jsd", "skew", "skew_reverse", "tvd"]


@pytest.mark.parametrize("divergence", EVERY)
@pytest.mark.parametrize("tau, beta, skew", [(1.0, 0.5, 0.1), (2.5, 0.2, 0.7)])
def test_it_is_tau_squared_times_the_divergence_averaged_over_rows(tau, beta, skew, divergence):
    student, teacher = logits(9, 7)
    rows = by_the_book(student, teacher, tau, divergence, beta, skew)
    how = {"divergence": divergence, "beta": beta, "skew": skew}
    keep = torch.arange(9) % 3 != 1
    for more, call, want in (
        ({}, {}, rows.mean()),
        ({"reduction": "sum"}, {}, rows.sum()),
        ({"scale_tau": False}, {}, rows.mean() / tau**2),
        ({}, {"mask": keep}, rows[keep].mean()),
        ({"scale_tau": False}, {"mask": keep, "normalizer": 4}, rows[keep].sum() / 4 / tau**2),
        ({"weight": 3.0}, {"normalizer": torch.tensor(2.5)}, 3 * rows.sum() / 2.5),
    ):
        got = KDLoss(tau, **how, **more)(student, teacher, **call)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
        (found, expected) = (torch.autograd.grad(v, student, retain_graph=True)[0] for v in (got, want))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


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


@pytest.mark.parametrize("divergence", EVERY)
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


@pytest.mark.parametrize("divergence", EVERY)
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
    bads = ({"tau": 0.0}, {"tau": float("inf")}, {"divergence": "js"}, {"reduction": "batchmean"})
    for bad in (*bads, {"beta": 0.0}, {"beta": 1}, {"skew": 1.5}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            KDLoss(**bad)
    with pytest.raises(TypeError, match="scale_tau is 1: give True or False"):
        KDLoss(scale_tau=1)
    loss = KDLoss()
    with pytest.raises(ValueError, match=r"teacher_logits has shape \(4, 6\).*same rows and classes"):
        loss(student, teacher[:, :6])
    with pytest.raises(ValueError, match=r"labels has shape \(3,\): one entry a row of student_logits is \(4,\)"):
        loss(student, teacher, labels=torch.zeros(3, dtype=torch.long))
    with pytest.raises(TypeError, match="labels is torch.float32: give class indices"):
        loss(student, teacher, labels=torch.zeros(4))
    for bad in (-1, float("nan"), float("inf"), True):
        with pytest.raises(ValueError, match=f"normalizer is {bad}: give a positive number"):
            loss(student, teacher, normalizer=bad)
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
