# SPDX-License-Identifier: Apache-2.0
"""STKDLoss against its formula with one-hot rows in float64, and what its options and its batch mean."""

import math

import pytest
import torch
import torch.nn.functional as F

import kdkernels as kd
from kdkernels.losses import STKDLoss


def mixed(n=9, C=7, per_sample=True):
    """Student and teacher logits of the mixed samples, the batch, and the teacher's logits before mixing."""
    torch.manual_seed(0)
    x, labels = torch.randn(n, 4, dtype=torch.float64), torch.randint(C, (n,))
    batch = kd.mixup(x, labels, per_sample=per_sample, generator=torch.Generator().manual_seed(1))
    student, teacher, clean = (3 * torch.randn(n, C, dtype=torch.float64) for _ in range(3))
    return student.requires_grad_(), teacher, batch, clean


def by_the_book(student, teacher, batch, clean, tau, alpha, mix):
    lam = batch.lam.expand(len(student))[:, None]
    own, mate = (F.one_hot(t, student.shape[1]).double() for t in (batch.labels, batch.permuted_labels))
    label = lam * own + (1 - lam) * mate
    p = (clean / tau).softmax(1)
    q = mix[0] * (teacher / tau).softmax(1) + mix[1] * (lam * p + (1 - lam) * p[batch.permutation]) + mix[2] * label
    hard = -(label * student.log_softmax(1)).sum(1).mean()
    soft = (torch.xlogy(q, q) - q * (student / tau).log_softmax(1)).sum(1).mean()
    return (1 - alpha) * hard, alpha * tau**2 * soft


@pytest.mark.parametrize("mix", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 0.3, 0.2)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_it_is_cross_entropy_of_the_mixed_label_plus_the_divergence_from_the_target(mix, per_sample):
    student, teacher, batch, clean = mixed(per_sample=per_sample)
    loss = STKDLoss(tau=2.5, alpha=0.7, mix=mix)
    total, parts = loss(student, teacher, batch, clean, return_parts=True)
    hard, soft = by_the_book(student, teacher, batch, clean, 2.5, 0.7, mix)
    torch.testing.assert_close(parts, {"hard": hard, "soft": soft}, rtol=1e-10, atol=0)
    torch.testing.assert_close(total, hard + soft, rtol=1e-11, atol=0)
    got, want = (torch.autograd.grad(value, student)[0] for value in (total, hard + soft))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-13)


def test_its_defaults_are_the_ones_that_it_states_as_ours():
    loss = STKDLoss()
    assert (loss.tau, loss.alpha, loss.mix) == (4.0, 0.9, (1.0, 0.0, 0.0))
    student, teacher, batch, clean = mixed()
    expected = sum(by_the_book(student, teacher, batch, clean, 4.0, 0.9, (1, 0, 0)))
    torch.testing.assert_close(loss(student, teacher, batch), expected, rtol=1e-11, atol=0)


def test_without_mixing_it_is_kd_beside_cross_entropy():
    student, teacher, batch, _ = mixed()
    batch = batch._replace(lam=torch.ones(()))
    expected = 0.1 * F.cross_entropy(student, batch.labels) + 0.9 * kd.losses.KDLoss(tau=4.0)(student, teacher)
    torch.testing.assert_close(STKDLoss()(student, teacher, batch), expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("alpha, name", [(0.0, "hard"), (1.0, "soft")])
def test_a_share_of_zero_or_one_leaves_one_term(alpha, name):
    student, teacher, batch, _ = mixed()
    total, parts = STKDLoss(alpha=alpha)(student, teacher, batch, return_parts=True)
    assert list(parts) == [name] and total.equal(parts[name])


def test_rows_with_an_ignored_label_do_not_count_and_combine_with_the_mask():
    student, teacher, batch, clean = mixed()
    labels, other = batch.labels.clone(), batch.permuted_labels.clone()
    labels[2] = other[5] = -100
    mask = torch.ones(9, dtype=torch.bool)
    mask[7] = False
    loss = STKDLoss(mix=(0.5, 0.5, 0))
    value = loss(student, teacher, batch._replace(labels=labels, permuted_labels=other), clean, mask=mask)
    kept = mask.clone()
    kept[[2, 5]] = False
    expected = loss(student, teacher, batch, clean, mask=kept)
    assert value.equal(expected)
    (grad,) = torch.autograd.grad(value, student)
    assert (grad[~kept] == 0).all() and (grad[kept] != 0).all()


def test_bad_arguments_are_named():
    for bad in (
        {"tau": 0.0}, {"tau": "4"}, {"alpha": 1.5}, {"alpha": math.nan}, {"mix": (1, 1, 0)}, {"mix": (1, 0)},
        {"mix": (2, -1, 0)}, {"reduction": "none"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(bad))):
            STKDLoss(**bad)
    student, teacher, batch, clean = mixed()
    with pytest.raises(TypeError, match="mixup_batch is a tuple: give what kd.mixup returns"):
        STKDLoss()(student, teacher, tuple(batch))
    with pytest.raises(ValueError, match="teacher_clean is missing: mix is"):
        STKDLoss(mix=(0, 1, 0))(student, teacher, batch)
    with pytest.raises(ValueError, match=r"teacher_clean has shape \(8, 7\), student has \(9, 7\)"):
        STKDLoss(mix=(0, 1, 0))(student, teacher, batch, clean[:8])
    with pytest.raises(ValueError, match=r"mixup_batch.labels has shape \(8,\): one class index a row"):
        STKDLoss()(student, teacher, batch._replace(labels=batch.labels[:8]))
    with pytest.raises(ValueError, match="labels holds 9: classes are 0 to 6"):
        STKDLoss()(student, teacher, batch._replace(labels=torch.full((9,), 9)))
    with pytest.raises(ValueError, match="lam holds a value outside"):
        STKDLoss()(student, teacher, batch._replace(lam=torch.tensor(1.2)))
    with pytest.raises(ValueError, match=r"student_logits has shape \(3, 3, 7\): give \[B, C\]"):
        STKDLoss()(student.reshape(3, 3, 7), teacher.reshape(3, 3, 7), batch)
