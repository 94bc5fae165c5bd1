# SPDX-License-Identifier: Apache-2.0
"""RCKALoss against a float64 transcription of the public code's formula, its presets, and masks in the class term."""

import pytest
import torch

import kdkernels as kd
from kdkernels.gram import both_ways
from kdkernels.losses import RCKALoss


def gram(rows):
    """The public code's Gram matrix: linear, rows divided by the square root of their diagonal entry."""
    G = rows @ rows.T
    return G / G.diagonal().sqrt()[:, None]


def uncentred_cka(K, L):
    return (K * L).sum() / ((K * K).sum().sqrt() * (L * L).sum().sqrt())


def logit_term(a, b):
    return -uncentred_cka(gram(a), gram(b))


def feature_term(f_s, f_t):
    """The public code's: the Gram matrices of raw features, normalised by row, as the rows of another linear CKA."""
    relations = [torch.nn.functional.normalize(f.flatten(1) @ f.flatten(1).T, dim=1) for f in (f_s, f_t)]
    return -uncentred_cka(*(G @ G.T for G in relations))


def batch(n=12, classes=7):
    torch.manual_seed(0)
    student, teacher = torch.randn(n, classes, dtype=torch.float64), torch.randn(n, classes, dtype=torch.float64)
    stages = [torch.randn(n, 3, 4, 4).double() + 1, torch.randn(n, 8).double() + 1]
    others = [torch.randn(n, 5, 2, 2).double() + 1, torch.randn(n, 6).double()]
    return student.requires_grad_(), teacher, [f.requires_grad_() for f in stages], others


@pytest.mark.parametrize("n, classes", [(12, 7), (5, 40), (1, 4)])
def test_the_default_is_the_papers_three_terms(n, classes):
    student, teacher, stages, others = batch(n, classes)
    loss = RCKALoss()
    total, parts = loss(student, teacher, stages, others, return_parts=True)
    expected = {
        "rows": 15 * logit_term(student, teacher),
        "classes": 15 * logit_term(student.T, teacher.T),
        "features": sum(feature_term(s, t) for s, t in zip(stages, others, strict=True)),
    }
    assert list(parts) == list(expected)
    torch.testing.assert_close(parts, expected, rtol=1e-10, atol=1e-10)
    inputs = [student, *stages]
    mine, theirs = (torch.autograd.grad(v, inputs) for v in (total, sum(expected.values())))
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


def test_the_feature_term_is_the_public_codes_number_at_any_common_scale():
    torch.manual_seed(0)
    student, teacher = torch.randn(8, 12, dtype=torch.float64), torch.randn(8, 20, dtype=torch.float64)
    logits = torch.ones(8, 3, dtype=torch.float64)
    loss = RCKALoss(row_weight=0, class_weight=0)
    torch.testing.assert_close(loss(logits, logits, student, teacher).item(), -0.43633, rtol=0, atol=5e-6)
    longer = student * torch.arange(1, 9).double()[:, None]
    torch.testing.assert_close(loss(logits, logits, longer, teacher), feature_term(longer, teacher))
    for scale in (1e-30, 1e30):
        student = (longer * scale).float().requires_grad_()
        value = loss(logits, logits, student, teacher.float())
        torch.testing.assert_close(value.double(), feature_term(longer, teacher), rtol=1e-5, atol=0)
        assert torch.autograd.grad(value * scale, student)[0].isfinite().all()


def test_without_features_the_default_is_the_two_logit_terms():
    student, teacher, *_ = batch()
    expected = 15 * logit_term(student, teacher) + 15 * logit_term(student.T, teacher.T)
    torch.testing.assert_close(RCKALoss()(student, teacher), expected, rtol=1e-10, atol=0)


def test_the_presets_are_the_two_published_combinations():
    student, teacher, stages, others = batch()
    assert RCKALoss.preset("lcka")(student, teacher).equal(RCKALoss()(student, teacher))
    dkcka = 15 * logit_term(student, teacher) + feature_term(stages[1], others[1])
    torch.testing.assert_close(RCKALoss.preset("dkcka")(student, teacher, stages, others), dkcka, rtol=1e-10, atol=0)
    assert RCKALoss.preset("dkcka", row_weight=4).row_weight == 4
    with pytest.raises(ValueError, match=r"preset is 'cka': give one of \('lcka', 'dkcka'\)"):
        RCKALoss.preset("cka")


def test_features_are_never_ignored_or_missed_silently():
    student, teacher, stages, others = batch()
    with pytest.raises(ValueError, match="student_features is not given"):
        RCKALoss.preset("dkcka")(student, teacher)
    with pytest.raises(ValueError, match="student_features is given and feature_weight is 0"):
        RCKALoss.preset("lcka")(student, teacher, stages, others)
    with pytest.raises(ValueError, match="give both or neither"):
        RCKALoss()(student, teacher, stages)
    with pytest.raises(ValueError, match="no stage from first_stage=1 on"):
        RCKALoss.preset("dkcka")(student, teacher, stages[0], others[0])
    with pytest.raises(ValueError, match="nothing is left to compute"):
        RCKALoss(row_weight=0, class_weight=0, feature_weight=0)
    with pytest.raises(ValueError, match="student_features is not given"):
        RCKALoss(row_weight=0, class_weight=0)(student, teacher)
    with pytest.raises(ValueError, match="feature_weight has 3 numbers for 2 stages"):
        RCKALoss(feature_weight=[1, 2, 3])(student, teacher, stages, others)


def test_a_weight_a_stage_and_a_weight_of_the_whole():
    student, teacher, stages, others = batch()
    terms = [feature_term(s, t) for s, t in zip(stages, others, strict=True)]
    loss = RCKALoss(row_weight=0, class_weight=2, feature_weight=[3, 0.5], weight=0.1)
    expected = 0.1 * (2 * logit_term(student.T, teacher.T) + 3 * terms[0] + 0.5 * terms[1])
    # the weight 0.1 is a float32 buffer
    torch.testing.assert_close(loss(student, teacher, stages, others), expected, rtol=1e-7, atol=0)


def test_the_textbook_variants_are_the_op_on_logits_and_on_their_transpose():
    student, teacher, *_ = batch()
    for how in (
        {"center": True, "unbiased": True, "row_normalize": False},
        {"center": True, "row_normalize": True},
        {"kernel": "rbf", "center": True, "row_normalize": False},
    ):
        options = {"center": False, "unbiased": False, "row_normalize": True, "kernel": "linear", **how}
        expected = -15 * sum(kd.cka(*pair, **options) for pair in ((student, teacher), (student.T, teacher.T)))
        torch.testing.assert_close(RCKALoss(**how)(student, teacher), expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="row_normalize=True with unbiased=True"):
        RCKALoss(unbiased=True, center=True)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"center": True},
        {"center": True, "unbiased": True, "row_normalize": False},
        {"center": True, "kernel": "rbf", "row_normalize": False},
        {"center": True, "kernel": "polynomial", "row_normalize": False},
    ],
)
def test_a_masked_sample_enters_no_term_not_even_the_norms_between_classes(how):
    student, teacher, stages, others = batch()
    mask = torch.ones(12, dtype=torch.bool)
    mask[[1, 6]] = False
    loss = RCKALoss(**how)
    poisoned = [side.detach().clone() for side in (student, teacher, *stages, *others)]
    for side in poisoned:
        side[~mask] = float("nan")
    poisoned[0].requires_grad_()
    _, parts = loss(poisoned[0], poisoned[1], poisoned[2:4], poisoned[4:], mask=mask, return_parts=True)
    kept = [side.detach()[mask] for side in (student, teacher, *stages, *others)]
    kept[0].requires_grad_()
    _, expected = loss(kept[0], kept[1], kept[2:4], kept[4:], return_parts=True)
    torch.testing.assert_close(parts, expected, rtol=1e-9, atol=1e-10)
    grad = torch.autograd.grad(sum(parts.values()), poisoned[0])[0]
    torch.testing.assert_close(grad[mask], torch.autograd.grad(sum(expected.values()), kept[0])[0])
    assert (grad[~mask] == 0).all()


def test_zero_rows_and_zero_features_are_finite_where_the_public_code_divides_by_zero():
    student, teacher, stages, others = batch()
    zeros = [side.detach().clone() for side in (student, *stages)]
    for side in zeros:
        side[2] = 0
        side.requires_grad_()
    value = RCKALoss()(zeros[0], teacher, zeros[1:], others)
    assert value.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(value, zeros))
    nothing = torch.zeros_like(student, requires_grad=True)
    value = RCKALoss()(nothing, teacher)
    assert value == 0 and (torch.autograd.grad(value, nothing)[0] == 0).all()


def test_the_loss_ignores_the_scale_so_its_gradient_grows_as_the_logits_shrink():
    student, teacher, *_ = batch()
    small = (student.detach() / 100).requires_grad_()
    loss = RCKALoss()
    torch.testing.assert_close(loss(small, teacher), loss(student, teacher))
    grads = [torch.autograd.grad(loss(side, teacher), side)[0] for side in (small, student)]
    torch.testing.assert_close(grads[0], 100 * grads[1])


def test_token_logits_and_tokens_of_features_share_the_mask():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 6, 5), torch.randn(3, 6, 5)
    f_s, f_t = torch.randn(3, 6, 4), torch.randn(3, 6, 8)
    mask = torch.rand(3, 6) > 0.3
    loss = RCKALoss(rows="tokens", feature_rows="tokens")
    expected = RCKALoss()(student[mask], teacher[mask], f_s[mask], f_t[mask])
    torch.testing.assert_close(loss(student, teacher, f_s, f_t, mask=mask), expected)
    with pytest.raises(ValueError, match="student_logits has shape .* rows is not given"):
        RCKALoss()(student, teacher)


def test_groups_average_the_logit_terms_of_each_sample():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 6, 5), torch.randn(3, 6, 5)
    mask = torch.rand(3, 6) > 0.3
    mask[1] = False
    loss = RCKALoss()
    expected = [loss(student[g][mask[g]], teacher[g][mask[g]]) for g in (0, 2)]
    torch.testing.assert_close(loss(student, teacher, rows="groups", mask=mask), sum(expected) / 2)


def test_classes_that_do_not_match_are_refused_only_where_classes_are_compared():
    student, teacher = torch.randn(8, 5), torch.randn(8, 9)
    with pytest.raises(ValueError, match="teacher_logits has 9 classes, student_logits 5.*class_weight=0"):
        RCKALoss()(student, teacher)
    assert RCKALoss(class_weight=0)(student, teacher).isfinite()
    with pytest.raises(ValueError, match="student_logits has 3 classes: the class term with unbiased=True"):
        RCKALoss(unbiased=True, center=True, row_normalize=False)(student[:, :3], teacher[:, :3])


def test_a_batch_that_is_too_small_gives_zero_gradients_to_logits_and_features():
    student, teacher, stages, others = batch(n=3)
    loss = RCKALoss(unbiased=True, center=True, row_normalize=False)
    with pytest.warns(UserWarning, match="a batch of 3 rows and needs 4"):
        value = loss(student, teacher, stages, others)
    grads = torch.autograd.grad(value, [student, *stages])
    assert value == 0 and all((g == 0).all() for g in grads)


def test_the_class_term_holds_no_class_by_class_matrix():
    # 60 000 classes: one such matrix would be 14 GB
    torch.manual_seed(0)
    student, teacher = torch.randn(8, 60_000, requires_grad=True), torch.randn(8, 60_000)
    value = RCKALoss()(student, teacher)
    value.backward()
    assert value.isfinite() and student.grad.abs().max() > 0


def test_autocast_rounds_no_relation_between_features():
    student, teacher, stages, others = batch()
    loss = RCKALoss(backend="reference")
    sides = [student.float(), teacher.float(), [f.float() for f in stages], [f.float() for f in others]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(*sides)
    assert value.equal(loss(*sides))


PUBLISHED = {"unbiased": False, "center": False, "row_normalize": True, "backend": "reference"}


@pytest.mark.parametrize("shape", [(12, 7), (131, 300), (2, 5, 6), (1, 4)])
@pytest.mark.parametrize("dtype, size", [(torch.float64, 1.0), (torch.float32, 1e-12), (torch.float32, 1e12)])
def test_the_products_of_both_terms_are_the_two_ops(shape, dtype, size):
    x, y = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    x, y = ((side + 0.2) * size for side in (x, y))
    x, y = x.to(dtype).requires_grad_(), y.to(dtype)
    wide = x.detach().double().requires_grad_()
    rtol = 1e-9 if dtype == torch.float64 else 2e-6
    for columns in (True, False):
        values = both_ways.cka_both_ways(x, y, columns)
        sides = [(wide, y.double()), (wide.mT, y.double().mT)][: len(values)]
        assert len(values) == 1 + columns
        for value, pair in zip(values, sides, strict=True):
            expected = kd.cka(*pair, **PUBLISHED)
            torch.testing.assert_close(value.double(), expected, rtol=rtol, atol=rtol)
            mine = torch.autograd.grad(value.sum(), x, retain_graph=True)[0]
            theirs = torch.autograd.grad(expected.sum(), wide)[0]
            # one row has no direction to turn: what is left is rounding
            atol = max(rtol * theirs.abs().max().item(), rtol / size if shape[0] == 1 else 0)
            torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("n, classes", [(8, 6), (140, 6), (140, 280)])
def test_the_loss_is_one_number_whichever_way_it_is_computed(n, classes, monkeypatch):
    student, teacher = torch.randn(n, classes, requires_grad=True), torch.randn(n, classes)
    student.data[3] = 0
    values = [RCKALoss()(student, teacher)]
    monkeypatch.setattr(both_ways, "worth_it", lambda *_: False)
    values.append(RCKALoss(backend="torch")(student, teacher))
    torch.testing.assert_close(*values, rtol=1e-6, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in values), rtol=1e-4, atol=1e-6)
