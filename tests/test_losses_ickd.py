# SPDX-License-Identifier: Apache-2.0
"""ICKDLoss is the public code's distance of row-normalised channel Gram matrices."""

import pytest
import torch
import torch.nn.functional as F
from formulas import keeps_accuracy_near_the_teacher, maps, same_value_and_gradient

from kdkernels.losses import ICKDLoss


def correlation(student, teacher):
    """The public formula: C x C Gram matrices, rows over their L2 norm, squares summed over B C."""
    B, C = student.shape[:2]
    G, H = (F.normalize(x.flatten(2) @ x.flatten(2).mT, dim=2) for x in (student, teacher))
    return (G - H).square().sum() / (B * C)


@pytest.mark.parametrize(
    "student, teacher", [((3, 5, 4, 4), (3, 5, 4, 4)), ((3, 9, 2, 2), (3, 9, 3, 5)), ((1, 4, 3, 3), (1, 4, 3, 3))]
)
def test_it_is_the_public_formula(student, teacher):
    student, teacher = maps(student, teacher)
    same_value_and_gradient(ICKDLoss()(student, teacher), correlation(student, teacher), student)


def test_tokens_are_positions_and_masked_ones_are_left_out():
    student, teacher = maps((4, 6, 5), (4, 6, 5))
    expected = correlation(student.mT, teacher.mT)
    same_value_and_gradient(ICKDLoss()(student, teacher, rows="groups"), expected, student)
    mask = torch.rand(4, 6) > 0.3
    mask[1] = False
    poisoned = torch.where(mask[..., None], student, torch.nan)
    kept = [[side[i, mask[i]].mT[None] for side in (student, teacher)] for i in (0, 2, 3)]
    value = ICKDLoss()(poisoned, teacher, rows="groups", mask=mask)
    same_value_and_gradient(value, sum(correlation(*pair) for pair in kept) / 3, student)


def test_each_side_has_its_own_positions_and_then_a_mask_of_them_is_refused():
    student, teacher = maps((4, 6, 5), (4, 3, 5))
    value = ICKDLoss(rows="groups")(student, teacher)
    torch.testing.assert_close(value, correlation(student.mT, teacher.mT))
    with pytest.raises(ValueError, match=r"mask has shape \(4, 6\), and not every map has the size"):
        ICKDLoss(rows="groups")(student, teacher, mask=torch.ones(4, 6, dtype=torch.bool))
    samples = torch.tensor([True, False, True, True])
    expected = correlation(student[samples].mT, teacher[samples].mT)
    torch.testing.assert_close(ICKDLoss(rows="groups")(student, teacher, mask=samples), expected)


def test_it_does_not_change_with_a_samples_scale_or_the_order_of_positions():
    student, teacher = maps((2, 6, 3, 3), (2, 6, 3, 3))
    order = torch.randperm(9)
    changed = student.flatten(2)[..., order].unflatten(2, (3, 3)) * torch.tensor([3.0, 0.1])[:, None, None, None]
    torch.testing.assert_close(ICKDLoss()(changed, teacher), ICKDLoss()(student, teacher), rtol=1e-9, atol=0)


def test_a_zero_channel_is_finite_and_so_is_its_gradient():
    student, teacher = maps((2, 6, 3, 3), (2, 6, 3, 3))
    student = student.detach().clone()
    student[0, 2] = 0
    student.requires_grad_()
    value = ICKDLoss()(student, teacher)
    torch.testing.assert_close(value, correlation(student, teacher))
    # the public code gives 1e10 here
    assert torch.autograd.grad(value, student)[0].abs().max() < 1


def test_a_student_near_its_teacher_keeps_its_relative_accuracy():
    keeps_accuracy_near_the_teacher(ICKDLoss(), correlation, (3, 16, 4, 4))


def test_channels_must_agree_and_the_message_says_how():
    student, teacher = maps((2, 6, 3, 3), (2, 5, 3, 3))
    with pytest.raises(ValueError, match=r"teacher_features has 5 channels, student_features has 6.*1 x 1 convolution"):
        ICKDLoss()(student, teacher)
    with pytest.raises(ValueError, match=r"teacher_features\[1\] has 5 channels, student_features\[1\] has 6"):
        ICKDLoss()([teacher, student], [teacher, teacher])
