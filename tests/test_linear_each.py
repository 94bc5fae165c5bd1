# SPDX-License-Identifier: Apache-2.0
"""KDLoss(reduction="none"): the value of each row, of logits, heads and kept classes, with an upstream of its own."""

import pytest
import torch
from conftest import FAST
from test_linear_logits import N, V, heads, stored
from test_losses_kd import EVERY, by_the_book

import kdkernels as kd
from kdkernels.losses import KDLoss

UPSTREAM = torch.linspace(-1, 2, N).double()
UPSTREAM[4] = 0


def of_rows(divergence, **how):
    return KDLoss(2.0, divergence=divergence, reduction="none", **how)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("divergence", EVERY)
def test_each_row_has_its_value_and_its_gradient(divergence, backend):
    student, teacher = heads()
    rows = by_the_book(stored(*student, softcap=5.0), stored(*teacher), 2.0, divergence)
    weights, mask = torch.rand(N, dtype=torch.float64), torch.rand(N) > 0.3
    pair = kd.LinearLogits(*student, softcap=5.0), kd.LinearLogits(*teacher)
    for call, want in (
        ({}, rows),
        ({"mask": mask}, rows * mask),
        ({"mask": mask, "token_weights": weights}, rows * mask * weights),
    ):
        for sides in (pair, (pair[0], stored(*teacher)), (stored(*student, softcap=5.0), stored(*teacher))):
            got = of_rows(divergence, weight=3.0, backend=backend)(*sides, **call)
            torch.testing.assert_close(got, 3 * want, rtol=1e-10, atol=1e-13)
            found, expected = (
                torch.autograd.grad((v * UPSTREAM).sum(), student, retain_graph=True) for v in (got, 3 * want)
            )
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "ignore"])
def test_kept_classes_give_each_row_too(tail):
    student, teacher = heads()
    kept = kd.TopKLogits(*stored(*teacher).log_softmax(-1).topk(5), tail=tail)
    head, mask = kd.LinearLogits(*student), torch.arange(N) % 3 != 0
    each, total = (KDLoss(1.0, reduction=reduction) for reduction in ("none", "sum"))
    for side in (head, stored(*student)):
        rows = each(side, kept, mask=mask)
        assert rows.shape == (N,) and (rows[~mask] == 0).all()
        value = total(side, kept, mask=mask)
        torch.testing.assert_close(rows.sum(), value)
        found, want = (torch.autograd.grad(v, student, retain_graph=True) for v in (rows.sum(), value))
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)


def test_a_temperature_a_row_rows_of_tokens_and_a_second_pass():
    student, teacher = heads(n=6)
    tau = torch.linspace(0.5, 3, 6).double().reshape(2, 3)
    sides = [kd.LinearLogits(t[0].reshape(2, 3, -1), *t[1:]) for t in (student, teacher)]
    got = KDLoss(tau, reduction="none", scale_tau=False)(*sides, chunk=4)
    want = KDLoss(tau, reduction="none", scale_tau=False)(*(side.logits() for side in sides))
    assert got.shape == (2, 3)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    upstream = UPSTREAM[:6].reshape(2, 3)
    for _ in range(2):
        found = torch.autograd.grad(got, student, upstream, retain_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(want, student, upstream, retain_graph=True))
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(torch.autograd.grad(got.sum(), student, create_graph=True)[0].sum(), student)


def test_rows_left_out_may_hold_anything_and_no_rows_are_none():
    student, teacher = heads()
    mask = torch.arange(N) % 4 != 0
    with torch.no_grad():
        student[0][~mask] = torch.nan
    rows = of_rows("jsd")(kd.LinearLogits(*student), kd.LinearLogits(*teacher), mask=mask)
    assert rows.isfinite().all()
    assert all(t.isfinite().all() for t in torch.autograd.grad(rows.sum(), student))
    assert of_rows("jsd")(torch.randn(0, V), torch.randn(0, V)).shape == (0,)
    with pytest.raises(ValueError, match="normalizer"):
        of_rows("jsd")(torch.randn(2, V), torch.randn(2, V), normalizer=3)
