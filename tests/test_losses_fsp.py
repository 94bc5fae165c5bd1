# SPDX-License-Identifier: Apache-2.0
"""FSPLoss is the public code's distance of products of consecutive layers."""

import pytest
import torch
import torch.nn.functional as F
from formulas import keeps_accuracy_near_the_teacher, same_value_and_gradient

from kdkernels.losses import FSPLoss

POOL = {"avg": F.adaptive_avg_pool2d, "max": F.adaptive_max_pool2d}


def flow(below, above, pool="avg"):
    """The mean over positions of all products of a channel below with one above."""
    size = tuple(min(a, b) for a, b in zip(below.shape[2:], above.shape[2:], strict=True))
    below, above = (POOL[pool](x, size) if x.shape[2:] != size else x for x in (below, above))
    return (below.flatten(2)[:, :, None] * above.flatten(2)[:, None]).mean(-1)


def flows(student, teacher, pool="avg"):
    """The public formula: squares averaged over everything, one number a pair of layers."""
    pairs = zip(zip(student, student[1:], strict=False), zip(teacher, teacher[1:], strict=False), strict=True)
    return [(flow(*s, pool) - flow(*t, pool)).square().mean() for s, t in pairs]


def layers(*shapes, size=1):
    torch.manual_seed(0)
    student = [torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    return student, [torch.randn(*shape[:2], *(size * n for n in shape[2:]), dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("pool", POOL)
@pytest.mark.parametrize("size", [1, 2])
def test_it_is_the_public_formula(pool, size):
    student, teacher = layers((3, 4, 8, 8), (3, 5, 4, 6), (3, 5, 4, 6), (3, 2, 5, 7), size=size)
    loss = FSPLoss(pool=pool)
    total, parts = loss(student, teacher, return_parts=True)
    expected = flows(student, teacher, pool)
    torch.testing.assert_close(list(parts.values()), expected)
    assert list(parts) == ["fsp_0", "fsp_1", "fsp_2"]
    same_value_and_gradient(total, sum(expected), student)


def test_the_libraries_two_pools_differ():
    student, teacher = layers((2, 3, 8, 8), (2, 4, 4, 4))
    assert (FSPLoss()(student, teacher) - FSPLoss(pool="max")(student, teacher)).abs() > 0.01


def test_pairs_of_layers_have_their_weights():
    student, teacher = layers((2, 3, 4, 4), (2, 4, 4, 4), (2, 2, 4, 4))
    one, two = flows(student, teacher)
    torch.testing.assert_close(FSPLoss(weights=[2.0, 0.5], weight=50.0)(student, teacher), 100 * one + 25 * two)
    with pytest.raises(ValueError, match="student_features has 2 pairs of layers, weights has 3"):
        FSPLoss(weights=[1.0, 1.0, 1.0])(student, teacher)


def test_masked_positions_and_samples_are_left_out():
    student, teacher = layers((4, 3, 2, 3), (4, 5, 2, 3))
    mask = torch.rand(4, 2, 3) > 0.3
    mask[1] = False
    kept = []
    for i in (0, 2, 3):
        kept += flows(*([x[i][:, mask[i]][None, ..., None] for x in side] for side in (student, teacher)))
    poisoned = [torch.where(mask[:, None], x, torch.nan) for x in student]
    same_value_and_gradient(FSPLoss()(poisoned, teacher, mask=mask), sum(kept) / 3, student)
    samples = torch.tensor([True, False, True, True])
    expected = sum(flows([x[samples] for x in student], [x[samples] for x in teacher]))
    torch.testing.assert_close(FSPLoss()(student, teacher, mask=samples), expected)
    tokens = [[x.flatten(2).mT for x in side] for side in (student, teacher)]
    value = FSPLoss()(*tokens, rows="groups", mask=mask.flatten(1))
    torch.testing.assert_close(value, sum(kept) / 3)


def test_a_mask_that_pooling_would_mix_is_refused():
    for student, teacher in (layers((2, 3, 4, 4), (2, 3, 2, 2)), layers((2, 3, 4, 4), (2, 3, 4, 4), size=2)):
        with pytest.raises(ValueError, match=r"mask has shape \(2, 4, 4\), and not every map has the size"):
            FSPLoss()(student, teacher, mask=torch.ones(2, 4, 4, dtype=torch.bool))


def test_a_single_sample_is_no_special_case():
    student, teacher = layers((1, 3, 4, 4), (1, 4, 4, 4))
    torch.testing.assert_close(FSPLoss()(student, teacher), sum(flows(student, teacher)))


def test_a_student_near_its_teacher_keeps_its_relative_accuracy():
    shapes = (3, 8, 4, 4), (3, 6, 4, 4)
    keeps_accuracy_near_the_teacher(FSPLoss(), lambda s, t: sum(flows(s, t)), *shapes, gradient=1e-3)


def test_layers_that_do_not_fit_are_refused():
    student, teacher = layers((2, 3, 4, 4), (2, 4, 4, 4))
    loss = FSPLoss()
    for one in ((student[0], teacher[0]), (student[:1], teacher[:1])):
        with pytest.raises(ValueError, match="student_features is one layer.*give lists of at least 2"):
            loss(*one)
    with pytest.raises(ValueError, match="teacher_features has 1 levels, student_features has 2"):
        loss(student, teacher[:1])
    with pytest.raises(ValueError, match=r"teacher_features\[1\] has 3 channels, student_features\[1\] has 4.*1 x 1"):
        loss(student, [teacher[0], teacher[0]])
    with pytest.raises(ValueError, match=r"student_features\[1\] has 1 samples, student_features\[0\] has 2"):
        loss([student[0], student[1][:1]], [teacher[0], teacher[1][:1]])
    with pytest.raises(ValueError, match="teacher_features.* has 1 rows, student_features.* has 2"):
        loss(student, [t[:1] for t in teacher])
    with pytest.raises(ValueError, match="pool is 'mean': give one of"):
        FSPLoss(pool="mean")
    tokens = [torch.randn(2, 6, 3), torch.randn(2, 5, 3)]
    with pytest.raises(ValueError, match=r"student_features\[1\] has positions \(5,\), the layer before it \(6,\)"):
        loss(tokens, tokens, rows="groups")
