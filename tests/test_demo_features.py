# SPDX-License-Identifier: Apache-2.0
"""KDA, STKD and RdimKD in the demonstration: labels, mixtures, adapters and the teacher's statistics reach them."""

import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "examples"))
pytest.importorskip("sklearn", reason="the demonstration needs scikit-learn")

import distill_data
import distill_nets
import distill_train


@pytest.fixture(scope="module")
def digits():
    return distill_data.load("digits", None)


@pytest.fixture(scope="module")
def teacher(digits):
    return distill_train.train_teacher(digits, distill_nets.SETUPS["digits", "A"], 0, 1)


def student_of(method, digits, teacher, setup="A", epochs=10):
    return distill_train.Student(method, 1.0, digits, teacher, distill_nets.SETUPS["digits", setup], 3, epochs)


def test_kda_starts_after_a_fifth_of_training_and_its_centres_change_each_epoch(digits, teacher):
    student = student_of("kda", digits, teacher)
    assert student.loss.start_epoch == 2 and int(student.loss.epoch) == 0
    student.epoch()
    first = student.loss.centers.student_centers.clone()
    assert int(student.loss.epoch) == 1 and student.loss.centers.known.all() and (first != 0).any()
    student.epoch()
    assert not student.loss.centers.student_centers.equal(first)


def test_kda_is_given_the_labels_where_there_are_any_and_else_the_teachers_argmax(digits, teacher):
    student, seen = student_of("kda", digits, teacher), []
    student.loss.register_forward_pre_hook(lambda module, arguments: seen.append(arguments))
    _, target, _ = student.step(torch.arange(64))
    labels = seen[0][2]
    assert labels.shape == (96,) and labels[32:].equal(target.logits[32:].argmax(1))
    again = student_of("kda", digits, teacher)
    assert labels[:32].equal(again.batch(torch.arange(64))[1])
    assert not labels[:32].equal(target.logits[:32].argmax(1))  # after one epoch the teacher errs


def test_stkd_is_the_whole_loss_on_mixed_images_that_both_nets_see(digits, teacher, monkeypatch):
    student, seen = student_of("stkd", digits, teacher), []
    monkeypatch.setattr(student, "loss", lambda *arguments: seen.append(arguments) or arguments[0].sum())
    output, target, (mixed,) = student.step(torch.arange(64))
    images, labels = student_of("stkd", digits, teacher).batch(torch.arange(64))
    assert 0 < mixed.lam < 1 and mixed.labels[:32].equal(labels)
    torch.testing.assert_close(mixed.x, mixed.lam * images + (1 - mixed.lam) * images[mixed.permutation])
    with torch.no_grad():
        assert teacher(mixed.x).logits.equal(target.logits)
        assert mixed.labels[32:].equal(teacher(images).logits[32:].argmax(1))
    assert [len(arguments) for arguments in seen] == [3] and seen[0][0] is output.logits and seen[0][2] is mixed
    # no cross-entropy beside it
    assert student.total(output, target, labels, (mixed,)).equal(output.logits.sum())


@pytest.mark.parametrize("setup, width", [("A", 64), ("B", 16)])
@pytest.mark.parametrize("variant", "par")
def test_rdimkd_is_fitted_on_the_teacher_and_its_adapter_is_trained(digits, teacher, variant, setup, width):
    student = student_of(f"rdimkd-{variant}", digits, teacher, setup)
    with torch.no_grad():
        features = teacher(digits.train.images).features
    assert int(student.loss.pca.count) == len(features) and student.loss.adapter.in_features == width
    covariance = torch.cov(features.double().T)
    torch.testing.assert_close(student.loss.pca.covariance(), covariance, rtol=1e-4, atol=1e-6)
    before = student.loss.adapter.weight.detach().clone()
    student.step(torch.arange(64))
    assert not student.loss.adapter.weight.equal(before)
    assert any(p is student.loss.adapter.weight for group in student.sgd.param_groups for p in group["params"])


def test_the_optimiser_of_a_loss_without_parameters_holds_the_students_alone(digits, teacher):
    student = student_of("kda", digits, teacher)
    held = [p for group in student.sgd.param_groups for p in group["params"]]
    assert len(held) == len(list(student.net.parameters()))
