# SPDX-License-Identifier: Apache-2.0
"""Liger's fused losses by their definition, at both ends of beta."""

import math

import pytest
import torch
from test_compat_trl import by_the_paper

from kdkernels.compat import liger

N, V = 9, 11


def batch(dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    student = [torch.randn(N, 5, dtype=dtype), torch.randn(V, 5, dtype=dtype)] + [torch.randn(V, dtype=dtype)] * bias
    teacher = [torch.randn(N, 7, dtype=dtype), torch.randn(V, 7, dtype=dtype)] + [torch.randn(V, dtype=dtype)] * bias
    labels = torch.randint(V, (N,))
    labels[[1, 4]] = -100
    return [t.requires_grad_() for t in student], teacher, labels


def defined(student, teacher, labels, hard=0.5, soft=0.5, beta=0.5, tau=1.0, cosine=False):
    """(total, soft, hard), means over the labels that count."""
    z, y = (side[0] @ side[1].mT + sum(side[2:]) for side in (student, teacher))
    if cosine:
        kept = labels != -100
        of_soft = beta * (1 - torch.cosine_similarity(z[kept], y[kept], dim=-1)).mean()
    else:
        of_soft = by_the_paper(z, y, labels, beta, tau)
    of_hard = torch.nn.functional.cross_entropy(z, labels)
    return hard * of_hard + soft * of_soft, of_soft, of_hard


def agree(found, want, tensors):
    torch.testing.assert_close(found, want, rtol=1e-9, atol=0)
    ours, theirs = (
        torch.autograd.grad(value, tensors, retain_graph=True, allow_unused=True) for value in (found, want)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 1])
@pytest.mark.parametrize("cosine", [False, True])
def test_hard_and_soft_terms_are_their_definition(cosine, beta, bias):
    student, teacher, labels = batch(bias=bias)
    make = liger.LigerFusedLinearCosineSimilarityLoss if cosine else liger.LigerFusedLinearJSDLoss
    given = (*student[:2], *teacher[:2], labels, *(side[2] for side in (student, teacher) if bias))
    for hard, soft, tau, chunk in ((0.5, 0.5, 1.0, 1024), (0.0, 1.0, 2.0, 2), (0.3, 0.0, 1.0, 1024)):
        want = defined(student, teacher, labels, hard, soft, beta, tau, cosine)
        loss = make(hard, soft, beta, -100, tau, True, chunk)
        agree(loss(*given), want[0], student)
        three = make(hard, soft, beta, temperature=tau, return_soft_hard_loss=True)(*given)
        agree(three[0], want[0], student)
        torch.testing.assert_close(three[1:], want[1:], rtol=1e-9, atol=0)
        assert not three[1].requires_grad and not three[2].requires_grad


@pytest.mark.parametrize("beta", [0, 0.2, 1])
def test_without_a_hard_term_and_of_log_probabilities(beta):
    student, teacher, labels = batch(bias=False)
    z, y = (side[0] @ side[1].mT for side in (student, teacher))
    for kept in (labels, None):
        want = by_the_paper(z, y, kept, beta, 2.0)
        agree(liger.LigerFusedLinearJSD(beta, temperature=2.0)(*student, *teacher, kept), want, student)
        logs = z.log_softmax(-1), y.log_softmax(-1)
        agree(liger.LigerJSD(beta)(*logs, kept), by_the_paper(z, y, kept, beta), student)


def test_a_token_that_does_not_count_may_hold_nan_and_none_that_does_is_zero():
    student, teacher, labels = batch()
    want = defined(student, teacher, labels)[0]
    dirty = student[0].detach().masked_fill((labels == -100)[:, None], math.nan).requires_grad_()
    given = student[1], *teacher[:2]
    found = liger.LigerFusedLinearJSDLoss()(dirty, *given, labels, student[2], teacher[2])
    torch.testing.assert_close(found, want)
    gradient, of_weight = torch.autograd.grad(found, (dirty, student[1]))
    assert (gradient[labels == -100] == 0).all() and of_weight.isfinite().all()
    nothing = liger.LigerFusedLinearJSDLoss()(dirty, *given, torch.full_like(labels, -100))
    assert nothing == 0 and (torch.autograd.grad(nothing, dirty)[0] == 0).all()


def test_what_the_original_pads_or_takes_in_silence_is_refused():
    student, teacher, labels = batch(bias=False)
    loss = liger.LigerFusedLinearJSDLoss()
    with pytest.raises(ValueError, match=r"teacher_weight has 12 classes, student_weight 11: cut both.*weight\[:n\]"):
        loss(*student, teacher[0], torch.randn(12, 7), labels)
    with pytest.raises(ValueError, match=r"teacher_input has shape \(8, 7\), student_input \(9, 5\)"):
        loss(*student, teacher[0][:8], teacher[1], labels)
    with pytest.raises(ValueError, match="true_labels holds 11: classes are 0 to 10"):
        loss(*student, *teacher, labels.masked_fill(labels == -100, V))
    for how, text in (({"beta": 1.5}, "beta is 1.5"), ({"temperature": 0.0}, "tau is 0.0")):
        with pytest.raises(ValueError, match=text):
            liger.LigerFusedLinearJSDLoss(**how)
