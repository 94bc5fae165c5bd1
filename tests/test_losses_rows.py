# SPDX-License-Identifier: Apache-2.0
"""Levels, groups of tokens, masks and labels, asked of all losses of a kind: the loss on the rows that are left."""

import pytest
import torch

import kdkernels as kd
from kdkernels import losses

# compare the samples of a batch; rows="groups" compares the tokens of each sample
SAMPLES = {
    "cka": losses.CKALoss,
    "cka biased": lambda **how: losses.CKALoss("rbf", unbiased=False, **how),
    "sp": losses.SPLoss,
    "gram mse": losses.GramMSELoss,
    "mmd": losses.MMDLoss,
    "mmd transfer": lambda **how: losses.MMDLoss.preset("transfer", **how),
    "rkd distance": losses.RKDDistanceLoss,
    "rkd angle": losses.RKDAngleLoss,
    "rkd": losses.RKDLoss,
    "pkt": losses.PKTLoss,
    "cc": losses.CCLoss,
    "cc taylor": lambda **how: losses.CCLoss("taylor", **how),
}
LEVELS = SAMPLES | {"at": losses.ATLoss, "ickd": losses.ICKDLoss, "nst": losses.NSTLoss}
LOGITS = {
    "kd": losses.KDLoss,
    "kd reverse": lambda: losses.KDLoss(divergence="reverse"),
    "kd jsd": lambda: losses.KDLoss(divergence="jsd"),
    "dist": losses.DISTLoss,
    "dkd": losses.DKDLoss,
    "cmkd": losses.CMKDLoss,
    "cmkd classes": lambda: losses.CMKDLoss(class_weight=1.0),
}


def sides(*shape):
    student, teacher = torch.randn(2, *shape, dtype=torch.float64)
    return student, teacher + student


def poisoned(mask, *tensors):
    return [torch.where(mask[..., None], t, torch.nan) for t in tensors]


@pytest.mark.parametrize("name", LEVELS)
def test_levels_are_summed_with_their_weights(name):
    make, levels = LEVELS[name], [sides(8, 10, 2, 2), sides(8, 6, 2, 2)]
    total, parts = make(weights=[2.0, 0.5], weight=3.0)(*zip(*levels, strict=True), return_parts=True)
    one, two = (make()(*pair) for pair in levels)
    assert {part.rpartition("_")[2] for part in parts} == {"0", "1"}
    torch.testing.assert_close(total, 6 * one + 1.5 * two, rtol=1e-6, atol=0)
    torch.testing.assert_close(sum(v for part, v in parts.items() if part.endswith("_0")), 6 * one, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [*LEVELS, "pcka"])
def test_levels_have_masks_of_their_own_and_dicts_are_matched_by_key(name):
    make, sizes = (LEVELS | {"pcka": losses.PCKALoss})[name], {"p3": (17, 20), "p2": (6, 33)}
    how = {} if name == "pcka" else {"rows": "positions"}
    keep = {key: torch.rand(3, *size) > 0.3 for key, size in sizes.items()}
    pairs = {key: sides(3, 4, *size) for key, size in sizes.items()}
    student, teacher = ({key: pair[side] for key, pair in pairs.items()} for side in (0, 1))
    dirty = {key: torch.where(keep[key][:, None], x, torch.nan) for key, x in student.items()}
    loss = make(weights=[2.0, 0.5])
    want = sum(w * make()(*pairs[key], mask=keep[key], **how) for key, w in (("p3", 2.0), ("p2", 0.5)))
    others = [dict(reversed(of.items())) for of in (teacher, keep)]
    total, parts = loss(dirty, others[0], mask=others[1], return_parts=True, **how)
    torch.testing.assert_close(total, want, rtol=1e-6, atol=0)
    assert {part.rpartition("_")[2] for part in parts} == {"p3", "p2"}
    of_lists = [list(side.values()) for side in (dirty, teacher)]
    assert loss(*of_lists, mask=list(keep.values()), **how).equal(total)
    one = torch.tensor([True, False, True])
    want = sum(w * make()(*pairs[key], mask=one, **how) for key, w in (("p3", 2.0), ("p2", 0.5)))
    torch.testing.assert_close(loss(student, teacher, mask=one, **how), want, rtol=1e-6, atol=0)


def test_levels_that_do_not_match_are_named():
    loss, (x, y) = losses.CKALoss(), sides(5, 4)
    mask = torch.ones(5, dtype=torch.bool)
    for student, teacher, given, text in (
        (
            {"a": x, "b": x},
            {"a": y, "c": y},
            None,
            r"teacher_features has \['a', 'c'\] levels, student_features has \['a', 'b'\]",
        ),
        ([x, x], [y], None, "teacher_features has 1 levels, student_features has 2"),
        ({"a": x}, {"a": y[:4]}, None, r"teacher_features\['a'\] has 4 rows, student_features\['a'\] has 5"),
        ([x, x], [y, y], [mask], r"mask has levels \[0\], student_features \[0, 1\]"),
        ({"a": x}, {"a": y}, {"b": mask}, r"mask has levels \['b'\], student_features \['a'\]"),
        ({}, {}, None, "student_features is an empty dict"),
    ):
        with pytest.raises(ValueError, match=text):
            loss(student, teacher, mask=given)
    for student, teacher, given in (({"a": x}, [y], None), ([x], y, None), (x, y, [mask]), ([x], [y], 3)):
        with pytest.raises(TypeError, match="give two|mask is a"):
            loss(student, teacher, mask=given)


@pytest.mark.parametrize("name", SAMPLES)
def test_groups_are_compared_one_by_one_and_tokens_together_without_those_that_the_mask_leaves_out(name):
    make, (student, teacher) = SAMPLES[name], sides(4, 9, 6)
    mask = torch.rand(4, 9) > 0.3
    mask[:3, :4] = True
    mask[3] = torch.arange(9) == 2  # too few for most: such a group enters no mean
    dirty, loss = poisoned(mask, student, teacher), make()
    kept = [loss(s[m], t[m]) for s, t, m in zip(student, teacher, mask, strict=True) if m.sum() >= loss.least]
    groups = make(rows="groups")(*dirty, mask=mask)
    torch.testing.assert_close(groups, sum(kept) / len(kept), rtol=1e-9, atol=1e-13)
    tokens = make(rows="tokens")(*dirty, mask=mask)
    torch.testing.assert_close(tokens, loss(student[mask], teacher[mask]), rtol=1e-9, atol=1e-13)
    with pytest.raises(ValueError, match="rows is not given"):
        loss(student, teacher)


@pytest.mark.parametrize("name", LOGITS)
def test_tokens_are_rows_and_those_with_an_ignored_label_or_masked_do_not_count(name):
    loss, (student, teacher) = LOGITS[name](), sides(3, 5, 7)
    student.requires_grad_()
    labels, mask = torch.randint(7, (3, 5)), torch.rand(3, 5) > 0.3
    mask[:, 0] = mask[0, 1] = mask[2, 4] = True
    labels[0, 1] = labels[2, 4] = 7
    kept = mask & (labels != 7)
    classes = {"labels": labels[kept]} if isinstance(loss, losses.DKDLoss) else {}
    want = loss(student[kept], teacher[kept], **classes)
    value = loss(student, teacher, labels=labels, mask=mask, ignore_index=7)
    torch.testing.assert_close(value, want, rtol=1e-10, atol=1e-12)
    (gradient,) = torch.autograd.grad(value, student)
    assert (gradient[~kept] == 0).all() and (gradient[kept] != 0).any(-1).all()


def test_micro_batches_with_a_common_normalizer_add_up_to_the_whole_batch():
    student, teacher = sides(12, 7)
    mask, labels = torch.rand(12) > 0.3, torch.arange(12) % 7
    whole = kd.mixup(student, labels, per_sample=True, generator=torch.Generator().manual_seed(0))
    parts = slice(0, 5), slice(5, 12)
    for loss, given in (
        (losses.KDLoss(), lambda i: ()),
        (losses.CMKDLoss(), lambda i: ()),
        (losses.DISTLoss(gamma=0.0), lambda i: ()),  # columns are of the batch at hand
        (losses.DKDLoss(), lambda i: (labels[i],)),
        (losses.STKDLoss(), lambda i: (whole._replace(**{
            name: getattr(whole, name)[i] for name in ("labels", "permuted_labels", "lam")
        }),)),
    ):  # fmt: skip
        want = loss(student, teacher, *given(slice(None)), mask=mask)
        for count in (float(mask.sum()), mask.sum()):
            each = [loss(student[i], teacher[i], *given(i), mask=mask[i], normalizer=count) for i in parts]
            torch.testing.assert_close(sum(each), want, rtol=1e-9, atol=0)
