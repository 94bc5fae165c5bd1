# SPDX-License-Identifier: Apache-2.0
"""ATLoss is the public code's distance of unit attention maps."""

import pytest
import torch
import torch.nn.functional as F
from formulas import keeps_accuracy_near_the_teacher, maps, same_value_and_gradient

from kdkernels.losses import ATLoss


def attention(student, teacher, p=2):
    """The public formula: mean of |F|^p over channels, one L2 norm a sample, mean of squares over B H W."""
    height, width = (min(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True))
    pooled = (F.adaptive_avg_pool2d(x, (height, width)) for x in (student, teacher))
    a, b = (F.normalize(x.abs().pow(p).mean(1).flatten(1)) for x in pooled)
    return (a - b).square().mean()


@pytest.mark.parametrize("p", [1, 2, 2.5, 4])
@pytest.mark.parametrize(
    "student, teacher", [((3, 5, 4, 4), (3, 9, 4, 4)), ((2, 3, 3, 4), (2, 3, 6, 8)), ((1, 3, 7, 7), (1, 4, 5, 5))]
)
def test_it_is_the_public_formula(student, teacher, p):
    student, teacher = maps(student, teacher)
    same_value_and_gradient(ATLoss(p)(student, teacher), attention(student, teacher, p), student)


def test_tokens_are_positions_and_masked_ones_enter_neither_norm_nor_mean():
    student, teacher = maps((4, 6, 5), (4, 6, 8))
    expected = attention(student.mT[..., None], teacher.mT[..., None])
    same_value_and_gradient(ATLoss()(student, teacher, rows="groups"), expected, student)
    mask = torch.rand(4, 6) > 0.3
    mask[1] = False
    kept = [[side[i, mask[i]].mT[None, ..., None] for side in (student, teacher)] for i in (0, 2, 3)]
    # a mean over positions: a sample counts as often as it has positions
    expected = sum(attention(*pair) * pair[0].shape[2] for pair in kept) / mask.sum()
    poisoned = torch.where(mask[..., None], student, torch.nan)
    same_value_and_gradient(ATLoss()(poisoned, teacher, rows="groups", mask=mask), expected, student)
    square, other = (side.mT.unflatten(2, (2, 3)) for side in (student, teacher))
    torch.testing.assert_close(ATLoss()(square, other, mask=mask.unflatten(1, (2, 3))), expected)
    samples = torch.tensor([True, False, True, True])
    torch.testing.assert_close(ATLoss()(square, other, mask=samples), attention(square[samples], other[samples]))


def test_a_mask_that_pooling_would_mix_is_refused():
    student, teacher = maps((4, 3, 4, 4), (4, 5, 8, 8))
    with pytest.raises(ValueError, match=r"mask has shape \(4, 4, 4\), and not every map has the size"):
        ATLoss()(student, teacher, mask=torch.ones(4, 4, 4, dtype=torch.bool))


def test_it_does_not_change_with_a_samples_scale_or_its_channels_order_and_sign():
    student, teacher = maps((2, 6, 3, 3), (2, 5, 3, 3))
    changed = -student.flip(1) * torch.tensor([3.0, 0.1])[:, None, None, None]
    torch.testing.assert_close(ATLoss()(changed, teacher), ATLoss()(student, teacher), rtol=1e-9, atol=0)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_a_map_of_zeros_is_finite_and_gets_no_gradient(p):
    student, teacher = maps((2, 6, 3, 3), (2, 5, 3, 3))
    zero = torch.zeros(2, 6, 3, 3, requires_grad=True)
    value = ATLoss(p)(zero, teacher)
    # the teacher's map has norm 1
    assert value.item() == pytest.approx(1 / 9) and (torch.autograd.grad(value, zero)[0] == 0).all()
    some = student.detach().clone()
    some[0] = 0
    some.requires_grad_()
    assert torch.autograd.grad(ATLoss(p)(some, teacher), some)[0].isfinite().all()


def test_a_student_near_its_teacher_keeps_its_relative_accuracy():
    keeps_accuracy_near_the_teacher(ATLoss(), attention, (3, 16, 4, 4), value=2e-3)


def test_squares_of_half_precision_features_do_not_overflow():
    student, teacher = (side.detach().half() * 1000 for side in maps((2, 6, 3, 3), (2, 5, 3, 3)))
    value = ATLoss()(student.requires_grad_(), teacher)
    torch.testing.assert_close(value, attention(student.float(), teacher.float()), rtol=1e-5, atol=0)
    assert torch.autograd.grad(value, student)[0].isfinite().all()


@pytest.mark.parametrize("p", [0.5, float("inf"), float("nan")])
def test_an_exponent_below_one_is_refused(p):
    with pytest.raises(ValueError, match="p is"):
        ATLoss(p)
