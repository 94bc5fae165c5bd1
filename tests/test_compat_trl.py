# SPDX-License-Identifier: Apache-2.0
"""TRL's loss by its definition, in every reduction and at both ends of beta."""

import pytest
import torch

from kdkernels import LinearLogits, TopKLogits
from kdkernels.compat.trl import generalized_jsd_loss


def by_the_paper(student, teacher, labels=None, beta=0.5, temperature=1.0, reduction="batchmean", items=None):
    """D(beta) of arXiv 2306.13649, entry by entry; at 0 and 1 the two KL divergences, as TRL has them."""
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    m = beta * p + (1 - beta) * q
    if beta in (0, 1):
        entries = p * (p / q).log() if beta == 0 else q * (q / p).log()
    else:
        entries = beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()
    kept = entries if labels is None else entries[labels != -100]
    if items is not None:
        return kept.sum() / items
    rows = len(student) if labels is None else len(kept)
    return {"batchmean": kept.sum() / rows, "sum": kept.sum(), "mean": kept.mean()}[reduction]


def batch():
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(2, 3, 5, 11, dtype=torch.float64)
    labels = torch.randint(11, (3, 5))
    labels[0, :2] = labels[2, 4] = -100
    return student.requires_grad_(), teacher, labels


@pytest.mark.parametrize("beta", [0, 0.0, 0.1, 0.5, 0.9, 1])
@pytest.mark.parametrize("labelled", [True, False])
def test_values_and_gradients_are_the_definitions(beta, labelled):
    student, teacher, labels = batch()
    for how in (
        {},
        {"temperature": 2.5, "reduction": "sum"},
        {"reduction": "mean"},
        {"items": 7},
        {"items": torch.tensor(9), "temperature": 0.5},
    ):
        given = (student, teacher, labels if labelled else None)
        want = by_the_paper(*given, beta=beta, **how)
        how = {("num_items_in_batch" if name == "items" else name): value for name, value in how.items()}
        found = generalized_jsd_loss(*given, beta=beta, **how)
        torch.testing.assert_close(found, want, rtol=1e-10, atol=0)
        grads = (torch.autograd.grad(value, student)[0] for value in (found, want))
        torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-12)


def test_its_arguments_come_in_the_originals_order():
    student, teacher, labels = batch()
    found = generalized_jsd_loss(student, teacher, labels, 0.3, 2.0, "sum", 4)
    torch.testing.assert_close(found, by_the_paper(student, teacher, labels, 0.3, 2.0, "sum", 4))


def test_nothing_that_counts_is_zero_in_every_reduction():
    student, teacher, labels = batch()
    for how in ({}, {"reduction": "sum"}, {"reduction": "mean"}, {"num_items_in_batch": 0}):
        value = generalized_jsd_loss(student, teacher, torch.full_like(labels, -100), **how)
        assert value == 0 and (torch.autograd.grad(value, student)[0] == 0).all()


def test_heads_and_stored_teachers_take_the_place_of_logits():
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True), torch.randn(11, 6).double()
    teacher, labels = batch()[1:]
    want = generalized_jsd_loss(hidden @ weight.mT, teacher, labels)
    torch.testing.assert_close(generalized_jsd_loss(LinearLogits(hidden, weight), teacher, labels), want)
    every = TopKLogits(*teacher.log_softmax(-1).topk(11))
    torch.testing.assert_close(generalized_jsd_loss(hidden @ weight.mT, every, labels), want)


def test_what_the_original_takes_and_this_cannot_is_refused():
    student, teacher, _ = batch()
    for how, text in (
        ({"reduction": "none"}, "reduction is 'none': 'batchmean' and 'sum' and 'mean' are computed here"),
        ({"beta": 1.5}, r"beta is 1.5: give a number in \(0, 1\)"),
        ({"temperature": 0.0}, "tau is 0.0"),
    ):
        with pytest.raises(ValueError, match=text):
            generalized_jsd_loss(student, teacher, **how)
