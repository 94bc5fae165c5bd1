# SPDX-License-Identifier: Apache-2.0
"""Every bad input of a loss on logits has one documented behaviour: an error that names the argument and the fix."""

import math

import pytest
import torch

import kdkernels as kd

S, T = torch.randn(4, 6), torch.randn(4, 6)
A, B = torch.tensor([0, 1, 2, 5]), torch.tensor([5, 4, 3, 0])
ORDER = torch.tensor([1, 2, 3, 0])


def call_kl(student=S, teacher=T, **how):
    return kd.distillation_kl(student, teacher, **how)


def call_mixed(student=S, teacher=T, labels=A, permuted=B, lam=0.3, tau=4.0, alpha=0.5, **how):
    return kd.mixed_distillation(student, teacher, labels, permuted, lam, tau=tau, alpha=alpha, **how)


both = pytest.mark.parametrize("call", [call_kl, call_mixed])


@both
def test_other_batches_or_classes(call):
    for other in (T[:3], T[:, :5], T[0]):
        with pytest.raises(ValueError, match=r"teacher has shape .*, student has \(4, 6\): .* same rows and classes"):
            call(S, other)


@both
def test_no_rows_no_classes_no_dimension(call):
    for empty in (S[:0], S[:, :0]):
        with pytest.raises(ValueError, match="student is empty, shape"):
            call(empty, empty)
    with pytest.raises(ValueError, match="student is 0-d: give logits"):
        call(torch.tensor(1.0), torch.tensor(1.0))


@both
@pytest.mark.parametrize("tau", [0.0, -1.0, math.inf, math.nan, "4", None, True])
def test_a_temperature_that_is_no_positive_number(call, tau):
    with pytest.raises(ValueError, match="tau is .*: a temperature is a positive number"):
        call(tau=tau)


def test_temperatures_of_rows_are_for_the_plain_divergences():
    with pytest.raises(ValueError, match="tau is tensor.*: a temperature is a positive number"):
        call_mixed(tau=torch.tensor(4.0))
    for op in (kd.distillation_kl, kd.generalized_jsd):
        for tau in (0.0, -1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match="tau holds a value that is no positive number"):
                op(S, T, tau=torch.tensor([1.0, tau, 2.0, 3.0]))
        for shape in ((3,), (4, 1)):
            with pytest.raises(ValueError, match=r"tau has shape .*: give one number, or one a row of student, \(4,\)"):
                op(S, T, tau=torch.ones(shape))
        with pytest.raises(TypeError, match="tau is torch.int64: give a number, or a float tensor"):
            op(S, T, tau=torch.tensor(4))


@both
def test_an_unknown_reduction(call):
    with pytest.raises(ValueError, match="reduction is 'batchmean': give one of"):
        call(reduction="batchmean")


@both
def test_a_row_longer_than_its_positions_can_count(call):
    long = torch.zeros(4, 1).expand(4, 2**30 + 1)
    with pytest.raises(ValueError, match=rf"student has {2**30 + 1} classes: a row may have {2**30}"):
        call(long, long)


@both
def test_debug_checks_find_what_is_not_finite(call):
    bad = S.clone()
    bad[1, 2] = math.nan
    with kd.debug_checks(), pytest.raises(ValueError, match="student holds NaN or infinity"):
        call(bad)


@pytest.mark.parametrize("name", ["labels", "permuted"])
@pytest.mark.parametrize(
    "labels, error, message",
    [
        (torch.tensor([0, 1, 2, 6]), ValueError, "holds 6: classes are 0 to 5"),
        (torch.tensor([0, -100, 2, 3]), ValueError, "holds -100: classes are 0 to 5"),
        (torch.tensor([0, 1, 2]), ValueError, r"has shape \(3,\): one class index a row of student is \(4,\)"),
        (torch.zeros(4, 6).long(), ValueError, r"has shape \(4, 6\)"),
        (torch.zeros(4), TypeError, "is torch.float32: give class indices"),
        (torch.zeros(4).bool(), TypeError, "is torch.bool: give class indices"),
        ([0, 1, 2, 3], TypeError, "is a list: pass a torch.Tensor"),
    ],
)
def test_labels_that_are_no_classes(name, labels, error, message):
    public = {"labels": "labels", "permuted": "permuted_labels"}[name]
    with pytest.raises(error, match=f"^{public} {message}"):
        call_mixed(**{name: labels})


@pytest.mark.parametrize(
    "lam, error, message",
    [
        (1.5, ValueError, r"lam is 1.5: give a number in \[0, 1\]"),
        (-0.1, ValueError, "lam is -0.1"),
        (math.nan, ValueError, "lam is nan"),
        ("half", ValueError, "lam is 'half'"),
        (torch.tensor(1.5), ValueError, r"lam holds a value outside \[0, 1\]"),
        (torch.tensor([0.1, 0.2, math.nan, 0.3]), ValueError, r"lam holds a value outside \[0, 1\]"),
        (
            torch.tensor([0.1, 0.2]),
            ValueError,
            r"lam has shape \(2,\): give one number, or one a row of student, \(4,\)",
        ),
        (torch.tensor(1), TypeError, "lam is torch.int64: give a number, or a float tensor"),
    ],
)
def test_a_lambda_outside_0_and_1(lam, error, message):
    with pytest.raises(error, match=message):
        call_mixed(lam=lam)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan, "all", None])
def test_a_share_outside_0_and_1(alpha):
    with pytest.raises(ValueError, match=r"alpha is .*: give a number in \[0, 1\]"):
        call_mixed(alpha=alpha)


@pytest.mark.parametrize("mix", [(1, 1, 0), (0.5, 0.2, 0.2), (1, 0), (2, -1, 0), 1.0, (math.nan, 1, 0), "100"])
def test_weights_that_are_no_mixture(mix):
    with pytest.raises(ValueError, match="mix is .*: give three weights k1, k2, k3 >= 0 that sum to 1"):
        call_mixed(mix=mix)


def test_a_clean_target_without_its_logits_or_its_permutation():
    how = {"mix": (0.5, 0.5, 0)}
    for given in ({}, {"teacher_clean": T}, {"permutation": ORDER}):
        with pytest.raises(ValueError, match="its second weight needs teacher_clean and permutation"):
            call_mixed(**how, **given)
    for order, error, message in (
        (ORDER[:3], ValueError, r"permutation has shape \(3,\)"),
        (ORDER + 1, ValueError, "permutation holds 4: rows are 0 to 3"),
        (ORDER.float(), TypeError, "permutation is torch.float32: give row indices"),
        ([1, 2, 3, 0], TypeError, "permutation is a list"),
    ):
        with pytest.raises(error, match=message):
            call_mixed(teacher_clean=T, permutation=order, **how)
    with pytest.raises(ValueError, match=r"teacher_clean has shape \(4, 5\), student has \(4, 6\)"):
        call_mixed(teacher_clean=T[:, :5], permutation=ORDER, **how)


def test_rows_of_tokens_are_for_the_plain_divergence():
    shape = (2, 2, 6)
    assert kd.distillation_kl(S.reshape(shape), T.reshape(shape), reduction="none").shape == (2, 2)
    with pytest.raises(ValueError, match=r"student has shape \(2, 2, 6\): give logits \[B, C\]"):
        call_mixed(S.reshape(shape), T.reshape(shape))


def test_any_integer_dtype_is_a_label():
    for dtype in (torch.uint8, torch.int32):
        assert call_mixed(labels=A.to(dtype), permuted=B.to(dtype)).equal(call_mixed())
