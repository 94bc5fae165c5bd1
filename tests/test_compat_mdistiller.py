# SPDX-License-Identifier: Apache-2.0
"""mdistiller's functions: each equals the original's formula, written out in originals.py, in value and gradient."""

import math
import warnings

import originals
import pytest
import torch
from originals import every, features, logits, untyped

from kdkernels.compat import mdistiller, shared


def maps(channels, side, dtype, batch=5, width=None):
    return torch.randn(batch, channels, side, width or side, dtype=dtype)


def pairs_of_maps(dtype):
    """Three levels; other channels on the two sides, then a higher student, then a student higher and narrower."""
    student = [maps(4, 6, dtype), maps(3, 8, dtype), maps(3, 8, dtype, width=2)]
    return student, [maps(5, 6, dtype), maps(6, 4, dtype), maps(2, 4, dtype)]


LABELS = torch.tensor([0, 6, 3, 3, 1])


def over_levels(formula, *constants):
    return lambda student, teacher: sum(formula(s, t, *constants) for s, t in zip(student, teacher, strict=True))


# name: (inputs, arguments after them, the original's formula of the inputs)
CASES = {
    "kd_loss": (logits, (4.0,), lambda s, t: originals.kl(s, t, 4.0).mean()),
    "dkd_loss": (logits, (LABELS, 1.0, 8.0, 4.0), lambda s, t: originals.dkd(s, t, LABELS, 1.0, 8.0, 4.0)),
    "at_loss": (pairs_of_maps, (2,), over_levels(originals.attention, 2)),
    "nst_loss": (pairs_of_maps, (), over_levels(originals.nst)),
    "sp_loss": (pairs_of_maps, (), over_levels(originals.similarity)),
    "rkd_loss": (features, (), lambda s, t: originals.relational(s, t, 25, 50)),
    "pkt_loss": (features, (), originals.probabilistic),
}
SIGNATURES = {
    "kd_loss": "(logits_student, logits_teacher, temperature)",
    "dkd_loss": "(logits_student, logits_teacher, target, alpha, beta, temperature)",
    "at_loss": "(g_s, g_t, p)",
    "single_stage_at_loss": "(f_s, f_t, p)",
    "nst_loss": "(g_s, g_t)",
    "single_stage_nst_loss": "(f_s, f_t)",
    "pkt_loss": "(f_s, f_t, eps=1e-07)",
    "poly_kernel": "(a, b)",
    "rkd_loss": "(f_s, f_t, squared=False, eps=1e-12, distance_weight=25, angle_weight=50)",
    "sp_loss": "(g_s, g_t)",
    "similarity_loss": "(f_s, f_t)",
}
ONE_LEVEL = {"at_loss": "single_stage_at_loss", "nst_loss": "single_stage_nst_loss", "sp_loss": "similarity_loss"}


def test_the_names_and_signatures_are_the_originals():
    assert {name: untyped(getattr(mdistiller, name)) for name in mdistiller.__all__} == SIGNATURES
    assert set(CASES) | set(ONE_LEVEL.values()) | {"poly_kernel"} == set(SIGNATURES)


@pytest.fixture(params=CASES)
def name(request):
    return request.param


def test_a_function_has_the_value_and_the_gradient_of_the_original(name):
    inputs, constants, formula = CASES[name]
    student, teacher = inputs(torch.float64)
    for tensor in every(student):
        tensor.requires_grad_()
    value, expected = getattr(mdistiller, name)(student, teacher, *constants), formula(student, teacher)
    assert value.shape == ((1,) if name == "sp_loss" else ()) and value.dtype == torch.float64
    torch.testing.assert_close(value.sum(), expected, rtol=1e-11, atol=0)
    found = torch.autograd.grad(value.sum(), every(student))
    torch.testing.assert_close(found, torch.autograd.grad(expected, every(student)), rtol=1e-8, atol=1e-12)


def test_second_derivatives_are_the_originals_or_raise(name):
    inputs, constants, formula = CASES[name]
    student, teacher = inputs(torch.float64)
    first = every(student)[0].requires_grad_()
    value = getattr(mdistiller, name)(student, teacher, *constants)
    if name in ("at_loss",):
        wanted = originals.second(formula(student, teacher), first)
        torch.testing.assert_close(originals.second(value.sum(), first), wanted, rtol=1e-7, atol=1e-14)
    else:
        with pytest.raises(RuntimeError, match="second derivative"):
            originals.second(value.sum(), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_and_half_inputs_are_computed_in_float32(name, dtype):
    inputs, constants, formula = CASES[name]
    student, teacher = inputs(dtype)
    value = getattr(mdistiller, name)(student, teacher, *constants)
    wide = [[f.double() for f in side] if isinstance(side, list) else side.double() for side in (student, teacher)]
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.sum().double(), formula(*wide), rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", ONE_LEVEL)
def test_one_level_is_the_list_of_one_and_a_longer_list_is_cut(name):
    inputs, constants, _ = CASES[name]
    student, teacher = inputs(torch.float64)
    one, many = getattr(mdistiller, ONE_LEVEL[name]), getattr(mdistiller, name)
    value = one(student[0], teacher[0], *constants)
    assert value.equal(many(student[:1], teacher, *constants)) and value.equal(many(student, teacher[:1], *constants))
    assert many([], teacher, *constants) == 0


def test_inputs_stay_as_they_are_and_only_kd_loss_differentiates_the_teacher(name):
    inputs, constants, _ = CASES[name]
    student, teacher = inputs(torch.float64)
    before = [tensor.clone() for tensor in every(student) + every(teacher)]
    for tensor in every(student) + every(teacher):
        tensor.requires_grad_()
    getattr(mdistiller, name)(student, teacher, *constants).sum().backward()
    for tensor, old in zip(every(student) + every(teacher), before, strict=True):
        assert tensor.detach().equal(old)
    assert all((tensor.grad is not None) == (name == "kd_loss") for tensor in every(teacher))


def test_kd_loss_takes_classes_in_dimension_1_of_segmentation_logits_too():
    student, teacher = torch.randn(2, 7, 3, 4, dtype=torch.float64), torch.randn(2, 7, 3, 4, dtype=torch.float64)
    rows = (side.permute(0, 2, 3, 1).reshape(-1, 7) for side in (student, teacher))
    torch.testing.assert_close(mdistiller.kd_loss(student, teacher, 2.0), originals.kl(*rows, 2.0).mean())


def test_the_gradient_of_kd_loss_to_the_teacher_is_the_originals():
    student, teacher = logits(torch.float64)
    teacher.requires_grad_()
    (found,) = torch.autograd.grad(mdistiller.kd_loss(student, teacher, 3.0), teacher)
    (expected,) = torch.autograd.grad(originals.kl(student, teacher, 3.0).mean(), teacher)
    torch.testing.assert_close(found, expected)


def test_dkd_loss_is_finite_and_exact_where_the_original_is_infinite_or_forgets_to_hide_the_label():
    student = torch.tensor([[0.0, 500.0, 1.0], [2500.0, 0.0, 1.0]], requires_grad=True)
    teacher = torch.tensor([[5.0, 0.0, 1.0], [2500.0, 1.0, 0.0]])
    labels = torch.tensor([[0], [0]])  # a column is taken, as there
    value = mdistiller.dkd_loss(student, teacher, labels, 1.0, 8.0, 2.0)
    value.backward()
    expected = originals.dkd(student.detach().double(), teacher.double(), labels.flatten(), 1.0, 8.0, 2.0)
    assert math.isfinite(expected) and student.grad.isfinite().all()
    torch.testing.assert_close(value.detach().double(), expected, rtol=1e-6, atol=0)


def test_kd_loss_is_finite_where_both_sides_exclude_a_class():
    student, teacher = logits(torch.float64)
    student[:, 2] = teacher[:, 2] = -math.inf
    rest = [0, 1, 3, 4, 5, 6]
    expected = originals.kl(student[:, rest], teacher[:, rest], 4.0).mean()
    torch.testing.assert_close(mdistiller.kd_loss(student, teacher, 4.0), expected)


def test_rkd_loss_takes_its_weights_and_flattens_what_has_more_dimensions():
    student, teacher = torch.randn(5, 3, 2, dtype=torch.float64), torch.randn(5, 2, 4, dtype=torch.float64)
    value = mdistiller.similarity_loss(student, teacher)[0]
    torch.testing.assert_close(value, originals.similarity(student, teacher))
    for weights in ((1, 0), (0, 2), (3, 0.5)):
        value = mdistiller.rkd_loss(student, teacher, distance_weight=weights[0], angle_weight=weights[1])
        torch.testing.assert_close(value, originals.relational(student, teacher, *weights))


def test_constants_that_are_not_computed_here_are_refused():
    student, teacher = features(torch.float32)
    for changed in ({"squared": True}, {"eps": 1e-6}):
        with pytest.raises(ValueError, match="only squared=False, eps=1e-12"):
            mdistiller.rkd_loss(student, teacher, **changed)
    with pytest.raises(ValueError, match="eps is 1e-06: only eps=1e-7"):
        mdistiller.pkt_loss(student, teacher, eps=1e-6)


def test_rkd_loss_and_pkt_loss_are_finite_for_one_sample_for_identical_ones_and_for_zeros():
    student, teacher = features(torch.float32)
    student[1], student[2] = 0, student[3]
    student.requires_grad_()
    for function in (mdistiller.rkd_loss, mdistiller.pkt_loss):
        value = function(student, teacher)
        (gradient,) = torch.autograd.grad(value, student)
        assert value > 0 and gradient.isfinite().all() and gradient.abs().max() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # once for each module, whichever test comes first
        one = mdistiller.rkd_loss(student[:1], teacher[:1])
    (gradient,) = torch.autograd.grad(one, student)
    assert one == 0 and (gradient == 0).all()


def test_odd_powers_of_attention_take_the_absolute_value():
    student, teacher = maps(4, 6, torch.float64), maps(5, 6, torch.float64)
    expected = originals.attention(student.abs(), teacher.abs(), 3)
    torch.testing.assert_close(mdistiller.single_stage_at_loss(student, teacher, 3), expected)


def test_dead_channels_samples_and_maps_have_finite_gradients():
    student, teacher = maps(4, 6, torch.float32), maps(5, 6, torch.float32)
    student[:, 1], student[2], teacher[3] = 0, 0, 0
    student.requires_grad_()
    for one, constants in (("single_stage_at_loss", (2,)), ("single_stage_nst_loss", ()), ("similarity_loss", ())):
        value = getattr(mdistiller, one)(student, teacher, *constants)
        (gradient,) = torch.autograd.grad(value.sum(), student)
        assert value.isfinite().all() and gradient.isfinite().all() and gradient.abs().max() > 0, one


def test_a_temperature_that_changes_with_every_step_does_not_fill_the_memory():
    student, teacher = logits(torch.float64)
    for step in range(200):
        value = mdistiller.dkd_loss(student, teacher, LABELS, 1.0, 8.0, 1 + step / 100)
    torch.testing.assert_close(value, originals.dkd(student, teacher, LABELS, 1.0, 8.0, 2.99))
    assert len(shared._BUILT) <= shared.KEPT < 200


def test_autocast_changes_nothing(name):
    inputs, constants, _ = CASES[name]
    student, teacher = inputs(torch.float32)
    plain = getattr(mdistiller, name)(student, teacher, *constants)
    with torch.autocast("cpu", torch.bfloat16):
        assert getattr(mdistiller, name)(student, teacher, *constants).equal(plain)


def test_functions_compile_and_in_full_once_their_constants_were_seen():
    student, teacher = logits(torch.float32)

    def step(student, teacher):
        return mdistiller.dkd_loss(student, teacher, LABELS, 0.5, 2.0, 3.0) + mdistiller.kd_loss(student, teacher, 4.0)

    first = torch.compile(step, backend="aot_eager")(student, teacher)
    expected = step(student, teacher)
    in_full = torch.compile(step, backend="aot_eager", fullgraph=True)(student, teacher)
    torch.testing.assert_close(torch.stack([first, in_full]), expected.expand(2))
