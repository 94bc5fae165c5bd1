# SPDX-License-Identifier: Apache-2.0
"""Weights, backends and normalisers that losses take, refuse, or divide by, asked of each."""

import inspect
import warnings

import pytest
import torch
from test_losses_contract import CASES, N, sides

from kdkernels import losses


@pytest.mark.parametrize(
    "weight, error",
    [
        ("big", TypeError), ("1", TypeError), (True, TypeError), (-1.0, ValueError), (float("nan"), ValueError),
        ([1.0, 2.0], ValueError),
    ],
)  # fmt: skip
def test_a_weight_that_is_no_finite_number_is_refused(weight, error):
    for make in (losses.KDLoss, losses.CKALoss, losses.RCKALoss, losses.CMKDLoss):
        with pytest.raises(error, match="weight"):
            make(weight=weight)


@pytest.mark.parametrize("name", CASES)
def test_an_unknown_backend_is_refused_when_the_loss_is_made(name):
    loss = CASES[name].make()
    loss = getattr(loss, "loss", loss)
    if "backend" in inspect.signature(type(loss).__init__).parameters:
        assert loss.backend == "auto"
    with pytest.raises(ValueError, match=r"backend is 'tritn': give one of \('auto', 'reference'"):
        loss.backend = "tritn"


@pytest.mark.parametrize("name", CASES)
def test_whether_parts_are_returned_is_true_or_false(name):
    loss, (student, teacher) = CASES[name].make(), sides(CASES[name])
    for value in (1, None, "no"):
        with pytest.raises(TypeError, match=f"return_parts is {value!r}: give True or False"):
            loss(student, teacher, return_parts=value)


@pytest.mark.parametrize(
    "name", [n for n in CASES if "normalizer" in inspect.signature(CASES[n].make().forward).parameters]
)
def test_nothing_counted_over_a_normalizer_of_zero_is_zero_with_gradient_zero(name):
    case = CASES[name]
    student, teacher = sides(case)
    for zero in (torch.tensor(0), torch.tensor([0.0])):
        value = case.make()(student, teacher, mask=torch.zeros(N, dtype=torch.bool), normalizer=zero)
        assert value == 0 and (torch.autograd.grad(value, student)[0] == 0).all()
    counted = case.make()(student, teacher, normalizer=torch.tensor(0))
    assert counted > 1e30  # rows over nothing are no mean


@pytest.mark.parametrize("name, how", [*((name, "eager") for name in CASES), ("kd", "compiled"), ("cka", "compiled")])
def test_a_teacher_that_asks_for_the_gradient_of_a_student_that_does_not_is_told_once(name, how):
    case = CASES[name]
    loss, (student, teacher) = case.make(), sides(case)
    kind = type(getattr(loss, "loss", loss)).__name__

    def found(student, teacher):
        torch._dynamo.reset()
        call = loss if how == "eager" else torch.compile(loss, backend="eager", fullgraph=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                call(student, teacher)
        return [str(w.message) for w in caught if "requires grad" in str(w.message)]

    assert found(student, teacher) == found(student, teacher.requires_grad_()) == []
    with torch.no_grad():
        assert found(student.detach(), teacher) == []
    (text,) = found(student.detach(), teacher)
    assert f"teacher_{case.what}" in text and f"{kind} has a gradient for the student only" in text
