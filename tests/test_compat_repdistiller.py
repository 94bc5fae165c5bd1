# SPDX-License-Identifier: Apache-2.0
"""RepDistiller's classes: constructors, what they take and return, and the formulas of originals.py in every entry."""

import warnings

import originals
import pytest
import torch
from originals import every, features, logits, untyped

from kdkernels.compat import repdistiller

SIZES = ((6, 6), (6, 6)), ((8, 8), (4, 4)), ((2, 2), (4, 4)), ((4, 4), (8, 2))


def maps(dtype, channels=((4, 5), (3, 6), (2, 2), (3, 4))):
    """Levels on both sides: other channels, and a higher student, then a higher teacher, then one also narrower."""
    levels = list(zip(channels, SIZES, strict=True))
    return tuple([torch.randn(5, c[k], *size[k], dtype=dtype) for c, size in levels] for k in (0, 1))


def stages(dtype):
    """For FSP: the same channels on both sides, sizes that fall and rise."""
    return maps(dtype, channels=((4, 4), (3, 3), (2, 2), (3, 3)))


def per_level(formula):
    return lambda student, teacher: [formula(s, t) for s, t in zip(student, teacher, strict=True)]


SHAPES = [(5, 4, 6, 6), (5, 3, 8, 8), (5, 2, 2, 2), (5, 3, 4, 4)]
# name: (constructor's arguments, inputs, the original's formula: a number, or a list of them)
CASES = {
    "DistillKL": ((4,), logits, lambda s, t: originals.kl(s, t, 4).mean()),
    "Similarity": ((), maps, per_level(originals.similarity)),
    "Attention": ((), maps, per_level(lambda s, t: originals.attention(s, t, 2))),
    "NSTLoss": ((), maps, per_level(originals.nst)),
    "FSP": ((SHAPES, SHAPES), stages, originals.flow),
    "RKDLoss": ((3, 0.5), features, lambda s, t: originals.relational(s, t, 3, 0.5)),
    "PKT": ((), features, originals.probabilistic),
    "Correlation": ((), logits, originals.congruence),
}
CONSTRUCTORS = {
    "DistillKL": "(T)",
    "Similarity": "()",
    "Attention": "(p=2)",
    "NSTLoss": "()",
    "FSP": "(s_shapes, t_shapes)",
    "RKDLoss": "(w_d=25, w_a=50)",
    "PKT": "()",
    "Correlation": "()",
}
CALLS = {
    "DistillKL": "(y_s, y_t)",
    "Similarity": "(g_s, g_t)",
    "Attention": "(g_s, g_t)",
    "NSTLoss": "(g_s, g_t)",
    "FSP": "(g_s, g_t)",
    "RKDLoss": "(f_s, f_t)",
    "PKT": "(f_s, f_t)",
    "Correlation": "(f_s, f_t)",
}
LISTS = [name for name in CALLS if CALLS[name] == "(g_s, g_t)"]


@pytest.fixture(params=CASES)
def name(request):
    return request.param


def made(name):
    return getattr(repdistiller, name)(*CASES[name][0])


def total(value):
    return sum(every(value)).sum()


def test_the_names_and_signatures_are_the_originals():
    assert set(repdistiller.__all__) == set(CONSTRUCTORS) == set(CASES)
    for name in repdistiller.__all__:
        loss = getattr(repdistiller, name)
        assert untyped(loss).replace("*args, **kwargs", "") == CONSTRUCTORS[name]
        assert untyped(loss.forward) == CALLS[name].replace("(", "(self, ", 1)


def test_a_class_has_the_values_and_the_gradients_of_the_original(name):
    _, inputs, formula = CASES[name]
    student, teacher = inputs(torch.float64)
    for tensor in every(student):
        tensor.requires_grad_()
    value, expected = made(name)(student, teacher), formula(student, teacher)
    assert isinstance(value, list) == (name in LISTS)
    for found, wanted in zip(every(value), every(expected), strict=True):
        assert found.shape == ((1,) if name == "Similarity" else ()) and found.dtype == torch.float64
        torch.testing.assert_close(found.sum(), wanted, rtol=1e-11, atol=0)
    gradients = torch.autograd.grad(total(value), every(student))
    torch.testing.assert_close(gradients, torch.autograd.grad(total(expected), every(student)), rtol=1e-8, atol=1e-12)


def test_second_derivatives_are_the_originals_or_raise(name):
    _, inputs, formula = CASES[name]
    student, teacher = inputs(torch.float64)
    first = every(student)[0].requires_grad_()
    value = total(made(name)(student, teacher))
    if name in ("Attention", "FSP", "Correlation"):
        wanted = originals.second(total(formula(student, teacher)), first)
        torch.testing.assert_close(originals.second(value.sum(), first), wanted, rtol=1e-7, atol=1e-14)
    else:
        with pytest.raises(RuntimeError, match="second derivative"):
            originals.second(value.sum(), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_and_half_inputs_are_computed_in_float32(name, dtype):
    _, inputs, formula = CASES[name]
    student, teacher = inputs(dtype)
    wide = [[f.double() for f in side] if isinstance(side, list) else side.double() for side in (student, teacher)]
    for found, wanted in zip(every(made(name)(student, teacher)), every(formula(*wide)), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.sum().double(), wanted, rtol=2e-6, atol=0)


def test_a_module_has_no_state_and_the_originals_repr(name):
    loss = made(name)
    assert repr(loss) == f"{name}()"
    assert not loss.state_dict() and not list(loss.buffers()) and not list(loss.parameters())


def test_inputs_stay_as_they_are_and_only_DistillKL_differentiates_the_teacher(name):
    student, teacher = CASES[name][1](torch.float64)
    before = [tensor.clone() for tensor in every(student) + every(teacher)]
    for tensor in every(student) + every(teacher):
        tensor.requires_grad_()
    total(made(name)(student, teacher)).backward()
    for tensor, old in zip(every(student) + every(teacher), before, strict=True):
        assert tensor.detach().equal(old)
    assert all((tensor.grad is not None) == (name == "DistillKL") for tensor in every(teacher))


@pytest.mark.parametrize("name", LISTS)
def test_a_longer_list_is_cut_to_the_shorter(name):
    student, teacher = CASES[name][1](torch.float64)
    whole = made(name)(student, teacher)
    for cut in (made(name)(student[:-1], teacher), made(name)(student, teacher[:-1])):
        assert len(cut) == len(whole) - 1 and all(a.equal(b) for a, b in zip(cut, whole, strict=False))


def test_DistillKL_sums_over_positions_and_divides_by_the_batch_alone():
    student, teacher = torch.randn(2, 7, 3, 4, dtype=torch.float64), torch.randn(2, 7, 3, 4, dtype=torch.float64)
    rows = (side.permute(0, 2, 3, 1).reshape(-1, 7) for side in (student, teacher))
    torch.testing.assert_close(repdistiller.DistillKL(2)(student, teacher), originals.kl(*rows, 2).sum() / 2)


def test_the_exponent_of_attention_is_the_argument():
    student, teacher = (torch.rand(5, 4, 6, 6, dtype=torch.float64) for _ in range(2))
    expected = originals.attention(student, teacher, 3)
    torch.testing.assert_close(repdistiller.Attention(p=3)([student], [teacher])[0], expected)
    torch.testing.assert_close(repdistiller.Attention(p=3).at_loss(student, teacher), expected)


def test_FSP_refuses_shapes_as_the_original_does():
    with pytest.raises(AssertionError, match="unequal length"):
        repdistiller.FSP(SHAPES, SHAPES[:2])
    with pytest.raises(ValueError, match="num of channels not equal"):
        repdistiller.FSP(SHAPES, [(5, 4, 6, 6), (5, 4, 8, 8), *SHAPES[2:]])


def test_the_default_weights_of_RKDLoss_are_25_and_50():
    student, teacher = features(torch.float64)
    torch.testing.assert_close(repdistiller.RKDLoss()(student, teacher), originals.relational(student, teacher, 25, 50))


def test_PKT_has_its_static_method_with_the_originals_default():
    student, teacher = features(torch.float64)
    assert repdistiller.PKT.cosine_similarity_loss(student, teacher, 1e-7).equal(repdistiller.PKT()(student, teacher))


def test_the_methods_that_the_originals_expose_make_up_their_losses():
    student, teacher = stages(torch.float64)
    flows = [repdistiller.FSP.compute_fsp(side) for side in (student, teacher)]
    assert [flow.shape for flow in flows[0]] == [(5, 3, 4), (5, 2, 3), (5, 3, 2)]  # the next map's channels first
    found = [repdistiller.FSP.compute_loss(*pair) for pair in zip(*flows, strict=True)]
    torch.testing.assert_close(found, originals.flow(student, teacher))
    s, t = originals.to_lower(student[-1], teacher[-1])
    attention = repdistiller.Attention()
    torch.testing.assert_close((attention.at(s) - attention.at(t)).square().mean(), originals.attention(s, t, 2))
    s, t = (f.flatten(2) / f.flatten(2).norm(dim=2, keepdim=True) for f in (s, t))
    kernel = repdistiller.NSTLoss().poly_kernel
    assert kernel(s, t).shape == (5, t.shape[1], s.shape[1])
    found = kernel(t, t).mean() + kernel(s, s).mean() - 2 * kernel(s, t).mean()
    torch.testing.assert_close(found, originals.nst(s[..., None], t[..., None]))


def test_pdist_is_the_originals_with_its_floor_under_the_squares():
    rows = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    expected = originals.distances(rows)
    torch.testing.assert_close(repdistiller.RKDLoss.pdist(rows), expected)
    torch.testing.assert_close(repdistiller.RKDLoss.pdist(rows, squared=True), expected.square())
    gradients = [torch.autograd.grad(d.sum(), rows)[0] for d in (repdistiller.RKDLoss.pdist(rows), expected)]
    torch.testing.assert_close(*gradients)
    same = repdistiller.RKDLoss.pdist(torch.ones(2, 3).bfloat16(), eps=0.25)
    assert same.tolist() == [[0, 0.5], [0.5, 0]] and same.dtype == torch.float32


def test_correlation_sums_over_dimension_1_alone():
    student, teacher = (torch.randn(5, 4, 2, 3, dtype=torch.float64) for _ in range(2))
    apart = (student - teacher).abs()
    expected = (apart[:-1] * apart[1:]).sum(1).mean()
    torch.testing.assert_close(repdistiller.Correlation()(student, teacher), expected)


def test_one_sample_gives_0_where_the_original_gives_nan():
    student, teacher = torch.randn(1, 4, requires_grad=True), torch.randn(1, 4)
    for loss in (repdistiller.RKDLoss(), repdistiller.Correlation()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # once for each module, whichever test comes first
            value = loss(student, teacher)
        (gradient,) = torch.autograd.grad(value, student)
        assert value == 0 and (gradient == 0).all()
