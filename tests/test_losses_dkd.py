# SPDX-License-Identifier: Apache-2.0
"""DKDLoss against the formula of its reference implementation, in float64 and rounding-free where that allows."""

import math

import pytest
import torch
import torch.nn.functional as F

from kdkernels.losses import DKDLoss


def rows(n=9, C=7, scale=3.0):
    torch.manual_seed(0)
    student, teacher = (scale * torch.randn(n, C, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(C, (n,))


def original(student, teacher, labels, alpha, beta, tau):
    """mdistiller's dkd_loss, its masks written as one-hot rows."""
    own = F.one_hot(labels, student.shape[1]).double()

    def two(z):
        p = F.softmax(z / tau, 1)
        return torch.stack([(p * own).sum(1), (p * (1 - own)).sum(1)], 1)

    tckd = F.kl_div(two(student).log(), two(teacher), reduction="sum") * tau**2 / len(labels)
    part = F.log_softmax(student / tau - 1000.0 * own, 1)
    nckd = F.kl_div(part, F.softmax(teacher / tau - 1000.0 * own, 1), reduction="sum") * tau**2 / len(labels)
    return alpha * tckd, beta * nckd


@pytest.mark.parametrize("alpha, beta, tau", [(1.0, 8.0, 4.0), (0.5, 2.0, 1.0), (3.0, 0.25, 2.5)])
def test_it_is_the_reference_implementation(alpha, beta, tau):
    student, teacher, labels = rows()
    total, parts = DKDLoss(alpha, beta, tau)(student, teacher, labels, return_parts=True)
    tckd, nckd = original(student, teacher, labels, alpha, beta, tau)
    torch.testing.assert_close(parts, {"tckd": tckd, "nckd": nckd}, rtol=1e-10, atol=0)
    got, want = (torch.autograd.grad(value, student)[0] for value in (total, tckd + nckd))
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)


def test_its_defaults_are_those_of_the_reference_implementation():
    loss = DKDLoss()
    assert (loss.alpha, loss.beta, loss.tau, loss.warmup) == (1.0, 8.0, 4.0, 20)
    student, teacher, labels = rows()
    torch.testing.assert_close(loss(student, teacher, labels), sum(original(student, teacher, labels, 1, 8, 4)))


def test_with_weights_one_and_p_of_the_teacher_the_parts_are_the_whole_divergence():
    """KL(p_t || p_s) = TCKD + (1 - p_y) NCKD: the identity that the method starts from."""
    student, teacher, labels = rows(1)
    _, parts = DKDLoss(1.0, 1.0, 4.0)(student, teacher, labels, return_parts=True)
    rest = 1 - (teacher / 4).softmax(1)[0, labels[0]]
    whole = F.kl_div((student / 4).log_softmax(1), (teacher / 4).softmax(1), reduction="batchmean") * 16
    torch.testing.assert_close(parts["tckd"] + rest * parts["nckd"], whole, rtol=1e-10, atol=0)


def test_the_warm_up_starts_with_set_epoch_and_ends_at_one():
    student, teacher, labels = rows()
    loss = DKDLoss()
    whole = loss(student, teacher, labels)
    for epoch, share in ((1, 0.05), (10, 0.5), (20, 1.0), (200, 1.0)):
        loss.set_epoch(epoch)
        torch.testing.assert_close(loss(student, teacher, labels), share * whole, rtol=1e-6, atol=0)
    fresh = DKDLoss()
    loss.set_epoch(5)
    fresh.load_state_dict(loss.state_dict())
    assert fresh(student, teacher, labels).equal(loss(student, teacher, labels))
    at_once = DKDLoss(warmup=0)
    at_once.set_epoch(1)
    assert at_once(student, teacher, labels).equal(whole)


def test_a_sure_teacher_in_float32_keeps_the_digits_of_one_minus_p():
    student, teacher, labels = rows(5, 7)
    student, teacher = student.detach().float(), teacher.float()
    teacher[torch.arange(5), labels] += 100  # p_y = 1 - 1e-10 at tau 4: 1 - p_y is 0 in float32
    student[torch.arange(5), labels] += 120
    student.requires_grad_()
    value = DKDLoss()(student, teacher, labels)
    exact = DKDLoss()(student.detach().double(), teacher.double(), labels)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)
    value.backward()
    assert student.grad.isfinite().all() and student.grad.abs().max() > 1e-3


def test_a_term_of_weight_zero_is_dropped():
    student, teacher, labels = rows()
    _, parts = DKDLoss(alpha=0.0)(student, teacher, labels, return_parts=True)
    assert list(parts) == ["nckd"]
    _, parts = DKDLoss(beta=0.0)(student, teacher, labels, return_parts=True)
    assert list(parts) == ["tckd"]


def test_bad_arguments_are_named():
    for bad in ({"alpha": -1}, {"beta": math.nan}, {"tau": 0}, {"warmup": -1}, {"reduction": "none"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            DKDLoss(**bad)
    with pytest.raises(ValueError, match="alpha and beta are both 0"):
        DKDLoss(0, 0)
    student, teacher, labels = rows()
    with pytest.raises(ValueError, match="labels holds a value outside 0 to 6"):
        DKDLoss()(student, teacher, labels + 5)
    with pytest.raises(ValueError, match=r"labels has shape \(8,\)"):
        DKDLoss()(student, teacher, labels[:8])
    with pytest.raises(TypeError, match="labels is torch.float64: give class indices"):
        DKDLoss()(student, teacher, labels.double())
    with pytest.raises(ValueError, match=r"shape \(9, 1\): give \[..., C\] with C >= 2"):
        DKDLoss()(student[:, :1], teacher[:, :1], torch.zeros(9).long())
    with pytest.raises(ValueError, match=r"teacher_logits has shape \(9, 6\).*same rows and classes"):
        DKDLoss()(student, teacher[:, :6], labels)


@pytest.mark.parametrize("tau", [1.0, 100.0])
def test_the_part_of_the_label_keeps_its_digits_at_a_high_temperature(tau):
    student, teacher, labels = torch.randn(40, 10), torch.randn(40, 10), torch.randint(10, (40,))
    p, q = ((side.double() / tau).softmax(1).gather(1, labels[:, None])[:, 0] for side in (teacher, student))
    exact = tau**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    found = DKDLoss(beta=0.0, tau=tau)(student, teacher, labels).double()
    torch.testing.assert_close(found, exact, rtol=2e-5, atol=0)
