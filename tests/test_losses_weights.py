# SPDX-License-Identifier: Apache-2.0
"""Weights, temperatures and vocabularies of rows in the losses on logits, against the rows one by one in float64."""

import math

import labelled
import pytest
import torch

import kdkernels as kd
from kdkernels import losses

LOGITS = {
    "kd": losses.KDLoss,
    "kd reverse": lambda **how: losses.KDLoss(divergence="reverse", **how),
    "kd jsd": lambda **how: losses.KDLoss(divergence="jsd", **how),
    "kd textbook": lambda **how: losses.KDLoss(backend="reference", **how),
    "dkd": labelled.DKDLoss,
    "stkd": lambda **how: labelled.STKDLoss(mix=(0.25, 0.5, 0.25), **how),
    "cmkd": losses.CMKDLoss,
    "dist": lambda **how: losses.DISTLoss(gamma=0.0, **how),
}
every = pytest.mark.parametrize("name", LOGITS)
WEIGHTS = torch.tensor([0.5, 0.0, 2.0, 1.0, 0.0, 3.0, 0.25])  # one a row, two of which do not count


def sides(*shape):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, *shape, dtype=torch.float64)
    return student.requires_grad_(), teacher


def agree(found, expected, student):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    grads = [torch.autograd.grad(value, student, retain_graph=True)[0] for value in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


@every
def test_a_weighted_mean_is_that_of_the_rows_one_by_one_whatever_those_without_weight_hold(name):
    loss, (student, teacher) = LOGITS[name](), sides(7, 5)
    ones = [loss(student[i : i + 1], teacher[i : i + 1]) for i in range(7)]
    total = sum(w * one for w, one in zip(WEIGHTS.tolist(), ones, strict=True))
    dirty = torch.where(WEIGHTS[:, None] == 0, torch.nan, student)
    more = LOGITS[name](reduction="sum", weight=2.0)
    for found, expected in (
        (loss(dirty, teacher, token_weights=WEIGHTS), total / WEIGHTS.sum()),
        (loss(dirty, teacher, token_weights=WEIGHTS.double().requires_grad_(), normalizer=4), total / 4),
        (more(dirty, teacher, token_weights=WEIGHTS.half()), 2 * total),
    ):
        agree(found, expected, student)
    keep = torch.arange(7) != 2
    found = loss(dirty, teacher, token_weights=WEIGHTS, mask=keep)
    agree(found, (total - 2 * ones[2]) / (WEIGHTS.sum() - 2), student)
    leaf = dirty.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, teacher, token_weights=WEIGHTS), leaf)
    assert (gradient[WEIGHTS == 0] == 0).all() and gradient[WEIGHTS > 0].isfinite().all()
    parts = loss(student, teacher, token_weights=WEIGHTS, return_parts=True)[1]
    torch.testing.assert_close(sum(parts.values()), total / WEIGHTS.sum(), rtol=1e-10, atol=0)


@every
def test_rows_of_which_none_counts_are_zero_with_gradient_zero(name):
    loss, (student, teacher) = LOGITS[name](), sides(7, 5)
    dirty = torch.full_like(student, torch.nan).requires_grad_()
    for normalizer in (None, 0, torch.tensor(0)):
        value = loss(dirty, teacher, token_weights=torch.zeros(7), normalizer=normalizer)
        assert value == 0 and (torch.autograd.grad(value, dirty)[0] == 0).all()


@every
def test_weights_that_are_none_are_refused(name):
    loss, (student, teacher) = LOGITS[name](), sides(7, 5)
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="token_weights holds a value that is negative, infinite or NaN"):
            loss(student, teacher, token_weights=WEIGHTS.index_fill(0, torch.tensor(3), bad))
    with pytest.raises(ValueError, match=r"token_weights has shape \(7, 1\): one number a row .* is \(7,\)"):
        loss(student, teacher, token_weights=WEIGHTS[:, None])
    with pytest.raises(TypeError, match="token_weights is torch.int64: convert it to a float dtype"):
        loss(student, teacher, token_weights=WEIGHTS.long())
    with pytest.raises(ValueError, match="token_weights is on meta, student_logits on cpu"):
        loss(student, teacher, token_weights=WEIGHTS.to("meta"))


def test_statistics_of_the_batch_take_no_weights_of_rows():
    for loss, off in ((losses.DISTLoss(), "gamma=0"), (losses.CMKDLoss(class_weight=1.0), "class_weight=0")):
        with pytest.raises(ValueError, match=f"one statistic of the batch: make the loss with {off}"):
            loss(*sides(7, 5), token_weights=WEIGHTS)


@every
def test_vocab_is_the_classes_that_both_sides_have(name):
    loss, (student, teacher) = LOGITS[name](), sides(7, 9)
    with torch.no_grad():  # what pads a vocabulary
        student[:, 5:], teacher[:, 6:], teacher[:, 5] = math.nan, 0.2, 0.1  # no labels
    agree(loss(student, teacher[:, :6], vocab=5), loss(student[:, :5], teacher[:, :5]), student)
    with pytest.raises(ValueError, match=r"teacher_logits has shape \(7, 6\), .* vocab=n takes the first n classes"):
        loss(student, teacher[:, :6])
    with pytest.raises(ValueError, match="vocab is 8, teacher_logits has 6 classes"):
        loss(student, teacher[:, :6], vocab=8)
    for bad, error in ((0, ValueError), (5.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="vocab is a?"):
            loss(student, teacher, vocab=bad)


@pytest.mark.parametrize("name", ["kd", "kd reverse", "kd jsd", "kd textbook", "dkd"])
@pytest.mark.parametrize("how", [{}, {"token_weights": torch.rand(2, 3), "normalizer": 5.0}])
def test_a_temperature_may_be_a_tensor_of_one_number_or_one_a_row(name, how):
    student, teacher = sides(2, 3, 6)
    weights = how.get("token_weights", torch.ones(2, 3)).flatten()
    taus = torch.tensor([[0.5, 1.0, 2.0], [3.0, 4.0, 7.0]])
    rows = zip(student.flatten(0, 1).split(1), teacher.flatten(0, 1).split(1), taus.flatten().tolist(), strict=True)
    make = LOGITS[name]
    ones = torch.stack([make(tau=tau)(s, t) for s, t, tau in rows])
    if name == "dkd":

        def call(loss):
            return losses.DKDLoss.forward(loss, student, teacher, teacher.argmax(-1), **how)
    else:

        def call(loss):
            return loss(student, teacher, **how)

    agree(call(make(tau=taus)), (ones * weights).sum() / how.get("normalizer", 6), student)
    agree(call(make(tau=torch.tensor(3.0))), call(make(tau=3.0)), student)
    changed = make(tau=torch.tensor(1.0))
    changed.tau.fill_(3)
    agree(call(changed), call(make(tau=3.0)), student)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "tvd"])
def test_without_tau_squared_each_row_is_divided_by_its_own(divergence):
    student, teacher = sides(3, 6)
    taus = torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64)
    how = {"divergence": divergence}
    rows = zip(student[:, None], teacher[:, None], taus.tolist(), strict=True)
    ones = [losses.KDLoss(t, **how)(s, y) / t**2 for s, y, t in rows]
    for options in ({}, {"mask": torch.tensor([True, False, True])}):
        counted = ones if not options else [ones[0], ones[2]]
        found = losses.KDLoss(taus, scale_tau=False, **how)(student, teacher, **options)
        agree(found, sum(counted) / len(counted), student)


def test_a_temperature_held_as_a_tensor_moves_with_the_module_and_is_checked():
    student, teacher = sides(3, 6)
    loss = losses.KDLoss(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert loss.half().tau.dtype == torch.float64 and not loss.state_dict().keys() - {"weight"}
    assert "tau=[1, 2, 3]" in repr(loss) and loss.to("meta").tau.is_meta
    with pytest.raises(
        ValueError, match=r"tau has shape \(3,\): give one number, or one a row of student_logits, \(2,\)"
    ):
        losses.KDLoss(torch.ones(3))(student[:2], teacher[:2])
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="tau holds a value that is no positive number"):
            losses.KDLoss(torch.tensor(bad))
    with pytest.raises(TypeError, match="tau is torch.int64"):
        losses.DKDLoss(tau=torch.tensor(2))


def test_rows_with_temperatures_of_their_own_in_the_op():
    student, teacher = sides(4, 6)
    taus = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    rows = kd.distillation_kl(student, teacher, tau=taus, reduction="none")
    one_by_one = [kd.distillation_kl(s, t, tau=x) for s, t, x in zip(student, teacher, taus.tolist(), strict=True)]
    agree(rows.sum(), sum(one_by_one), student)
    torch.testing.assert_close(rows, torch.stack(one_by_one))


@pytest.mark.parametrize("name", ["kd", "kd jsd", "cmkd"])
def test_weights_and_vocabularies_are_part_of_one_graph(name):
    torch._dynamo.reset()
    loss, (student, teacher) = LOGITS[name](), sides(7, 9)
    how = {"token_weights": WEIGHTS, "vocab": 5, "normalizer": torch.tensor(3.0)}
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(student, teacher[:, :6], **how)
    agree(found, loss(student, teacher[:, :6], **how), student)
