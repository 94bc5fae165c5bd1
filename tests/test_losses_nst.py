# SPDX-License-Identifier: Apache-2.0
"""NSTLoss is the polynomial MMD of the public code without its B x C x C x HW products; also how maps are read."""

import pytest
import torch
import torch.nn.functional as F
from formulas import keeps_accuracy_near_the_teacher, maps, same_value_and_gradient

from kdkernels.losses import NSTLoss
from kdkernels.losses.maps import pooled


def selectivity(student, teacher):
    """The public formula: all products of all channels over positions, squared."""
    height, width = (min(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True))
    s, t = (F.adaptive_avg_pool2d(x, (height, width)) for x in (student, teacher))
    s, t = (F.normalize(x.flatten(2), dim=2) for x in (s, t))

    def kernel(a, b):
        return (a[:, None] * b[:, :, None]).sum(-1).square().mean()

    return kernel(s, s) + kernel(t, t) - 2 * kernel(s, t)


# more positions than channels (C x C products) and fewer (L x L), other channels, other sizes, no square, one sample
SHAPES = [
    ((3, 5, 6, 6), (3, 4, 6, 6)),
    ((3, 17, 2, 2), (3, 9, 2, 2)),
    ((2, 3, 7, 7), (2, 4, 5, 5)),
    ((2, 3, 3, 4), (2, 4, 6, 8)),
    ((1, 3, 4, 6), (1, 3, 2, 7)),
]


@pytest.mark.parametrize("student, teacher", SHAPES)
def test_it_is_the_public_formula(student, teacher):
    student, teacher = maps(student, teacher)
    same_value_and_gradient(NSTLoss()(student, teacher), selectivity(student, teacher), student)


def test_tokens_are_positions_and_features_are_channels():
    student, teacher = maps((3, 6, 5), (3, 6, 8))
    expected = selectivity(student.mT[..., None], teacher.mT[..., None])
    same_value_and_gradient(NSTLoss()(student, teacher, rows="groups"), expected, student)
    value = NSTLoss(rows="positions")(student.mT, teacher.mT)
    torch.testing.assert_close(value, expected)


def test_masked_positions_and_samples_are_left_out():
    student, teacher = maps((4, 6, 5), (4, 6, 8))
    mask = torch.rand(4, 6) > 0.3
    mask[1] = False
    kept = [[side[i, mask[i]].mT[None, ..., None] for side in (student, teacher)] for i in (0, 2, 3)]
    expected = sum(selectivity(*pair) for pair in kept) / 3
    value = NSTLoss(rows="groups")(torch.where(mask[..., None], student, torch.nan), teacher, mask=mask)
    same_value_and_gradient(value, expected, student)
    square, other = (side.mT.unflatten(2, (2, 3)) for side in (student, teacher))
    torch.testing.assert_close(NSTLoss()(square, other, mask=mask.unflatten(1, (2, 3))), expected)
    samples = torch.tensor([True, False, True, True])
    torch.testing.assert_close(NSTLoss()(square, other, mask=samples), selectivity(square[samples], other[samples]))


def test_a_mask_that_pooling_would_mix_is_refused_and_one_of_samples_is_not():
    student, teacher = maps((4, 3, 4, 4), (4, 5, 8, 8))
    with pytest.raises(ValueError, match=r"mask has shape \(4, 4, 4\), and not every map has the size"):
        NSTLoss()(student, teacher, mask=torch.ones(4, 4, 4, dtype=torch.bool))
    samples = torch.tensor([True, False, True, True])
    torch.testing.assert_close(
        NSTLoss()(student, teacher, mask=samples), selectivity(student[samples], teacher[samples])
    )


def test_it_does_not_change_with_the_order_sign_or_scale_of_channels():
    student, teacher = maps((2, 6, 3, 3), (2, 5, 3, 3))
    value = NSTLoss()(student, teacher)
    changed = student[:, torch.randperm(6)] * torch.randn(2, 6, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(NSTLoss()(changed, teacher.flip(1) * -3), value, rtol=1e-9, atol=0)


def test_a_zero_channel_is_finite_and_gets_no_gradient():
    student, teacher = maps((2, 6, 3, 3), (2, 5, 3, 3))
    student = student.detach().clone()
    student[0, 2] = 0
    student.requires_grad_()
    value = NSTLoss()(student, teacher)
    torch.testing.assert_close(value, selectivity(student, teacher))
    grad = torch.autograd.grad(value, student)[0]
    assert grad.isfinite().all() and (grad[0, 2] == 0).all()
    zero = torch.zeros(2, 6, 3, 3, requires_grad=True)
    assert (torch.autograd.grad(NSTLoss()(zero, teacher), zero)[0] == 0).all()


@pytest.mark.parametrize("channels", [4, 40])
def test_a_student_near_its_teacher_keeps_its_relative_accuracy(channels):
    # three means of 0.1 that cancel to 1e-7 leave nothing in float32
    keeps_accuracy_near_the_teacher(NSTLoss(), selectivity, (3, channels, 4, 4))


def test_maps_of_any_layout_give_one_value():
    student, teacher = maps((2, 6, 4, 4), (2, 5, 4, 4), torch.float32)
    value = NSTLoss()(student, teacher)
    last = student.detach().to(memory_format=torch.channels_last).requires_grad_()
    torch.testing.assert_close(NSTLoss()(last, teacher), value)
    got, wanted = torch.autograd.grad(NSTLoss()(last, teacher), last)[0], torch.autograd.grad(value, student)[0]
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("how, pool", [("avg", F.adaptive_avg_pool2d), ("max", F.adaptive_max_pool2d)])
@pytest.mark.parametrize("size", [(2, 3), (4, 6), (3, 4), (8, 12)])
def test_pooling_is_adaptive_pooling(how, pool, size):
    x = torch.randn(2, 3, 8, 12)
    torch.testing.assert_close(pooled(x, size, how), pool(x, size))


def test_what_has_no_positions_is_refused():
    loss, tokens, rows, square = NSTLoss(), torch.randn(3, 6, 5), torch.randn(3, 6), torch.randn(3, 5, 4, 4)
    with pytest.raises(ValueError, match=r"student_features has shape \(3, 6\): this loss compares positions"):
        loss(rows, rows)
    with pytest.raises(ValueError, match=r"student_features\[0\] has shape \(3, 6, 5\) and rows is not given"):
        loss([tokens], [tokens])
    for x, how in ((tokens, "tokens"), (tokens, "mean"), (square, "groups"), (square, "gap"), (square, "flatten")):
        with pytest.raises(ValueError, match=f"with rows='{how}': this loss compares the positions of each sample"):
            loss(x, x, rows=how)
    with pytest.raises(ValueError, match=r"teacher_features has positions \(4,\), student_features \(6,\)"):
        loss(tokens, tokens[:, :4], rows="groups")
    with pytest.raises(ValueError, match="teacher_features has 2 rows, student_features has 3"):
        loss(square, square[:2])
    with pytest.raises(ValueError, match=r"mask has shape \(3, 5\): for student_features give \(3,\) or \(3, 6\)"):
        loss(tokens, tokens, rows="groups", mask=torch.ones(3, 5, dtype=torch.bool))
