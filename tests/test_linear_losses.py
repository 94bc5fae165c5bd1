# SPDX-License-Identifier: Apache-2.0
"""Losses other than KDLoss straight from hidden states: what they give for the logits, stored, in float64."""

import warnings

import pytest
import torch
from test_linear_logits import WIDE, H, N, V, heads, stored
from torch._dynamo.testing import CompileCounterWithBackend

import kdkernels as kd
from kdkernels.losses import CMKDLoss, DISTLoss, DKDLoss, STKDLoss


def labels():
    marked = torch.arange(N) % V
    marked[::5] = -100
    return (marked,)


def mixed():
    lam = torch.linspace(0.1, 0.9, N, dtype=torch.float64)
    return (kd.mixup(torch.randn(N, 2), torch.arange(N) % V, lam=lam, generator=torch.Generator().manual_seed(0)),)


CASES = {
    "dkd": (lambda **how: DKDLoss(tau=2.0, **how), labels),
    "dkd nckd": (lambda **how: DKDLoss(alpha=0.0, **how), labels),
    "dkd a temperature a row": (lambda **how: DKDLoss(tau=torch.linspace(0.5, 3, N).double(), **how), labels),
    "stkd": (lambda **how: STKDLoss(mix=(0.7, 0.0, 0.3), **how), mixed),
    "stkd hard": (lambda **how: STKDLoss(alpha=0.0, **how), mixed),
    "dist": (lambda **how: DISTLoss(beta=2.0, gamma=0.0, tau=3.0, **how), tuple),
    "dist, columns too": (lambda **how: DISTLoss(beta=2.0, gamma=0.5, tau=3.0, **how), tuple),
    "dist, columns alone": (lambda **how: DISTLoss(beta=0.0, gamma=2.0, **how), tuple),
    "cmkd": (lambda **how: CMKDLoss(spearman_weight=0.5, **how), tuple),
    "cmkd kl": (lambda **how: CMKDLoss(spearman_share=0.3, regularization="kl", strength=0.2, **how), tuple),
    "cmkd hard": (lambda **how: CMKDLoss(pearson_weight=0.0, hard_target=True, strength=("auto", 2.0), **how), tuple),
}
every = pytest.mark.parametrize("name", CASES)


@every
def test_values_and_gradients_are_those_of_stored_logits(name):
    student, teacher = heads()
    make, more = CASES[name]
    more = more()
    sides = kd.LinearLogits(*student, softcap=20.0), kd.LinearLogits(*teacher)
    logits = stored(*student, softcap=20.0), stored(*teacher)
    mask, weights = torch.arange(N) % 4 != 0, torch.linspace(0, 2, N).double()
    weights = None if "columns" in name else weights  # which weigh rows
    for how, call in (
        ({}, {}),
        (
            {"weight": 3.0},
            {"mask": mask, "token_weights": weights, "vocab": V - 2 if name.startswith(("dist", "cmkd")) else V},
        ),
        ({"reduction": "sum"}, {"mask": mask}),
        ({}, {"normalizer": 7.0}),
    ):
        loss = make(**how)
        want = loss(*logits, *more, **call)
        for pair in (sides, (sides[0], logits[1]), (logits[0], sides[1])):
            got, parts = loss(*pair, *more, **call, chunk=5, return_parts=True)
            alone = loss(*pair, *more, **call, chunk=5)
            torch.testing.assert_close((got, sum(parts.values()), alone), (want,) * 3, rtol=1e-10, atol=0)
            for value in (got, alone):
                found, expected = (torch.autograd.grad(v, student, retain_graph=True) for v in (value, want))
                torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


@every
def test_rows_left_out_may_hold_anything_and_none_is_zero(name):
    student, teacher = heads()
    make, more = CASES[name]
    loss, more, mask = make(), more(), torch.arange(N) % 4 != 0
    want = loss(stored(*student), stored(*teacher), *more, mask=mask).item()
    student[0].data[~mask], teacher[0][~mask] = torch.nan, torch.inf
    sides = kd.LinearLogits(*student), kd.LinearLogits(*teacher)
    for marks, value in ((mask, want), (torch.zeros_like(mask), 0.0)):
        got = loss(*sides, *more, mask=marks)
        assert got.item() == pytest.approx(value, rel=1e-10)
        assert all(t.isfinite().all() for t in torch.autograd.grad(got, student))


@every
def test_one_graph_takes_any_number_of_tokens(name):
    if "row" in name or name.startswith("stkd"):  # of a fixed number of rows
        return
    make, more = CASES[name]
    loss, counter = make(), CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    call = torch.compile(
        lambda s, t, *more: loss(kd.LinearLogits(*s), kd.LinearLogits(*t), *more), fullgraph=True, backend=counter
    )
    for n in (12, 20):
        student, teacher = heads(torch.float32, n)
        marked = [t[:n].contiguous() for t in more()]
        for t in (student[0], teacher[0], *marked):
            torch._dynamo.mark_dynamic(t, 0)
        value, want = (
            call(student, teacher, *marked),
            loss(kd.LinearLogits(*student), kd.LinearLogits(*teacher), *marked),
        )
        torch.testing.assert_close(value, want)
        torch.testing.assert_close(torch.autograd.grad(value, student), torch.autograd.grad(want, student))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("dist")])
def test_the_textbook_gives_the_same_and_second_derivatives(name):
    student, teacher = heads()
    make, more = CASES[name]
    more, mask = more(), torch.arange(N) % 4 != 0
    sides = kd.LinearLogits(*student), kd.LinearLogits(*teacher)
    values = [make(**how)(*sides, *more, mask=mask) for how in ({}, {"backend": "reference"})]
    torch.testing.assert_close(*values, rtol=1e-8, atol=0)
    first = torch.autograd.grad(values[1], student, create_graph=True)
    sum(t.square().sum() for t in first).backward()
    assert student[1].grad.norm() > 0


def test_no_rows_are_zero_with_zero_gradients():
    student, teacher = heads(n=0)
    sides = kd.LinearLogits(*student), kd.LinearLogits(*teacher)
    for loss, more in (
        (DKDLoss(), (torch.zeros(0, dtype=torch.long),)),
        (DISTLoss(gamma=0.0), ()),
        (CMKDLoss(), ()),
    ):
        for t in student:
            t.grad = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss(*sides, *more).backward()
        assert all((t.grad == 0).all() for t in student)


def test_what_needs_all_logits_says_so():
    student, teacher = heads()
    sides = kd.LinearLogits(*student), kd.LinearLogits(*teacher)
    for loss, words in (
        (CMKDLoss(class_weight=1.0), "class_weight=0"),
        (CMKDLoss(spearman_share=lambda y: y[..., 0]), "spearman_share is a function"),
        (DISTLoss(group="world"), "group="),
    ):
        with pytest.raises(ValueError, match=words):
            loss(*sides)
    (batch,) = mixed()
    with pytest.raises(ValueError, match="clean rows"):
        STKDLoss(mix=(0.5, 0.5, 0.0))(*sides, batch, stored(*teacher))
    with pytest.raises(ValueError, match="labels holds"):
        DKDLoss()(*sides, torch.full((N,), V))
    with pytest.raises(TypeError, match="LinearLogits"):
        kd.losses.CKALoss()(*sides)
    assert H != WIDE
