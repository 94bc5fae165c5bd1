# SPDX-License-Identifier: Apache-2.0
"""PCKALoss against a float64 transcription of the public code's loop over channels, and where that is not finite."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import kdkernels as kd
from kdkernels.gram import patches
from kdkernels.losses import PCKALoss


def naive_cka(X, Y):
    K, L = X @ X.T, Y @ Y.T
    return (K @ L.T).trace() / ((K @ K.T).trace() * (L @ L.T).trace()).sqrt()


def patches_of(maps, size):
    """Patches in the order a reader sees them: [C, patches, B 256], element by element."""
    maps = F.interpolate(maps, size, mode="bilinear")
    B, C, H, W = maps.shape
    corners = [(u, v) for u in range(0, H, 16) for v in range(0, W, 16)]
    rows = [maps[:, :, u : u + 16, v : v + 16].transpose(0, 1).reshape(C, -1) for u, v in corners]
    return torch.stack(rows, dim=1)


def public(student, teacher, transposed=False):
    """Mean over the channels of -CKA, as the public loop has it."""
    size = [(n // 16 + (n % 16 > 0)) * 16 for n in teacher.shape[2:]]
    X, Y = patches_of(student, size), patches_of(teacher, size)
    if transposed:
        X, Y = X.mT, Y.mT
    return -sum(naive_cka(y, x) for x, y in zip(X, Y, strict=True)) / len(X)


def maps(*shape, other=None):
    torch.manual_seed(0)
    student = torch.randn(shape, dtype=torch.float64)
    teacher = torch.randn(other or shape, dtype=torch.float64) + 0.3
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("shape", [(2, 3, 37, 50), (1, 2, 32, 16), (3, 1, 5, 33)])
def test_value_and_gradient_are_those_of_the_public_loop(shape, backend):
    student, teacher = maps(*shape)
    value = PCKALoss(backend=backend)(student, teacher)
    expected = 15 * public(student, teacher)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    mine, theirs = (torch.autograd.grad(v, student)[0] for v in (value, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name, transposed", [("detection", 0), ("two_stage_detection", 1)])
def test_the_presets_are_the_detection_configurations(name, transposed):
    student, teacher = maps(2, 3, 20, 33)
    total, parts = PCKALoss.preset(name)(student, teacher, return_parts=True)
    expected = {"patches": 10 * public(student, teacher)}
    if transposed:
        expected["transposed"] = 10 * public(student, teacher, transposed=True)
    torch.testing.assert_close(parts, expected, rtol=1e-12, atol=0)
    mine, theirs = (torch.autograd.grad(v, student)[0] for v in (total, sum(expected.values())))
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-13)
    with pytest.raises(ValueError, match="preset is 'two_stage': give one of"):
        PCKALoss.preset("two_stage")


def test_levels_are_summed_with_their_weights():
    pairs = [maps(2, 3, *size) for size in ((40, 20), (20, 10), (10, 5))]
    students, teachers = ([pair[side] for pair in pairs] for side in (0, 1))
    each = [public(s, t) for s, t in pairs[:2]]
    loss = PCKALoss(weights=[1, 0.5, 2], weight=3.0)
    # a level of one patch has nothing to learn from: the public code fails there
    with pytest.warns(UserWarning, match="a batch of 1 patches of 16 x 16 and needs 2"):
        total, parts = loss(students, teachers, return_parts=True)
    assert list(parts) == ["patches_0", "patches_1", "patches_2"]
    torch.testing.assert_close(total, 3 * (each[0] + 0.5 * each[1]), rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(total, students)
    assert gradients[0].abs().max() > 1e-5 and (gradients[2] == 0).all()
    with pytest.raises(ValueError, match="student_features has 3 levels, weights has 2"):
        PCKALoss(weights=[1, 1])(students, teachers)
    with pytest.raises(ValueError, match="teacher_features has 2 levels, student_features has 3"):
        loss(students, teachers[:2])


def test_maps_of_other_sizes_are_compared_where_they_round_to_the_same_patches():
    student, teacher = maps(2, 3, 30, 18, other=(2, 3, 25, 32))
    torch.testing.assert_close(PCKALoss()(student, teacher), 15 * public(student, teacher), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match=r"teacher_features has maps of \(33, 32\), student_features of \(30, 18\)"):
        PCKALoss()(student, torch.randn(2, 3, 33, 32))


def test_a_channel_of_zeros_counts_as_unaligned_where_the_public_code_is_nan():
    student, teacher = maps(2, 4, 32, 32)
    alone = 15 * public(student[:, :3], teacher[:, :3]) * 3 / 4
    for side in (0, 1):
        pair = [student.detach().clone(), teacher.clone()]
        pair[side][:, 3] = 0
        pair[0].requires_grad_()
        assert public(*pair).isnan()
        value = PCKALoss()(*pair)
        torch.testing.assert_close(value, alone, rtol=1e-12, atol=0)
        assert torch.autograd.grad(value, pair[0])[0].isfinite().all()
    student, teacher = maps(2, 4, 32, 32)
    with torch.no_grad():
        student[:, :, :16, :16] = 0  # a zero row is no trouble, nor is it with row norms
    for loss in (PCKALoss(), PCKALoss(row_normalize=True, transposed=1)):
        value = loss(student, teacher)
        assert value.isfinite() and torch.autograd.grad(value, student)[0].isfinite().all()


def test_identical_maps_are_aligned_and_have_no_gradient():
    student, _ = maps(2, 3, 32, 48)
    value = PCKALoss(transposed=0.5)(student, student.detach())
    torch.testing.assert_close(value.item(), -22.5, rtol=1e-12, atol=0)
    assert torch.autograd.grad(value, student)[0].abs().max() < 1e-12


@pytest.mark.parametrize(
    "how",
    [
        {"center": True},
        {"center": True, "unbiased": True},
        {"row_normalize": True},
        {"kernel": "rbf", "center": True},
        {"kernel": (kd.Cosine(), kd.Polynomial())},
    ],
    ids=str,
)
def test_the_textbook_variants_are_the_op_on_the_patches_of_each_channel(how):
    student, teacher = maps(2, 3, 37, 50)
    options = {"center": False, "unbiased": False, "kernel": "linear", "row_normalize": False, **how}
    X, Y = patches_of(student, (48, 64)), patches_of(teacher, (48, 64))
    for transposed in (0.0, 0.25):
        expected = -sum(kd.cka(x, y, **options) for x, y in zip(X, Y, strict=True)) / 3
        if transposed:
            expected = expected - 0.25 * sum(kd.cka(x.T, y.T, **options) for x, y in zip(X, Y, strict=True)) / 3
        value = PCKALoss(weight=1.0, transposed=transposed, **how)(student, teacher)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("how", [{}, {"center": True}, {"kernel": "rbf", "center": True}, {"kernel": "rbf"}], ids=str)
def test_a_masked_sample_takes_no_part_in_any_variant(how):
    student, teacher = maps(4, 2, 20, 33)
    mask = torch.tensor([True, False, True, True])
    loss = PCKALoss(transposed=0.5, **how)
    kept = student.detach()[mask].requires_grad_()
    expected = loss(kept, teacher[mask])
    poisoned, poison = student.detach().clone(), teacher.clone()
    poisoned[1], poison[1] = float("nan"), float("inf")
    poisoned.requires_grad_()
    value = loss(poisoned, poison, mask=mask)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    mine, theirs = torch.autograd.grad(value, poisoned)[0], torch.autograd.grad(expected, kept)[0]
    torch.testing.assert_close(mine[mask], theirs, rtol=1e-8, atol=1e-12)
    assert (mine[1] == 0).all()
    value = loss(poisoned, poison, mask=torch.zeros(4, dtype=torch.bool))
    assert value == 0 and (torch.autograd.grad(value, poisoned)[0] == 0).all()


def test_a_masked_position_is_zero_on_both_sides_before_the_resize():
    student, teacher = maps(2, 3, 30, 40)
    mask = torch.rand(2, 30, 40) > 0.3
    zeroed = [torch.where(mask[:, None], side, 0) for side in (student, teacher)]
    expected = 15 * public(*zeroed)
    with torch.no_grad():
        poisoned = torch.where(mask[:, None], student, float("nan")).requires_grad_()
    value = PCKALoss()(poisoned, torch.where(mask[:, None], teacher, float("inf")), mask=mask)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    grad = torch.autograd.grad(value, poisoned)[0]
    torch.testing.assert_close(grad, torch.autograd.grad(expected, student)[0], rtol=1e-9, atol=1e-13)
    assert (grad[~mask[:, None].expand_as(grad)] == 0).all()


def test_a_mask_that_cannot_be_honoured_is_refused():
    student, teacher = maps(2, 3, 30, 40)
    positions = torch.ones(2, 30, 40, dtype=torch.bool)
    for how in ({"center": True}, {"kernel": "rbf"}, {"kernel": ("linear", "cosine")}):
        with pytest.raises(ValueError, match="positions can be left out of the linear, uncentred CKA only"):
            PCKALoss(**how)(student, teacher, mask=positions)
    with pytest.raises(
        ValueError, match=r"mask has shape \(2, 30, 40\), and not every map has the size of student_features"
    ):
        PCKALoss()(student, torch.randn(2, 3, 32, 40), mask=positions)
    with pytest.raises(
        ValueError, match=r"mask has shape \(2, 40\): for student_features give \(2,\) or \(2, 30, 40\)"
    ):
        PCKALoss()(student, teacher, mask=positions[:, 0])
    with pytest.raises(TypeError, match="mask is torch.float32"):
        PCKALoss()(student, teacher, mask=positions.float())


def test_what_is_no_pair_of_feature_maps_is_refused():
    student, teacher = maps(2, 3, 30, 40)
    with pytest.raises(ValueError, match=r"student_features has shape \(2, 3, 30\): give feature maps"):
        PCKALoss()(student[..., 0], teacher)
    with pytest.raises(ValueError, match=r"teacher_features\[1\] has 2 channels, student_features\[1\] has 3"):
        PCKALoss()([student, student], [teacher, teacher[:, :2]])
    with pytest.raises(ValueError, match=r"with rows='gap': give feature maps \[B, C, H, W\], no rows"):
        PCKALoss()(student, teacher, rows="gap")
    with pytest.raises(ValueError, match="center=False with unbiased=True"):
        PCKALoss(unbiased=True)
    with pytest.raises(ValueError, match=r"transposed is \[1.0\]: give one number"):
        PCKALoss(transposed=[1.0])


def test_a_level_with_too_few_patches_for_the_estimator_adds_nothing_and_warns_once():
    pairs = [maps(2, 3, 40, 30), maps(2, 3, 17, 12)]
    students, teachers = ([pair[side] for pair in pairs] for side in (0, 1))
    loss = PCKALoss(center=True, unbiased=True, transposed=1)
    with pytest.warns(UserWarning, match="a batch of 2 patches of 16 x 16 and needs 4") as caught:
        total, parts = loss(students, teachers, return_parts=True)
        loss(students, teachers)
    assert len(caught) == 1 and "drop_last" not in str(caught[0].message)
    assert parts["patches_1"] == parts["transposed_1"] == 0 and parts["patches_0"] != 0 != parts["transposed_0"]
    assert (torch.autograd.grad(total, students[1])[0] == 0).all()


def test_half_maps_are_resized_in_float32_and_channels_last_ones_give_the_same():
    student, teacher = (side.detach().to(torch.bfloat16) for side in maps(2, 3, 37, 50))
    value = PCKALoss()(student, teacher)
    assert value.equal(PCKALoss()(student.float(), teacher.float()))
    last = [side.contiguous(memory_format=torch.channels_last) for side in (student, teacher)]
    torch.testing.assert_close(PCKALoss()(*last), value, rtol=1e-6, atol=0)


def test_blocks_of_channels_are_the_whole(monkeypatch):
    student, teacher = maps(2, 5, 20, 40)
    whole = PCKALoss(transposed=1)(student, teacher)
    expected = torch.autograd.grad(whole, student)[0]
    monkeypatch.setattr(patches, "BLOCK", 2 * 2 * 32 * 48)
    assert len(patches._blocks(student, (32, 48))) == 3
    value = PCKALoss(transposed=1)(student, teacher)
    torch.testing.assert_close(value, whole, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.autograd.grad(value, student)[0], expected, rtol=1e-9, atol=1e-14)


def test_maps_of_any_scale_have_the_same_value_where_products_of_sums_leave_float32():
    student, teacher = (side.detach().float() for side in maps(2, 3, 20, 40))
    value = PCKALoss(transposed=1)(student, teacher)
    for size in (1e-12, 1e12):
        torch.testing.assert_close(PCKALoss(transposed=1)(size * student, teacher / size), value, rtol=1e-5, atol=0)


def test_backward_keeps_the_maps_and_small_matrices_but_no_patches():
    student, teacher = (side.detach().float() for side in maps(2, 4, 100, 60))
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        PCKALoss()(student.requires_grad_(), teacher)
    n = 7 * 4
    assert student.nbytes + teacher.nbytes <= sum(kept.values())
    assert sum(kept.values()) <= student.nbytes + teacher.nbytes + 4 * (2 * n * n + 16) * 4


def test_compiled_once_it_takes_maps_of_every_size():
    torch._dynamo.reset()
    loss, counter = PCKALoss(transposed=1), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter, dynamic=True)
    for size in ((40, 30), (50, 70), (20, 100)):
        student, teacher = maps(2, 3, *size)
        value, expected = compiled(student, teacher), loss(student, teacher)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(*(torch.autograd.grad(v, student)[0] for v in (value, expected)))
    assert counter.frame_count == 1
