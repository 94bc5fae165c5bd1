# SPDX-License-Identifier: Apache-2.0
"""CMKDLoss against the formula in float64, on NumPy rows and an oracle of its own; and what its options mean."""

import math

import minmax
import numpy as np
import pytest
import torch
from conftest import needs_native

from kdkernels.losses import CMKDLoss


def logits(*shape, scale=3.0):
    torch.manual_seed(0)
    student, teacher = (scale * torch.randn(*shape, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher + 0.5 * student.detach()


def z_score(x):
    return (x - x.mean()) / x.std()


def by_the_book(student, teacher, tau=4.0, regularization="l2", c=1.0, strength=None, hard_target=False, share=None):
    """(Pearson part, Spearman part) of each row: NumPy, soft ranks by the min-max formula."""
    pearson, spearman = [], []
    for s, t in zip(student.detach().numpy(), teacher.numpy(), strict=True):
        n = len(s)
        p = np.exp(t / tau) / np.exp(t / tau).sum()
        w_s = -(p * np.log(p)).sum() / math.log(n) if share is None else share
        z_s, z_t = z_score(s), z_score(t)
        eps = c * math.sqrt(12) / n if strength is None else strength
        r_s = minmax.soft_rank(z_s, regularization, eps)
        r_t = z_t.argsort().argsort() + 1.0 if hard_target else minmax.soft_rank(z_t, regularization, eps)
        pearson.append((1 - w_s) * (1 - np.corrcoef(s, t)[0, 1]))
        spearman.append(w_s * (1 - np.corrcoef(r_s, r_t)[0, 1]))
    return np.array(pearson), np.array(spearman)


def check(loss, student, teacher, **book):
    total, parts = loss(student, teacher, return_parts=True)
    pearson, spearman = by_the_book(student, teacher, **book)
    expected = [pearson.mean(), spearman.mean()]
    torch.testing.assert_close([parts["pearson"].item(), parts["spearman"].item()], expected, rtol=1e-9, atol=1e-12)
    assert total.item() == pytest.approx(sum(expected), rel=1e-9)
    return expected


@pytest.mark.parametrize("regularization", ["l2", "kl"])
@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_it_is_pearson_and_spearman_mixed_by_the_entropy_of_the_teacher(regularization, tau):
    student, teacher = logits(9, 12)
    check(CMKDLoss(weight_tau=tau, regularization=regularization), student, teacher,
          tau=tau, regularization=regularization)  # fmt: skip


@pytest.mark.parametrize("given, book", [("auto", {}), (("auto", 0.3), {"c": 0.3}), (0.2, {"strength": 0.2})])
def test_the_strength_is_relative_to_the_spread_of_the_row(given, book):
    student, teacher = logits(9, 12)
    loss = CMKDLoss(strength=given)
    before = check(loss, student, teacher, **book)
    with torch.no_grad():
        student.mul_(7).add_(100)
    moved = check(loss, student, teacher, **book)
    assert before == pytest.approx(moved, rel=1e-9)


def test_hard_targets_and_a_fixed_share_are_what_they_say():
    student, teacher = logits(9, 12)
    check(CMKDLoss(hard_target=True), student, teacher, hard_target=True)
    check(CMKDLoss(spearman_share=0.25), student, teacher, share=0.25)
    check(CMKDLoss(spearman_share=lambda t: torch.full(t.shape[:-1], 0.25)), student, teacher, share=0.25)


def test_a_strength_beyond_every_gap_turns_spearman_into_pearson():
    student, teacher = logits(9, 12)
    loss = CMKDLoss(spearman_share=0.5, strength=50.0)
    _, parts = loss(student, teacher, return_parts=True)
    torch.testing.assert_close(parts["spearman"], parts["pearson"], rtol=1e-9, atol=0)


def test_with_hard_ranks_it_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    student, teacher = logits(9, 12)
    _, parts = CMKDLoss(spearman_share=1, strength=1e-9)(student, teacher, return_parts=True)
    rows = zip(student.detach().numpy(), teacher.numpy(), strict=True)
    expected = np.mean([1 - stats.spearmanr(s, t).statistic for s, t in rows])
    assert parts["spearman"].item() == pytest.approx(expected, rel=1e-9) and parts["pearson"] == 0


def test_the_weights_scale_their_terms_and_zero_drops_one():
    student, teacher = logits(9, 12)
    _, ones = CMKDLoss()(student, teacher, return_parts=True)
    _, scaled = CMKDLoss(pearson_weight=2, spearman_weight=3, weight=0.5)(student, teacher, return_parts=True)
    torch.testing.assert_close(scaled["pearson"], ones["pearson"] * 1.0, rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled["spearman"], ones["spearman"] * 1.5, rtol=1e-6, atol=0)
    _, alone = CMKDLoss(pearson_weight=0)(student, teacher, return_parts=True)
    assert list(alone) == ["spearman"] and alone["spearman"].equal(ones["spearman"])


def test_a_sure_teacher_asks_for_pearson_and_an_unsure_one_for_spearman():
    student, _ = logits(2, 10)
    sure, unsure = torch.zeros(1, 10), 0.01 * torch.randn(1, 10)
    sure[0, 3] = 200.0
    teacher = torch.cat([sure, unsure]).double()
    _, parts = CMKDLoss(reduction="sum")(student, teacher, return_parts=True)
    pearson, spearman = by_the_book(student, teacher, share=0.5)
    assert parts["pearson"].item() == pytest.approx(2 * pearson[0], rel=1e-3)
    assert parts["spearman"].item() == pytest.approx(2 * spearman[1], rel=1e-3)


def test_the_class_term_is_pearson_over_the_batch_as_in_dist():
    student, teacher = logits(9, 12)
    _, parts = CMKDLoss(class_weight=2)(student, teacher, return_parts=True)
    s, t = (np.stack([z_score(row) for row in x.detach().numpy()]) for x in (student, teacher))
    columns = [1 - np.corrcoef(s[:, c], t[:, c])[0, 1] for c in range(12)]
    assert parts["classes"].item() == pytest.approx(2 * np.mean(columns), rel=1e-9)
    same = teacher[:1].expand(9, 12)
    _, parts = CMKDLoss(class_weight=2)(student, same, return_parts=True)
    assert parts["classes"].item() == pytest.approx(2)
    _, parts = CMKDLoss(class_weight=2)(student, teacher, mask=torch.arange(9) == 4, return_parts=True)
    assert parts["classes"] == 0 and parts["pearson"] > 0


def test_the_gradient_moves_neither_mean_nor_scale_of_the_logits():
    student, teacher = logits(9, 12)
    CMKDLoss()(student, teacher).backward()
    assert student.grad.abs().max() > 1e-3
    centred = student.detach() - student.detach().mean(-1, keepdim=True)
    assert student.grad.sum(-1).abs().max() < 1e-12
    assert (student.grad * centred).sum(-1).abs().max() < 1e-12


def test_a_class_that_is_minus_infinity_on_either_side_is_out_of_its_row():
    student, teacher = logits(3, 9)
    with torch.no_grad():
        student[0, 2], student[1, 5] = -math.inf, -math.inf
    teacher[0, 4], teacher[1, 5] = -math.inf, -math.inf
    loss = CMKDLoss(reduction="sum")
    rows = [
        loss(student[0:1, [0, 1, 3, 5, 6, 7, 8]], teacher[0:1, [0, 1, 3, 5, 6, 7, 8]]),
        loss(student[1:2, [0, 1, 2, 3, 4, 6, 7, 8]], teacher[1:2, [0, 1, 2, 3, 4, 6, 7, 8]]),
        loss(student[2:], teacher[2:]),
    ]
    torch.testing.assert_close(loss(student, teacher), sum(rows), rtol=1e-9, atol=1e-12)
    (grad,) = torch.autograd.grad(loss(student, teacher), student)
    assert grad.isfinite().all() and grad[0, 2] == grad[0, 4] == grad[1, 5] == 0 and grad[0, 3] != 0


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=needs_native())])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_class_that_is_the_least_number_of_its_dtype_is_out_as_minus_infinity_is(dtype, backend):
    found = []
    for padding in (-math.inf, torch.finfo(dtype).min):
        student, teacher = (t.detach().to(dtype) for t in logits(3, 9))
        student[0, 2] = student[1, 5] = teacher[1, 5] = padding
        teacher = teacher.float() if dtype == torch.float16 else teacher
        teacher[0, 4] = torch.finfo(teacher.dtype).min if padding > -math.inf else padding
        student.requires_grad_()
        value = CMKDLoss(class_weight=1, backend=backend)(student, teacher)
        found.append((value.detach(), *torch.autograd.grad(value, student)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True)) and found[0][0].isfinite()


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_a_constant_row_adds_both_weights_and_no_gradient(value):
    student, teacher = (t.float() for t in logits(2, 10))
    for class_weight in (0.0, 1.0):
        s = torch.cat([student.detach()[:1], torch.full((1, 10), value)]).requires_grad_()
        loss = CMKDLoss(reduction="sum", class_weight=class_weight)
        _, parts = loss(s, teacher, return_parts=True)
        _, first = loss(s[:1].expand(2, 10), teacher, mask=torch.tensor([True, False]), return_parts=True)
        both = parts["pearson"] + parts["spearman"] - first["pearson"] - first["spearman"]
        torch.testing.assert_close(both, torch.tensor(1.0))
        (parts["pearson"] + parts["spearman"]).backward()
        assert (s.grad[1] == 0).all() and s.grad.isfinite().all()


def test_a_row_without_a_class_left_counts_as_constant():
    student, teacher = logits(2, 10)
    teacher[1] = -math.inf
    loss = CMKDLoss(reduction="sum")
    value = loss(student, teacher)
    torch.testing.assert_close(value, loss(student[:1], teacher[:1]) + 1)
    (grad,) = torch.autograd.grad(value, student)
    assert (grad[1] == 0).all() and grad.isfinite().all()


def test_a_batch_of_one_repeated_row_has_no_class_correlation_whatever_rounding_leaves():
    for n in (3, 7, 13, 100):
        student, teacher = (t.float() for t in logits(n, 20))
        _, parts = CMKDLoss(class_weight=1)(student[:1].expand(n, 20), teacher[:1].expand(n, 20), return_parts=True)
        assert parts["classes"] == 1


def test_large_logits_stay_finite_and_offsets_change_nothing():
    student, teacher = (t.float() for t in logits(9, 1000))
    loss = CMKDLoss()
    plain = loss(student, teacher)
    torch.testing.assert_close(loss(student * 1e4, teacher), plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss(student + 1000, teacher), plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"weight_tau": 0}, "weight_tau is 0"),
        ({"spearman_share": 1.5}, "spearman_share is 1.5"),
        ({"spearman_share": "half"}, "spearman_share is 'half'"),
        ({"strength": 0}, "strength is 0"),
        ({"strength": "big"}, "strength is 'big'"),
        ({"strength": ("auto", -1)}, "strength is"),
        ({"strength": ("rel", 1)}, "strength is"),
        ({"regularization": "l1"}, "regularization is 'l1'"),
        ({"reduction": "none"}, "reduction is 'none'"),
        ({"pearson_weight": [1, 2]}, "pearson_weight is"),
        ({"pearson_weight": 0, "spearman_weight": 0}, "nothing is left"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        CMKDLoss(**arguments)


def test_bad_logits_are_named():
    with pytest.raises(ValueError, match=r"teacher_logits has shape \(4, 6\), student_logits \(4, 5\)"):
        CMKDLoss()(torch.randn(4, 5), torch.randn(4, 6))
    with pytest.raises(ValueError, match=r"student_logits has shape \(4, 1\).*C >= 2"):
        CMKDLoss()(torch.randn(4, 1), torch.randn(4, 1))
    with pytest.raises(ValueError, match=r"spearman_share gave \(4, 5\)"):
        CMKDLoss(spearman_share=lambda t: t)(torch.randn(4, 5), torch.randn(4, 5))


def test_its_options_are_shown():
    shown = repr(CMKDLoss(strength=("auto", 2), class_weight=0.5))
    assert "class_weight=0.5" in shown and "strength=('auto', 2.0)" in shown and "spearman_share=entropy" in shown


def test_one_row_keeps_all_but_the_class_term():
    student, teacher = torch.randn(1, 9, dtype=torch.float64), torch.randn(1, 9, dtype=torch.float64)
    with pytest.warns(UserWarning, match="a batch of 1 rows for its class term and needs 2"):
        value, parts = CMKDLoss(class_weight=3.0)(student, teacher, return_parts=True)
    assert value.equal(CMKDLoss()(student, teacher)) and value != 0 and parts["classes"] == 0
