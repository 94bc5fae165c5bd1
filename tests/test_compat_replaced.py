# SPDX-License-Identifier: Apache-2.0
"""Losses that stand in the places of MMRazor's and torchdistill's own: their arguments, defaults, values, gradients."""

import inspect

import originals
import pytest
import torch
import torch.nn.functional as F
from originals import features, logits, untyped

from kdkernels.compat import mmrazor_losses, torchdistill_losses

LABELS = torch.tensor([0, 6, 3, 3, 1])
MAPPED_LABELS = torch.arange(2 * 12).reshape(2, 3, 4) % 7


def maps(dtype):
    return torch.randn(2, 7, 3, 4, dtype=dtype), torch.randn(2, 7, 3, 4, dtype=dtype)


def kl_of_maps(student, teacher, tau):
    """One number a position."""
    return originals.kl(student.movedim(1, -1), teacher.movedim(1, -1), tau)


def of_rkd(formula, student, teacher):
    return formula(*map(originals.unit_rows, (student, teacher)))


# (name, arguments, arguments of the call behind the two sides, inputs, MMRazor's formula)
MMRAZOR = [
    ("KLDivergence", {}, (), logits, lambda s, t: originals.kl(s, t, 1).mean()),
    ("KLDivergence", {"tau": 3.0, "loss_weight": 2.0}, (), maps, lambda s, t: 2 * kl_of_maps(s, t, 3).sum() / 2),
    ("KLDivergence", {"reduction": "sum"}, (), maps, lambda s, t: kl_of_maps(s, t, 1).sum()),
    ("KLDivergence", {"reduction": "mean"}, (), maps, lambda s, t: kl_of_maps(s, t, 1).mean() / 7),
    ("ChannelWiseDivergence", {}, (), maps, lambda s, t: originals.kl(s.flatten(2), t.flatten(2), 1).mean()),
    (
        "ChannelWiseDivergence",
        {"tau": 4.0, "loss_weight": 3.0},
        (),
        maps,
        lambda s, t: 3 * originals.kl(s.flatten(2), t.flatten(2), 4).mean(),
    ),
    ("DKDLoss", {}, (LABELS,), logits, lambda s, t: originals.dkd(s, t, LABELS, 1, 1, 1)),
    (
        "DKDLoss",
        {"tau": 4.0, "alpha": 0.5, "beta": 8.0, "reduction": "sum", "loss_weight": 2.0},
        (LABELS[:, None],),
        logits,
        lambda s, t: 10 * originals.dkd(s, t, LABELS, 0.5, 8, 4),
    ),
    ("DISTLoss", {}, (), logits, lambda s, t: originals.dist(s, t, 1, 1, 1)),
    (
        "DISTLoss",
        {"inter_loss_weight": 2.0, "intra_loss_weight": 3.0, "tau": 4.0, "loss_weight": 0.5},
        (),
        logits,
        lambda s, t: originals.dist(s, t, 2, 3, 4) / 2,
    ),
    ("ATLoss", {}, (), maps, lambda s, t: originals.attention(s, t, 2)),
    ("DistanceWiseRKD", {}, (), features, lambda s, t: 25 * of_rkd(originals.relational_distance, s, t)),
    ("AngleWiseRKD", {}, (), features, lambda s, t: 50 * of_rkd(originals.relational_angle, s, t)),
    (
        "AngleWiseRKD",
        {"with_l2_norm": False, "loss_weight": 2.0},
        (),
        features,
        lambda s, t: 2 * originals.relational_angle(s, t),
    ),
]
TAIL = {"path": "fc", "io": "output"}
AT = {"student_module_path": "fc", "student_module_io": "output"} | {
    "teacher_module_path": "fc",
    "teacher_module_io": "output",
}
OUT = {"student_output_path": "fc", "teacher_output_path": "fc"}
PAIRS = {"one": {"student": TAIL, "teacher": TAIL}, "two": {"student": TAIL, "teacher": TAIL, "weight": 2.5}}
CE = {"temperature": 3.0, "alpha": 0.25}
# (name, arguments, targets, inputs, torchdistill's formula)
TORCHDISTILL = [
    (
        "KDLoss",
        AT | CE | {"label_smoothing": 0.1},
        LABELS,
        logits,
        lambda s, t: 0.25 * F.cross_entropy(s, LABELS, label_smoothing=0.1) + 0.75 * originals.kl(s, t, 3).mean(),
    ),
    (
        "KDLoss",
        AT | CE | {"beta": 2.0},
        MAPPED_LABELS,
        maps,
        lambda s, t: 0.25 * F.cross_entropy(s, MAPPED_LABELS) + 2 * kl_of_maps(s, t, 3).sum() / 2,
    ),
    (
        "KDLoss",
        AT | CE | {"reduction": "sum"},
        LABELS,
        logits,
        lambda s, t: 0.25 * F.cross_entropy(s, LABELS, reduction="sum") + 0.75 * originals.kl(s, t, 3).sum(),
    ),
    (
        "KDLoss",
        AT | CE | {"reduction": "mean"},
        LABELS,
        logits,
        lambda s, t: 0.25 * F.cross_entropy(s, LABELS) + 0.75 * originals.kl(s, t, 3).mean() / 7,
    ),
    # the KL alone, neither weighted nor times tau^2
    ("KDLoss", AT | CE, None, logits, lambda s, t: originals.kl(s, t, 3).mean() / 9),
    ("KDLoss", AT | CE | {"alpha": 0}, LABELS, logits, lambda s, t: originals.kl(s, t, 3).mean() / 9),
    ("KDLoss", AT | CE | {"alpha": None, "beta": 5}, LABELS, logits, lambda s, t: originals.kl(s, t, 3).mean() / 9),
    ("PKTLoss", AT, None, features, originals.probabilistic),
    (
        "RKDLoss",
        OUT | {"dist_factor": 1.0, "angle_factor": 2.0, "reduction": "mean"},
        None,
        features,
        lambda s, t: originals.relational(s, t, 1, 2),
    ),
    (
        "RKDLoss",
        OUT | {"dist_factor": 3.0, "angle_factor": 0.5, "reduction": "sum", "more": 1},
        None,
        features,
        lambda s, t: originals.relational(s, t, 3 * 6**2, 0.5 * 6**3),
    ),
    ("ATLoss", {"at_pairs": PAIRS}, None, maps, lambda s, t: 3.5 * originals.attention(s, t, 2)),
    ("ChSimLoss", {"feature_pairs": PAIRS}, None, maps, lambda s, t: 3.5 * originals.inter_channel(s, t) / 2),
]


def mmrazor(name, arguments, more, inputs, formula):
    loss = getattr(mmrazor_losses, name)(**arguments)
    return lambda s, t: loss(s, t, *more), inputs, formula


def torchdistill(name, arguments, targets, inputs, formula):
    loss = getattr(torchdistill_losses, name)(**arguments)
    return lambda s, t: loss({"fc": {"output": s}}, {"fc": {"output": t}}, targets), inputs, formula


CASES = [mmrazor(*case) for case in MMRAZOR] + [torchdistill(*case) for case in TORCHDISTILL]
IDS = [f"mmrazor-{case[0]}" for case in MMRAZOR] + [f"torchdistill-{case[0]}" for case in TORCHDISTILL]


def test_every_loss_that_replaces_one_is_a_case():
    assert {case[0] for case in MMRAZOR} == set(mmrazor_losses.__all__)
    assert {case[0] for case in TORCHDISTILL} == set(torchdistill_losses.__all__)


@pytest.mark.parametrize("loss, inputs, formula", CASES, ids=IDS)
def test_a_loss_has_the_value_and_the_gradient_of_the_original(loss, inputs, formula):
    student, teacher = inputs(torch.float64)
    student.requires_grad_()
    value, expected = loss(student, teacher), formula(student, teacher)
    assert value.shape == () and value.dtype == torch.float64
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=0)
    found, wanted = (torch.autograd.grad(v, student)[0] for v in (value, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("loss, inputs, formula", CASES, ids=IDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_inputs_are_computed_in_float32(loss, inputs, formula, autocast):
    student, teacher = inputs(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = loss(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), formula(student.double(), teacher.double()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss, inputs, formula", CASES, ids=IDS)
def test_second_derivatives_are_the_originals_or_raise(loss, inputs, formula, request):
    student, teacher = inputs(torch.float64)
    student.requires_grad_()
    if any(name in request.node.name for name in ("ATLoss", "DISTLoss")):
        found, wanted = (originals.second(form(student, teacher), student) for form in (loss, formula))
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-14)
    else:
        with pytest.raises(RuntimeError, match="second derivative"):
            originals.second(loss(student, teacher), student)


def test_gradients_reach_the_teacher_where_data_free_distillation_asks_for_them():
    student, teacher = logits(torch.float64)
    teacher.requires_grad_()
    free = mmrazor_losses.KLDivergence(tau=2.0, teacher_detach=False)(student, teacher)
    (found,) = torch.autograd.grad(free, teacher)
    (expected,) = torch.autograd.grad(originals.kl(student, teacher, 2).mean(), teacher)
    torch.testing.assert_close(found, expected)
    assert not mmrazor_losses.KLDivergence()(student, teacher).requires_grad


REFUSED = [
    (mmrazor_losses.KLDivergence, {"reduction": "none"}, "reduction is 'none': 'batchmean' and 'sum' and 'mean' are"),
    (mmrazor_losses.DKDLoss, {"reduction": "mean"}, "reduction is 'mean': 'batchmean' and 'sum' are computed here"),
    (mmrazor_losses.DISTLoss, {"teacher_detach": False}, "teacher_detach is False"),
    (torchdistill_losses.KDLoss, AT | CE | {"reduction": "none"}, "reduction is 'none'"),
    (torchdistill_losses.RKDLoss, OUT | {"dist_factor": 1, "angle_factor": 1, "reduction": "none"}, "reduction is"),
    (torchdistill_losses.ATLoss, {"at_pairs": PAIRS, "mode": "paper"}, "mode is 'paper': only mode='code'"),
    (torchdistill_losses.PKTLoss, AT | {"eps": 1e-3}, "eps is 0.001: only eps=1e-7"),
]


@pytest.mark.parametrize("loss, arguments, message", REFUSED)
def test_what_is_not_computed_here_is_refused_when_the_configuration_is_read(loss, arguments, message):
    with pytest.raises(ValueError, match=message):
        loss(**arguments)


# of the constructor, and the names by which MMRazor's mappings call
SIGNATURES = {
    "ATLoss": ("(loss_weight=1.0)", ["s_feature", "t_feature"]),
    "AngleWiseRKD": ("(loss_weight=50.0, with_l2_norm=True)", ["preds_S", "preds_T"]),
    "ChannelWiseDivergence": ("(tau=1.0, loss_weight=1.0)", ["preds_S", "preds_T"]),
    "DISTLoss": (
        "(inter_loss_weight=1.0, intra_loss_weight=1.0, tau=1.0, loss_weight=1.0, teacher_detach=True)",
        ["logits_S", "logits_T"],
    ),
    "DKDLoss": (
        "(tau=1.0, alpha=1.0, beta=1.0, reduction='batchmean', loss_weight=1.0)",
        ["preds_S", "preds_T", "gt_labels"],
    ),
    "DistanceWiseRKD": ("(loss_weight=25.0, with_l2_norm=True)", ["preds_S", "preds_T"]),
    "KLDivergence": ("(tau=1.0, reduction='batchmean', loss_weight=1.0, teacher_detach=True)", ["preds_S", "preds_T"]),
}


def test_signatures_are_those_of_mmrazor():
    for name in mmrazor_losses.__all__:
        loss = getattr(mmrazor_losses, name)
        assert (untyped(loss), list(inspect.signature(loss.forward).parameters)[1:]) == SIGNATURES[name]
