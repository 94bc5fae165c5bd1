# SPDX-License-Identifier: Apache-2.0
"""CKALoss is 1 - kd.cka, level by level; here also how features of any rank become rows for every feature loss."""

import pytest
import torch

import kdkernels as kd
from kdkernels.losses import CKALoss
from kdkernels.losses.base import as_rows


def features(*shape, teacher_last=None):
    torch.manual_seed(0)
    student = torch.randn(*shape, dtype=torch.float64)
    teacher = torch.randn(*shape[:-1], teacher_last or shape[-1], dtype=torch.float64)
    teacher[..., : shape[-1]] += student
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("unbiased, center", [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("kernel", ["linear", "cosine", ("rbf", "linear")])
def test_it_is_one_minus_cka(kernel, unbiased, center):
    student, teacher = features(12, 5, teacher_last=7)
    value = CKALoss(kernel, unbiased=unbiased, center=center)(student, teacher)
    expected = 1 - kd.cka(student, teacher, kernel=kernel, unbiased=unbiased, center=center, backend="reference")
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


def test_a_constant_side_counts_as_unrelated_and_gives_no_gradient():
    student, teacher = features(12, 5)
    flat = torch.ones_like(student, requires_grad=True)
    value = CKALoss()(flat, teacher)
    value.backward()
    assert value == 1 and (flat.grad == 0).all()
    assert CKALoss()(student, torch.ones_like(teacher)) == 1


def test_each_way_to_read_tokens_is_the_op_on_these_rows():
    student, teacher = features(6, 8, 5)
    mask = torch.rand(6, 8) > 0.3
    loss = CKALoss()
    tokens = 1 - kd.cka(student[mask], teacher[mask])
    torch.testing.assert_close(loss(student, teacher, rows="tokens", mask=mask), tokens)
    mean = [
        torch.stack([row[keep].mean(0) for row, keep in zip(side, mask, strict=True)]) for side in (student, teacher)
    ]
    torch.testing.assert_close(loss(student, teacher, rows="mean", mask=mask), 1 - kd.cka(*mean))
    groups = [1 - kd.cka(s[keep], t[keep]) for s, t, keep in zip(student, teacher, mask, strict=True)]
    torch.testing.assert_close(loss(student, teacher, rows="groups", mask=mask), sum(groups) / 6)
    values = [loss(student, teacher, rows=rows) for rows in ("tokens", "mean", "groups", "flatten")]
    assert len({round(v.item(), 6) for v in values}) == 4
    assert CKALoss(rows="groups")(student, teacher).equal(values[2])


def test_a_sample_without_tokens_enters_no_mean():
    student, teacher = features(6, 8, 5)
    mask = torch.rand(6, 8) > 0.3
    mask[2] = False
    keep = [0, 1, 3, 4, 5]
    for rows in ("tokens", "mean", "groups"):
        loss = CKALoss(rows=rows)
        torch.testing.assert_close(
            loss(student, teacher, mask=mask), loss(student[keep], teacher[keep], mask=mask[keep])
        )


def test_each_way_to_read_feature_maps_is_the_op_on_these_rows():
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 3, 4, 5), torch.randn(6, 7, 4, 5)
    loss = CKALoss()
    rows = {
        "flatten": [side.reshape(6, -1) for side in (student, teacher)],
        "gap": [side.mean((2, 3)) for side in (student, teacher)],
        "positions": [side.permute(0, 2, 3, 1).reshape(6 * 4 * 5, -1) for side in (student, teacher)],
    }
    for name, pair in rows.items():
        torch.testing.assert_close(loss(student, teacher, rows=name), 1 - kd.cka(*pair))
    assert loss(student, teacher).equal(loss(student, teacher, rows="flatten"))
    samples = torch.tensor([True, True, False, True, True, True])
    for name, pair in rows.items():
        keep = samples.repeat_interleave(len(pair[0]) // 6)
        value = loss(student, teacher, rows=name, mask=samples)
        torch.testing.assert_close(value, 1 - kd.cka(pair[0][keep], pair[1][keep]))
    places = torch.rand(6, 4, 5) > 0.5
    value = loss(student, teacher, rows="positions", mask=places)
    torch.testing.assert_close(value, 1 - kd.cka(*(side[places.flatten()] for side in rows["positions"])))
    value = loss(student, teacher, rows="gap", mask=places)
    gap = [(side * places[:, None]).sum((2, 3)) / places.sum((1, 2))[:, None] for side in (student, teacher)]
    torch.testing.assert_close(value, 1 - kd.cka(*gap))


def test_maps_of_other_widths_and_sizes_compare_by_sample():
    student, teacher = torch.randn(8, 3, 4, 4), torch.randn(8, 6, 8, 8)
    for rows in ("flatten", "gap"):
        assert CKALoss(rows=rows)(student, teacher).isfinite()
    with pytest.raises(ValueError, match=r"teacher_features gives \(512,\) rows, student_features \(128,\)"):
        CKALoss(rows="positions")(student, teacher)


def test_three_dimensions_without_rows_are_refused_as_groups_would_be_another_number():
    student, teacher = features(6, 8, 5)
    with pytest.raises(ValueError, match=r"student_features has shape \(6, 8, 5\) and rows is not given.*'tokens'"):
        CKALoss()(student, teacher)
    with pytest.raises(ValueError, match=r"student_features\[1\] has shape \(6, 8, 5\)"):
        CKALoss()([student[:, 0], student], [teacher[:, 0], teacher])


def test_rows_that_do_not_fit_the_rank_are_refused():
    maps, tokens = torch.randn(6, 3, 4, 4), torch.randn(6, 8, 5)
    with pytest.raises(ValueError, match="tokens, mean and groups are for"):
        CKALoss(rows="tokens")(maps, maps)
    with pytest.raises(ValueError, match="gap and positions for"):
        CKALoss(rows="gap")(tokens, tokens)
    with pytest.raises(ValueError, match="rows is 'pixels': give one of"):
        CKALoss(rows="pixels")
    with pytest.raises(ValueError, match=r"mask has shape \(6, 7\): for student_features with rows='tokens' give"):
        CKALoss(rows="tokens")(tokens, tokens, mask=torch.ones(6, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask has shape \(6, 8\)"):
        CKALoss(rows="flatten")(tokens, tokens, mask=torch.ones(6, 8, dtype=torch.bool))


def test_a_mean_over_half_precision_tokens_is_taken_in_float32():
    tokens = torch.full((2, 4096, 1), 0.1, dtype=torch.bfloat16)
    rows, _ = as_rows(tokens, "mean", None, "x")
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, tokens[:, 0].float(), rtol=1e-6, atol=0)


def test_levels_that_do_not_match_are_refused():
    student, teacher = features(12, 5)
    with pytest.raises(ValueError, match="teacher_features has 1 levels, student_features has 2"):
        CKALoss()([student, student], [teacher])
    with pytest.raises(TypeError, match="give two tensors, two lists"):
        CKALoss()([student], teacher)
    with pytest.raises(ValueError, match="student_features is an empty list"):
        CKALoss()([], [])
    with pytest.raises(ValueError, match="student_features has 1 levels, weights has 2"):
        CKALoss(weights=[1, 1])([student], [teacher])
    with pytest.raises(ValueError, match="weights is 2.0: give a list"):
        CKALoss(weights=2.0)


def test_an_estimator_that_cannot_be_is_refused_at_construction():
    with pytest.raises(ValueError, match="center=False with unbiased=True"):
        CKALoss(center=False)
    with pytest.raises(ValueError, match="kernel is 'gauss'"):
        CKALoss("gauss")
