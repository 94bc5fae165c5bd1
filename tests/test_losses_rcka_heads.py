# SPDX-License-Identifier: Apache-2.0
"""RCKALoss of kd.LinearLogits: moments of hidden states and heads give what the logits, stored, give."""

import pytest
import torch
from test_compare_memory import counted_peak

import kdkernels as kd
from kdkernels.losses import RCKALoss, moments

CASES = {
    "published": {},
    "rows": {"class_weight": 0.0},
    "classes": {"row_weight": 0.0},
    "cka of logits": {"class_weight": 0.0, "row_normalize": False, "center": True},
    "centred both ways": {"row_normalize": False, "center": True},
    "unbiased": {"row_normalize": False, "center": True, "unbiased": True, "class_weight": 0.0},  # by logits
    "a kernel": {"kernel": kd.RBF(20.0), "class_weight": 0.0},
}


def heads(N=40, C=50, dtype=torch.float64, bias=True, rank=6):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    student = draw(N, 6), draw(C, rank) @ draw(rank, 6), *([draw(C)] if bias else [])
    teacher = draw(N, 9), draw(C, 9), *([draw(C)] if bias else [])
    return [t.requires_grad_() for t in student], list(teacher)


def both(loss, student, teacher, **call):
    """Value and gradients of the student, straight from the heads and of stored logits."""
    made = []
    for sides in (
        [kd.LinearLogits(*student), kd.LinearLogits(*teacher)],
        [kd.LinearLogits(*student).logits(), kd.LinearLogits(*teacher).logits()],
    ):
        value = loss(*sides, **call)
        made.append((value, torch.autograd.grad(value, student)))
    return made


@pytest.mark.parametrize("rank", [6, 3])  # of a rank-deficient head no factor of W'W has an inverse
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_are_those_of_stored_logits(name, bias, rank):
    student, teacher = heads(bias=bias, rank=rank)
    loss = RCKALoss(**CASES[name])
    for mask in (None, torch.arange(40) % 4 != 0):
        (value, found), (want, expected) = both(loss, student, teacher, mask=mask)
        torch.testing.assert_close(value, want, rtol=1e-11, atol=0)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)


def test_logits_are_made_where_they_are_smaller_or_moments_are_not_all(monkeypatch):
    made = []
    monkeypatch.setattr(kd.LinearLogits, "logits", lambda self: made.append(1) or _logits(self))
    student, teacher = heads()
    pair = kd.LinearLogits(*student), kd.LinearLogits(*teacher)
    RCKALoss()(*pair)
    RCKALoss()(kd.LinearLogits(student[0].reshape(5, 8, 6), *student[1:]), pair[1].of(
        teacher[0].reshape(5, 8, 9), *teacher[1:]), rows="tokens")  # fmt: skip
    assert not made
    few = [kd.LinearLogits(t[0][:5], *t[1:]) for t in (student, teacher)]
    capped = kd.LinearLogits(*student, softcap=5.0)
    for sides, loss in ((few, RCKALoss()), ((capped, pair[1]), RCKALoss()), ((pair[0], _logits(pair[1])), RCKALoss())):
        before = len(made)
        stored = [_logits(side) if isinstance(side, kd.LinearLogits) else side for side in sides]
        torch.testing.assert_close(loss(*sides), loss(*stored), rtol=1e-11, atol=0)
        assert len(made) > before


_logits = kd.LinearLogits.logits


def test_rows_left_out_may_hold_anything():
    student, teacher = heads()
    mask, loss = torch.arange(40) % 4 != 0, RCKALoss()
    want = both(loss, student, teacher, mask=mask)[1]
    with torch.no_grad():
        student[0][~mask], teacher[0][~mask] = torch.nan, torch.inf
    value = loss(kd.LinearLogits(*student), kd.LinearLogits(*teacher), mask=mask)
    torch.testing.assert_close((value, torch.autograd.grad(value, student)), want, rtol=1e-8, atol=1e-11)
    nothing = loss(kd.LinearLogits(*student), kd.LinearLogits(*teacher), mask=torch.zeros_like(mask))
    assert nothing.item() == 0 and all((g == 0).all() for g in torch.autograd.grad(nothing, student))


def test_no_array_of_rows_by_classes_exists_and_float32_keeps_its_digits():
    student, teacher = heads(1500, 3000, torch.float32)
    sides = kd.LinearLogits(*student), kd.LinearLogits(*teacher)
    exact = [[t.detach().double().requires_grad_(t.requires_grad) for t in side] for side in (student, teacher)]
    value = RCKALoss()(*sides)
    (want, expected) = both(RCKALoss(), *exact)[1]
    torch.testing.assert_close(value.double(), want, rtol=1e-6, atol=0)
    for got, g in zip(torch.autograd.grad(value, student), expected, strict=True):
        assert (got.double() - g).norm() < 1e-5 * g.norm()
    peak = counted_peak(lambda: RCKALoss()(*sides).backward())
    assert peak < 1500 * 3000 * 4 / 4
    assert moments.pays(*sides)


def test_slices_of_a_vocabulary_are_refused():
    student, teacher = heads()
    with pytest.raises(ValueError, match="no slices"):
        RCKALoss()(kd.LinearLogits(*student, group="world"), kd.LinearLogits(*teacher))
