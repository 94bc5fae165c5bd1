# SPDX-License-Identifier: Apache-2.0
"""A teacher of k classes beside a student of hidden states and a head: the same numbers, and no array of all logits."""

import math

import pytest
import torch
from test_compare_memory import counted_peak
from test_topk import CASES, TAILS, by_the_book, sides

import kdkernels as kd
from kdkernels.logits import linear_driver
from kdkernels.losses import KDLoss


def head(rows, width=6, classes=11, dtype=torch.float64):
    """Hidden states and a head that learn."""
    torch.manual_seed(2)
    hidden, weight = torch.randn(*rows, width, dtype=dtype), torch.randn(classes, width, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize("tail, divergence", CASES)
@pytest.mark.parametrize("k", [4, 11])
def test_a_student_that_is_hidden_states_and_a_head_gives_the_same(tail, divergence, k):
    _, values, ids = sides(3, 5, 11, k=k, tau=2.5)
    hidden, weight = head((3, 5))
    teacher = kd.TopKLogits(values, ids, tail=tail, tau=2.5)
    weights = torch.rand(3, 5, dtype=torch.float64).round(decimals=1)
    weights[0, 1] = 0
    for tau, how, call in (
        (2.5, {}, {}),
        (2.5, {"scale_tau": False, "weight": 2.0}, {"token_weights": weights, "normalizer": 3.0, "chunk": 4}),
        (torch.rand(3, 5) + 0.5, {"reduction": "sum", "scale_tau": False}, {"mask": weights > 0.3}),
    ):
        if isinstance(tau, torch.Tensor) and tail != "renormalize":
            continue
        loss = KDLoss(tau, divergence=divergence, **how)
        found, want = loss(kd.LinearLogits(hidden, weight), teacher, **call), loss(hidden @ weight.mT, teacher, **call)
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-14)
        ours, theirs = (torch.autograd.grad(value, (hidden, weight)) for value in (found, want))
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)
        if how:
            with torch.no_grad():
                torch.testing.assert_close(loss(kd.LinearLogits(hidden, weight), teacher, **call), want)
    textbook = KDLoss(2.5, divergence=divergence, backend="reference")
    torch.testing.assert_close(
        textbook(kd.LinearLogits(hidden, weight), teacher),
        KDLoss(2.5, divergence=divergence)(hidden @ weight.mT, teacher),
    )


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("compacted", [True, False])  # False: as on a GPU, where nobody asks how many rows count
def test_a_row_of_hidden_states_that_does_not_count_may_hold_anything(tail, compacted, monkeypatch):
    if not compacted:
        monkeypatch.setattr(linear_driver, "_counted", lambda weights: None)
    _, values, ids = sides(6, 11)
    hidden, weight = head((6,))
    keep = torch.tensor([True, False, True, True, False, True])
    dirty = torch.where(keep[:, None], hidden.detach(), math.nan).requires_grad_()
    padded = kd.TopKLogits(torch.where(keep[:, None], values, math.nan), torch.where(keep[:, None], ids, 0), tail=tail)
    loss = KDLoss(tau=1.0)
    found = loss(kd.LinearLogits(dirty, weight), padded, mask=keep)
    want = loss(hidden @ weight.mT, kd.TopKLogits(values, ids, tail=tail), mask=keep)
    torch.testing.assert_close(found, want)
    ours = torch.autograd.grad(found, (dirty, weight))
    torch.testing.assert_close(ours, torch.autograd.grad(want, (hidden, weight)))
    assert (ours[0][~keep] == 0).all()


@pytest.mark.parametrize("tail", TAILS)
def test_no_array_of_rows_by_classes_is_made_of_hidden_states(tail):
    n, classes, width, k, rows = 256, 8000, 8, 16, 16
    hidden, weight = head((n,), width, classes, torch.float32)
    values, ids = torch.randn(n, classes).log_softmax(-1).topk(k)
    teacher, loss = kd.TopKLogits(values, ids, tail=tail), KDLoss(tau=1.0)

    def step():
        loss(kd.LinearLogits(hidden, weight), teacher, chunk=rows).backward()

    chunk, own = rows * classes * 4, (classes * width + 20 * n * (k + width)) * 4
    assert counted_peak(step) <= 5 * chunk + own < n * classes * 4


def test_a_compiled_step_from_hidden_states_is_one_graph():
    torch._dynamo.reset()
    loss, (hidden, weight) = KDLoss(tau=1.0), head((6,))
    _, values, ids = sides(6, 11)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(hidden, weight, values, ids):
        return loss(kd.LinearLogits(hidden, weight), kd.TopKLogits(values, ids))

    found, want = step(hidden, weight, values, ids), by_the_book(hidden @ weight.mT, values, ids, "bucket").mean()
    torch.testing.assert_close(found, want)
    ours, theirs = (torch.autograd.grad(value, (hidden, weight)) for value in (found, want))
    torch.testing.assert_close(ours, theirs)
