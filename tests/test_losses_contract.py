# SPDX-License-Identifier: Apache-2.0
"""What every loss module promises, tested on all of them: a new loss is one row of CASES."""

import copy
import doctest
import inspect
import linecache
import pickle
import warnings
from typing import NamedTuple

import labelled
import mapped
import pyramid
import pytest
import torch
from ranked import needs_distributed
from torch._dynamo.testing import CompileCounter

import kdkernels as kd
from kdkernels import losses


class Case(NamedTuple):
    make: object  # (group=...) -> the loss
    what: str  # what it compares, as its arguments are called: logits or features
    least: int  # the fewest rows it can do with
    classes: int = 10  # width of the teacher's side; the student's is 10


def kda(**how):
    """With centres, and without the epochs in which the loss is off."""
    loss = losses.KDALoss(6, 10, 14, start_epoch=0, weight=1.0, **how)
    seeded = torch.Generator().manual_seed(0)
    for centers in (loss.centers.student_centers, loss.centers.teacher_centers):
        centers.copy_(torch.randn(centers.shape, generator=seeded) / 4)
    return loss


def rdimkd(**how):
    """Principal directions, a narrower student, relative to the teacher's variance."""
    loss = losses.RdimKDLoss(14, 4, student_channels=10, normalizer="variance", weight=2.0, **how)
    seeded = torch.Generator().manual_seed(0)
    loss.observe(torch.randn(40, 14, generator=seeded))
    loss.fit()
    for parameter in loss.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=seeded)
    return loss


CASES = {
    "kd": Case(lambda **how: losses.KDLoss(**how), "logits", 1),
    "kd reverse": Case(lambda **how: losses.KDLoss(tau=2.0, divergence="reverse", **how), "logits", 1),
    "kd jsd": Case(lambda **how: losses.KDLoss(divergence="jsd", beta=0.3, weight=3.0, **how), "logits", 1),
    "kd skew": Case(lambda **how: losses.KDLoss(divergence="skew", scale_tau=False, **how), "logits", 1),
    "cka": Case(lambda **how: losses.CKALoss(**how), "features", 4, 14),
    "cka rbf": Case(
        lambda **how: losses.CKALoss(kd.RBF(sigma=3.0), unbiased=False, weight=2.0, **how), "features", 2, 14
    ),
    "rcka": Case(lambda **how: losses.RCKALoss(**how), "logits", 1),
    "rcka textbook": Case(
        lambda **how: losses.RCKALoss(row_normalize=False, center=True, unbiased=True, **how), "logits", 4
    ),
    "rcka rows": Case(lambda **how: losses.RCKALoss(class_weight=0, **how), "logits", 1, 14),
    "cmkd": Case(lambda **how: losses.CMKDLoss(**how), "logits", 1),
    "cmkd classes": Case(
        lambda **how: losses.CMKDLoss(class_weight=1, regularization="kl", strength=0.3, **how), "logits", 1
    ),
    "kda": Case(lambda **how: kda(**how), "features", 1, 14),
    "rdimkd": Case(lambda **how: losses.RdimKDLoss(10, 4, variant="R", seed=0, **how), "features", 1),
    "rdimkd adapter": Case(lambda **how: rdimkd(**how), "features", 1, 14),
    "dist": Case(lambda **how: losses.DISTLoss(**how), "logits", 1),
    "dist rows": Case(lambda **how: losses.DISTLoss(2.0, 0.0, tau=4.0, **how), "logits", 1),
    "dkd": Case(lambda **how: labelled.DKDLoss(**how), "logits", 1),
    "stkd": Case(lambda **how: labelled.STKDLoss(**how), "logits", 1),
    "stkd clean": Case(lambda **how: labelled.STKDLoss(alpha=0.5, tau=2.0, mix=(0.25, 0.5, 0.25), **how), "logits", 1),
    "nystrom": Case(lambda **how: losses.NystromTransferLoss(6, kernel=kd.RBF(3.0), **how), "features", 1, 14),
    "nystrom linear": Case(
        lambda **how: losses.NystromTransferLoss(6, kernel="linear", normalize=False, **how), "features", 1, 14
    ),
    "pcka": Case(lambda **how: pyramid.PCKALoss(**how), "features", 1),
    "pcka transposed": Case(lambda **how: pyramid.PCKALoss(center=True, transposed=0.5, **how), "features", 1),
    "sp": Case(lambda **how: losses.SPLoss(weight=10.0, **how), "features", 1, 14),
    "gram mse": Case(lambda **how: losses.GramMSELoss(**how), "features", 1, 14),
    "mmd": Case(lambda **how: losses.MMDLoss(kd.RBF(sigma=3.0), **how), "features", 2),
    "mmd biased": Case(lambda **how: losses.MMDLoss(kd.RBF(sigma=(1.0, 4.0)), unbiased=False, **how), "features", 1),
    "nst": Case(lambda **how: mapped.NSTLoss(**how), "features", 1, 14),
    "ickd": Case(lambda **how: mapped.ICKDLoss(**how), "features", 1),
    "fsp": Case(lambda **how: mapped.FSPLoss(**how), "features", 1),
    "at": Case(lambda **how: mapped.ATLoss(weight=10.0, **how), "features", 1, 14),
    "at cubes": Case(lambda **how: mapped.ATLoss(p=3, weight=10.0, **how), "features", 1, 14),
    "rkd distance": Case(lambda **how: losses.RKDDistanceLoss(**how), "features", 2, 14),
    "rkd angle": Case(lambda **how: losses.RKDAngleLoss(weight=50.0, **how), "features", 3, 14),
    "rkd": Case(lambda **how: losses.RKDLoss(**how), "features", 3, 14),
    "pkt": Case(lambda **how: losses.PKTLoss(weight=30000.0, **how), "features", 2, 14),
    "cc": Case(lambda **how: losses.CCLoss(**how), "features", 2),
    "cc taylor": Case(lambda **how: losses.CCLoss("taylor", normalize=True, **how), "features", 1, 14),
    "ramp": Case(lambda **how: losses.Ramp(losses.RCKALoss(**how), 0, 0), "logits", 1),
}
# 13 rows: odd, so that no even split or padding hides a lost row
N = 13


@pytest.fixture(scope="module")
def alone():
    """A process group of this process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def case(request):
    torch.manual_seed(1)
    return CASES[request.param]


def sides(case, n=N, dtype=torch.float32):
    student, teacher = torch.randn(n, 10, dtype=dtype), torch.randn(n, case.classes, dtype=dtype)
    teacher[:, :10] += student
    return student.requires_grad_(), teacher


def kept_rows():
    mask = torch.ones(N, dtype=torch.bool)
    mask[[0, 4, 5, 12]] = False
    return mask


def gradient(loss, student, *others, **options):
    (grad,) = torch.autograd.grad(loss(student, *others, **options), student)
    return grad


def test_every_loss_module_stands_in_the_contract():
    covered = {type(case.make()).__name__ for case in CASES.values()}
    assert covered == set(losses.__all__)


def test_a_loss_is_one_finite_number_with_a_gradient_to_the_student_only(case):
    student, teacher = sides(case)
    teacher.requires_grad_()
    value = case.make()(student, teacher)
    value.backward()
    assert value.shape == () and value.dtype == torch.float32
    assert teacher.grad is None
    assert student.grad.shape == student.shape and student.grad.abs().max() > 1e-4


def test_the_gradient_is_the_derivative_of_the_value(case):
    student, teacher = sides(case, dtype=torch.float64)
    loss = case.make()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student)


def test_the_parts_sum_to_the_total(case):
    student, teacher = sides(case)
    loss = case.make()
    total, parts = loss(student, teacher, return_parts=True)
    assert total.equal(loss(student, teacher))
    torch.testing.assert_close(sum(parts.values()), total, rtol=1e-6, atol=0)
    assert all(part.requires_grad and part != 0 for part in parts.values())


def test_the_weight_is_a_buffer_that_scales_the_loss_and_travels_in_the_state_dict(case):
    student, teacher = sides(case)
    loss = case.make().eval()
    before = loss(student, teacher)
    loss.weight.mul_(3)
    torch.testing.assert_close(loss(student, teacher), 3 * before, rtol=1e-6, atol=0)
    assert loss.double()(student, teacher).dtype == torch.float32
    fresh = case.make().eval()
    fresh.load_state_dict(loss.state_dict())
    assert fresh(student, teacher).equal(loss(student, teacher))
    assert copy.deepcopy(loss)(student, teacher).equal(loss(student, teacher))


def test_a_masked_batch_gives_what_its_kept_rows_give(case):
    student, teacher = sides(case, dtype=torch.float64)
    mask = kept_rows()
    kept = student.detach()[mask].requires_grad_()
    loss = case.make()
    torch.testing.assert_close(loss(student, teacher, mask=mask), loss(kept, teacher[mask]), rtol=1e-10, atol=1e-12)
    grad = gradient(loss, student, teacher, mask=mask)
    torch.testing.assert_close(grad[mask], gradient(loss, kept, teacher[mask]), rtol=1e-9, atol=1e-12)
    assert (grad[~mask] == 0).all()


def test_a_masked_row_has_no_influence_even_where_it_holds_nan(case):
    student, teacher = sides(case)
    mask = kept_rows()
    poisoned, poison = student.detach().clone(), teacher.clone()
    poisoned[~mask], poison[~mask] = float("nan"), float("inf")
    poisoned.requires_grad_()
    loss = case.make()
    assert loss(poisoned, poison, mask=mask).equal(loss(student, teacher, mask=mask))
    assert gradient(loss, poisoned, poison, mask=mask).equal(gradient(loss, student, teacher, mask=mask))


def test_an_all_masked_batch_gives_zero_with_zero_gradient(case):
    student, teacher = sides(case)
    value = case.make()(student, teacher, mask=torch.zeros(N, dtype=torch.bool))
    value.backward()
    assert value == 0 and (student.grad == 0).all()


def test_nan_in_a_row_that_counts_gives_nan(case):
    student, teacher = sides(case)
    teacher[3, 2] = float("nan")
    assert case.make()(student, teacher).isnan()


@pytest.mark.parametrize("student_dtype, teacher_dtype", [(torch.float32, torch.bfloat16), (torch.float16,) * 2])
def test_each_side_has_its_own_float_dtype_and_is_computed_in_float32(case, student_dtype, teacher_dtype):
    student, teacher = sides(case)
    student, teacher = student.detach().to(student_dtype).requires_grad_(), teacher.to(teacher_dtype)
    wide = student.detach().float().requires_grad_()
    loss = case.make()
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(wide, teacher.float()), rtol=0, atol=2e-4)
    grad = gradient(loss, student, teacher)
    assert grad.dtype == student_dtype
    torch.testing.assert_close(grad.float(), gradient(loss, wide, teacher.float()), rtol=2e-3, atol=2e-4)


def test_autocast_changes_nothing(case):
    """Not even where the backward pass is called inside."""
    (student, teacher), found = sides(case), []
    for enabled in (False, True):
        leaves = [t.detach().requires_grad_() for t in (student if isinstance(student, list) else [student])]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            value = case.make()(leaves if isinstance(student, list) else leaves[0], teacher)
            found.append((value, *torch.autograd.grad(value, leaves)))
    for plain, inside in zip(*found, strict=True):
        assert torch.equal(plain, inside)


def line(warning) -> str:
    """What a warning points at."""
    return linecache.getline(warning.filename, warning.lineno).strip()


def test_a_batch_below_the_estimators_minimum_gives_a_differentiable_zero_and_warns_once(case):
    loss = case.make()
    for n in range(case.least):
        student, teacher = sides(case, n)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value = loss(student, teacher)
        value.backward()
        assert value == 0 and student.grad.shape == (n, 10) and (student.grad == 0).all()
        assert [f"a batch of {n} rows and needs {case.least}" in str(w.message) for w in caught] == [True] * (n == 0)
        for warning in caught:  # it points at the caller, for some of these a subclass
            assert "loss(student, teacher)" in line(warning) or "super().forward(" in line(warning)
    student, teacher = sides(case, case.least)
    assert loss(student, teacher).isfinite()


def test_an_all_nan_batch_that_is_too_small_is_still_zero(case):
    student = torch.full((case.least - 1, 10), float("nan"), requires_grad=True)
    with pytest.warns(UserWarning, match="zero gradient"):
        value = case.make()(student, torch.randn(case.least - 1, case.classes))
    assert value == 0 and (torch.autograd.grad(value, student)[0] == 0).all()


def test_bad_input_is_refused_with_the_callers_argument_in_the_message(case):
    student, teacher = sides(case)
    loss, what = case.make(), case.what
    with pytest.raises(TypeError, match=rf"teacher_{what} is torch.int64: convert it"):
        loss(student, teacher.long())
    with pytest.raises(TypeError, match=rf"student_{what} is a ndarray"):
        loss(student.detach().numpy(), teacher)
    with pytest.raises(ValueError, match=rf"teacher_{what} .*12.*student_{what} .*13"):
        loss(student, teacher[:12])
    with pytest.raises(ValueError, match=rf"teacher_{what} has shape \(13, 0\)"):
        loss(student, teacher[:, :0])
    with pytest.raises(ValueError, match=rf"student_{what} is on cpu, teacher_{what} on meta"):
        loss(student, teacher.to("meta"))
    with pytest.raises(TypeError, match="mask is torch.int64: pass a bool tensor"):
        loss(student, teacher, mask=kept_rows().long())
    with pytest.raises(ValueError, match=r"mask has shape \(12,\)"):
        loss(student, teacher, mask=kept_rows()[:12])


def test_the_devices_of_the_arguments_count_and_not_torchs_default(case):
    loss, (student, teacher) = case.make().eval(), sides(case)
    expected = loss(student, teacher), gradient(loss, student, teacher)
    with torch.device("meta"):
        found = loss(student, teacher), gradient(loss, student, teacher)
    torch.testing.assert_close(found, expected)


def test_a_loss_compiles_to_one_graph_and_a_new_weight_does_not_recompile_it(case):
    torch._dynamo.reset()
    loss, counter = case.make().eval(), CompileCounter()
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    student, teacher = sides(case)
    mask = kept_rows()
    for weight in (1.0, 0.5):
        loss.weight.fill_(weight)
        torch.testing.assert_close(compiled(student, teacher), loss(student, teacher))
    assert counter.frame_count == 1
    torch.testing.assert_close(compiled(student, teacher, mask=mask), loss(student, teacher, mask=mask))


def test_a_compiled_loss_says_nothing_and_has_the_gradients_of_the_eager_one_also_of_a_second_batch_size(case):
    torch._dynamo.reset()
    loss = case.make()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for rows in (N, N + 4):  # the second has symbols for sizes
        student, teacher = sides(case, rows)
        expected = gradient(loss, student, teacher)
        with torch.inference_mode():  # as many teachers are called
            teacher = teacher.clone()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # PyTorch's own: shown to nobody by default, and of conftest.py's switch
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", "dynamo_pgo")
            found = gradient(compiled, student, teacher)
        torch.testing.assert_close(found, expected)


def test_a_compiled_loss_survives_a_last_batch_that_is_too_small(case):
    torch._dynamo.reset()
    compiled = torch.compile(case.make(), fullgraph=True, backend="aot_eager")
    student, teacher = sides(case, case.least - 1)
    with pytest.warns(UserWarning, match="drop_last") as caught:
        value = compiled(student, teacher)
    (own,) = (w for w in caught if "drop_last" in str(w.message))  # the compiler has warnings of its own
    assert line(own) == "value = compiled(student, teacher)"
    assert value == 0 and (torch.autograd.grad(value, student)[0] == 0).all()


def takes_group(name) -> bool:
    loss = CASES[name].make()
    return "group" in inspect.signature(type(getattr(loss, "loss", loss)).__init__).parameters


OVER_RANKS = [name for name in CASES if takes_group(name)]


@pytest.mark.parametrize("name", [name for name in CASES if name not in OVER_RANKS])
def test_a_loss_of_single_samples_takes_no_group(name):
    with pytest.raises(TypeError, match="group"):
        CASES[name].make(group="world")


@needs_distributed
@pytest.mark.parametrize("case", OVER_RANKS, indirect=True)
def test_the_loss_over_a_group_of_one_process_is_the_loss(case, alone):
    student, teacher = sides(case, dtype=torch.float64)
    for options in ({}, {"mask": kept_rows()}):
        plain, joined = case.make(), case.make(group="world")
        total, parts = joined(student, teacher, return_parts=True, **options)
        expected, expected_parts = plain(student, teacher, return_parts=True, **options)
        torch.testing.assert_close((total, parts), (expected, expected_parts), rtol=1e-12, atol=1e-14)
        grads = [torch.autograd.grad(value, student)[0] for value in (total, expected)]
        torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-14)


@needs_distributed
@pytest.mark.parametrize("case", OVER_RANKS, indirect=True)
def test_a_copy_of_a_loss_shares_its_process_group_and_a_pickle_of_it_is_refused(case, alone):
    student, teacher = sides(case)
    loss = case.make(group=alone).eval()
    other = copy.deepcopy(loss)
    assert other(student, teacher).equal(loss(student, teacher))
    assert getattr(other, "loss", other).group is alone and "group=ProcessGroup" in repr(other)
    with pytest.raises(TypeError, match=r"group is a ProcessGroup.*state_dict.*group='world'"):
        pickle.dumps(loss)
    named = case.make(group="world").eval()
    named.load_state_dict(loss.state_dict())
    again = pickle.loads(pickle.dumps(named))
    assert again(student, teacher).equal(named(student, teacher)) and "group='world'" in repr(again)
    assert "group" not in case.make().extra_repr()


def test_repr_shows_the_weight(case):
    loss = case.make().eval()
    loss.weight.fill_(0.125)
    assert "weight=0.125" in repr(loss)


@pytest.mark.parametrize("name", losses.__all__)
def test_the_docstring_has_four_lines_that_run_and_says_what_the_arguments_are(name):
    """They are run with all examples of the package."""
    found = doctest.DocTestFinder(recurse=False).find(getattr(losses, name), name)
    assert len(found[0].examples) >= 4 and "Args:" in inspect.getdoc(getattr(losses, name))


@pytest.mark.parametrize("name", ["CKALoss", "SPLoss", "GramMSELoss", "MMDLoss", "RKDLoss", "PKTLoss", "CCLoss"])
def test_no_samples_with_rows_of_their_own_give_zero(name):
    student = torch.randn(0, 6, 4, requires_grad=True)
    with pytest.warns(UserWarning, match="a batch of 0 samples and needs 1"):
        value = getattr(losses, name)(rows="groups")(student, torch.randn(0, 6, 4))
    assert value == 0 and torch.autograd.grad(value, student)[0].shape == (0, 6, 4)
