# SPDX-License-Identifier: Apache-2.0
"""Losses whose bandwidth follows from the student's features: shrinking gains nothing, and nothing else is changed."""

import pytest
import torch

import kdkernels as kd
from kdkernels import losses
from kdkernels.losses.means import spread

RULES = {
    "median": kd.RBF(),
    "mean": kd.RBF("mean"),
    "laplacian": kd.Laplacian(("mean", 0.7)),
    "one": (kd.RBF(), "linear"),
}
LOSSES = {
    "cka": losses.CKALoss,
    "cka biased": lambda kernel: losses.CKALoss(kernel, unbiased=False),
    "rcka": lambda kernel: losses.RCKALoss(kernel=kernel),
    "rcka centred": lambda kernel: losses.RCKALoss(kernel=kernel, center=True, row_normalize=False),
    "nystrom": lambda kernel: losses.NystromTransferLoss(5, kernel=kernel),
    "pcka": lambda kernel: losses.PCKALoss(kernel=kernel, transposed=0.5),
}


def sides(name):
    shape = (2, 3, 20, 33) if name == "pcka" else (11, 6)
    student, teacher = (torch.randn(shape, dtype=torch.float64) + shift for shift in (2, 0.5))
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_has_no_part_along_the_scale_that_the_value_does_not_see(name, rule):
    student, teacher = sides(name)
    loss = LOSSES[name](RULES[rule])
    value = loss(student, teacher)
    torch.testing.assert_close(loss(student / 7, teacher), value, rtol=1e-9, atol=1e-12)
    (gradient,) = torch.autograd.grad(value, student)
    along = (gradient * student).sum().abs() / (gradient.norm() * student.norm())
    assert gradient.norm() > 1e-4 and along < 1e-8


@pytest.mark.parametrize("name", LOSSES)
def test_under_a_mean_rule_the_gradient_is_the_derivative(name):
    student, teacher = sides(name)
    if name == "pcka":  # one direction of many numbers
        way = torch.randn_like(student)
        student, way = torch.zeros((), dtype=torch.float64, requires_grad=True), (student.detach(), way)
        loss = LOSSES[name](kd.RBF("mean"))
        assert torch.autograd.gradcheck(lambda step: loss(way[0] + step * way[1], teacher), student)
    else:
        loss = LOSSES[name](kd.RBF("mean"))
        assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student)


def test_class_means_of_the_student_are_scaled_with_it():
    student, teacher = sides("nystrom")
    loss = losses.NystromTransferLoss(centers=kd.ClassCenters(3, 6, 6), kernel=kd.RBF("mean"))
    loss(student, teacher, torch.arange(11) % 3)
    loss.end_epoch()
    z = loss.eval().centers.student_centers.double(), loss.centers.teacher_centers.double()
    value = loss(student, teacher)
    torch.testing.assert_close(value, kd.nystrom_transfer(student, teacher, *z, kernel=kd.RBF("mean")))
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student, rtol=1e-6, atol=1e-8)


COLLAPSE = {
    "nystrom": losses.NystromTransferLoss,
    "cka rbf": lambda: losses.CKALoss("rbf"),
    "rcka rbf": lambda: losses.RCKALoss(kernel="rbf", class_weight=0),
    "mmd": lambda: losses.MMDLoss(),
    "mmd transfer": lambda: losses.MMDLoss.preset("transfer"),
    **{name: getattr(losses, name) for name in ("CKALoss", "SPLoss", "PKTLoss", "GramMSELoss")},
}


@pytest.mark.parametrize("name", COLLAPSE)
def test_two_hundred_steps_do_not_draw_the_students_rows_together(name):
    torch.manual_seed(0)
    inputs = torch.randn(64, 64)
    width = 16 if name.startswith("mmd") else 128
    teacher = torch.nn.functional.normalize(inputs @ torch.randn(64, width) + 3, dim=1)
    net, loss = torch.nn.Linear(64, 16), COLLAPSE[name]()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)

    def rows():  # an offset gives them a common direction to begin with
        return torch.nn.functional.normalize(net(inputs + 1.75), dim=1)

    def mean_cosine(rows):
        return ((rows.sum(0).square().sum() - len(rows)) / (len(rows) * (len(rows) - 1))).item()

    before = mean_cosine(rows())
    for _ in range(200):
        optimizer.zero_grad()
        loss(rows(), teacher).backward()
        optimizer.step()
    assert mean_cosine(rows()) < before - 0.05


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_spread_of_features_of_any_scale_is_known(scale):
    rows = torch.randn(9, 4, dtype=torch.float64) + 3
    (mean, apart, size), centred = spread((rows * scale).float(), None), rows - rows.mean(0)
    torch.testing.assert_close(mean / scale, rows.mean(0, keepdim=True).float())
    torch.testing.assert_close(apart / scale, centred.float())
    torch.testing.assert_close(size[0, 0] / scale, centred.square().sum(1).mean().sqrt(), rtol=1e-6, atol=0)
    assert spread(torch.ones(3, 2), None)[-1] == 1
