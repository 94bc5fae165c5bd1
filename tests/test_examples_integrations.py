# SPDX-License-Identifier: Apache-2.0
"""The integration examples with the real libraries: what they print, and what each promises about its steps."""

import copy
import importlib
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import kdkernels as kd

# an environment that was given by PYTHON= may lack them; the one that make sets up has them
MISSING = [name for name in ("lightning", "transformers", "accelerate", "sklearn") if find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")]

VOCABULARY = 48
WITHOUT = """import sys, runpy
sys.path.insert(0, "examples")
sys.modules["{module}"] = None
runpy.run_path("examples/{name}.py")"""


# imported when a test runs: collecting these two libraries takes ten seconds
def example(name):
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    return importlib.import_module(name)


LIBRARIES = "lightning_module lightning, lightning_module sklearn, hf_trainer accelerate, trl_trainer trl"


@pytest.mark.parametrize("name, module", [pair.split() for pair in LIBRARIES.split(", ")])
def test_an_example_without_its_libraries_says_how_to_get_them(python, name, module):
    done = python("-c", WITHOUT.format(module=module, name=name))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert module in done.stderr and "pip install -e '.[" in done.stderr


@pytest.mark.parametrize("name, module", [("lightning_module", "yaml"), ("hf_trainer", "huggingface_hub")])
def test_what_a_library_of_an_example_lacks_in_turn_is_named_and_not_hidden(python, name, module):
    done = python("-c", WITHOUT.format(module=module, name=name))
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert module in done.stderr.splitlines()[-1] and "pip install" not in done.stderr


@pytest.fixture(scope="module")
def lightning_module():
    return example("lightning_module")


@pytest.fixture(scope="module")
def hf_trainer():
    return example("hf_trainer")


def test_the_lightning_example_distils_a_student_that_beats_the_one_trained_on_labels(lightning_module):
    accuracies = lightning_module.main()
    # four times over, nets started 1e-6 apart: 0.991 +- 0.001, and a gain of 0.108 +- 0.002 (standard deviation)
    assert accuracies["teacher"] > 0.97
    assert accuracies["distilled"] > accuracies["cross-entropy"] + 0.05


@pytest.fixture(scope="module")
def distillation(lightning_module):
    """A module after two epochs of twenty steps, and its teacher as it was before."""
    torch.manual_seed(0)
    teacher = lightning_module.Net(8)
    before = copy.deepcopy(teacher)
    module, _ = lightning_module.fit(lightning_module.Net(4), teacher, 2)
    return module, before


def test_in_lightning_the_teacher_stays_as_it_was_and_the_student_moves(distillation):
    module, before = distillation
    module.train()
    assert module.student.training and not module.teacher.training
    for name, tensor in module.teacher.state_dict().items():
        assert tensor.equal(before.state_dict()[name]), name
    optimised = {id(p) for group in module.configure_optimizers()[0][0].param_groups for p in group["params"]}
    assert optimised == {id(p) for p in module.student.parameters()}


def test_in_lightning_the_weights_follow_their_schedules_and_checkpoints_keep_them(distillation, lightning_module):
    module, _ = distillation
    assert module.kd.weight == 0.75  # the second of two epochs began
    assert module.cka.steps == 40 and module.cka.end == 13 and module.cka.weight == 1
    fresh = lightning_module.Distillation(lightning_module.Net(4), lightning_module.Net(8))
    fresh.load_state_dict(module.state_dict())
    assert fresh.kd.weight == 0.75 and fresh.cka.steps == 40 and fresh.cka.weight == 1


def test_the_loss_in_lightning_is_cross_entropy_and_divergence_and_alignment_at_their_weights(
    distillation, monkeypatch
):
    module, _ = distillation
    logged = {}
    monkeypatch.setattr(module, "log_dict", logged.update)
    images, labels = torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    module.train()
    loss = module.training_step((images, labels), 0)
    logits, features = module.student(images)
    targets, guide = module.teacher(images)
    ce = torch.nn.functional.cross_entropy(logits, labels)
    p = (targets / 4).softmax(-1)
    divergence = 16 * (p * (p.log() - (logits / 4).log_softmax(-1))).sum(-1).mean()
    alignment = 1 - kd.cka(features.mean((2, 3)), guide.mean((2, 3)))
    torch.testing.assert_close(loss, ce + 0.75 * divergence + alignment)
    assert set(logged) == {"ce", "kd", "cka"} and not any(term.requires_grad for term in logged.values())


def test_the_trainer_example_brings_the_student_towards_the_teacher(hf_trainer):
    nats = hf_trainer.main()
    assert nats["before"] > 1.5 and nats["after"] < 0.25


@pytest.fixture
def trained(hf_trainer, tmp_path):
    """A student after two steps of plain gradient descent, in the order that the seed gives the samples."""

    def run(samples, made="DistillationTrainer", **settings):
        torch.manual_seed(0)
        teacher, student = (hf_trainer.language_model(width, 1, VOCABULARY) for width in (32, 16))
        arguments = hf_trainer.arguments(
            str(tmp_path), max_steps=2, optim="sgd", learning_rate=0.5, max_grad_norm=0.0, seed=0, **settings
        )
        trainer = getattr(hf_trainer, made)(student, arguments, train_dataset=samples, teacher=teacher)
        trainer.train()
        return trainer, student

    return run


@pytest.fixture
def samples(hf_trainer):
    torch.manual_seed(1)
    return hf_trainer.sequences(16, VOCABULARY)


def apart(student, other):
    pairs = zip(student.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def test_in_the_trainer_one_batch_of_eight_is_four_micro_batches_of_two_whatever_their_padding(trained, samples):
    _, whole = trained(samples, per_device_train_batch_size=8)
    trainer, parts = trained(samples, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert trainer.state.global_step == 2
    assert apart(whole, parts) < 1e-6
    # the distance is one that steps of this size could show
    _, other = trained(samples, per_device_train_batch_size=4)
    assert apart(whole, other) > 1e-3


def test_in_the_trainer_that_makes_no_logits_the_steps_are_the_same(trained, samples, monkeypatch):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    _, stored = trained(samples, **settings)
    trainer, student = trained(samples, "FusedDistillationTrainer", **settings)
    assert apart(stored, student) < 1e-6
    # no head is called
    heads = [model.get_output_embeddings() for model in (trainer.model, trainer.teacher)]
    for head in heads:
        monkeypatch.setattr(head, "forward", None)
    batch = {name: torch.stack([s[name] for s in samples[:4]]) for name in samples[0]}
    trainer.compute_loss(trainer.model, batch).backward()
    assert heads[0].weight.grad.norm() > 0


def test_in_the_trainer_padding_has_no_influence_and_the_teacher_no_gradient(trained, samples):
    trainer, student = trained(samples, per_device_train_batch_size=8)
    padded = [{name: s[name].clone() for name in s} for s in samples]
    for sample in padded:
        sample["input_ids"][sample["attention_mask"] == 0] = 7
    _, other = trained(padded, per_device_train_batch_size=8)
    assert apart(student, other) < 1e-7
    assert not trainer.teacher.training and all(p.grad is None for p in trainer.teacher.parameters())


def test_the_loss_of_the_trainer_is_cross_entropy_and_divergence_of_the_counted_tokens(hf_trainer, trained, samples):
    samples = samples[:8]
    trainer, student = trained(samples, per_device_train_batch_size=8)
    batch = {name: torch.stack([s[name] for s in samples]).to(student.device) for name in samples[0]}
    counted = batch["labels"][:, 1:] != hf_trainer.IGNORED
    loss = trainer.compute_loss(student, batch, num_items_in_batch=2 * counted.sum())

    logits, targets = (model(batch["input_ids"]).logits[:, :-1][counted] for model in (student, trainer.teacher))
    hard = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:][counted])
    p = (targets / 2).softmax(-1)
    soft = 4 * (p * (p.log() - (logits / 2).log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(loss, (hard + soft) / 4)
    assert isinstance(trainer.distillation, kd.losses.KDLoss)


needs_safetensors = pytest.mark.skipif(find_spec("safetensors") is None, reason="not installed: safetensors")
needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="not installed: trl")


@needs_safetensors
def test_a_student_of_a_stored_teacher_comes_as_near_to_it_as_one_beside_it(hf_trainer):
    nats = example("stored_teacher").main()
    # five seeds: 2.35 to 2.41 before, 0.037 to 0.046 after
    assert nats["before"] > 1.5 and nats["after"] < 0.15 and 5e5 < nats["bytes"] < 7e5
    # classes taken together are never further apart
    assert 0 < nats["bucket"] < nats["dense"] < 2 * nats["bucket"]


@pytest.fixture
def stored(hf_trainer, samples, tmp_path):
    """The example, a teacher and how to store it, and a student after so many steps in runs of a number each."""

    def models():
        torch.manual_seed(0)
        return [hf_trainer.language_model(width, 1, VOCABULARY) for width in (32, 16)]

    def student_after(*stops):
        teacher, student = models()
        file, checkpoint = str(tmp_path / "teacher"), str(tmp_path / f"{len(stops)}.pt")
        module.write(teacher, samples, 8, file)
        for stop in stops:
            student = models()[1]  # a new process knows its seed and the checkpoint
            module.distil(student, samples, file, stop, checkpoint)
        return student

    module = example("stored_teacher")
    return module, models, student_after


@needs_safetensors
def test_a_run_from_a_stored_teacher_goes_on_as_if_it_had_not_stopped(stored):
    module, _, student_after = stored
    straight, resumed = student_after(5), student_after(1, 4, 5)
    assert apart(straight, resumed) == 0 < apart(straight, student_after(4, 4))
    # every sample has its turn in an epoch, whose order is its own
    first, second = (torch.cat([module.rows_of(4 * epoch + i, 64) for i in range(4)]) for epoch in range(2))
    assert first.sort()[0].equal(torch.arange(64)) and second.sort()[0].equal(torch.arange(64))
    assert not first.equal(second)


@needs_safetensors
def test_of_a_teacher_stored_whole_every_tail_is_the_dense_one(stored, samples, tmp_path):
    module, models, _ = stored
    (teacher, student), file = models(), str(tmp_path / "whole")
    with torch.no_grad():  # untrained ones are all but uniform
        for model in (teacher, student):
            model.get_output_embeddings().weight *= 20
    module.write(teacher, samples, VOCABULARY, file)
    found = module.tails(student, teacher, samples, file)
    dense = found.pop("dense")
    assert dense > 0.1 and len(found) == 3
    # values are kept in float16, rounded down: 2^-10 of up to some 8 nats
    for name, value in found.items():
        assert abs(value - dense) < 2e-2 * dense, name


@pytest.fixture(scope="module")
def trl_trainer(hf_trainer):
    return example("trl_trainer")


@needs_trl
def test_the_trl_example_keeps_few_bytes_and_brings_the_student_towards_the_teacher(trl_trainer):
    found = trl_trainer.main()
    (theirs, kept_there), (ours, kept) = found["TRL"], found["kdkernels"]
    assert ours == pytest.approx(theirs, rel=1e-4) and kept_there > 10 * kept
    assert found["before"] > 1.5 and found["after"] < 0.25


@pytest.fixture
def gkd(hf_trainer, trl_trainer, samples, tmp_path):
    def make(made, **settings):
        torch.manual_seed(0)
        teacher, student = (hf_trainer.language_model(width, 1, VOCABULARY) for width in (32, 16))
        with torch.no_grad():
            for model in (teacher, student):
                model.get_output_embeddings().weight *= 20
        made = getattr(trl_trainer, made)
        return trl_trainer.trainer(student, teacher, samples, str(tmp_path), made, **settings)

    return make


@needs_trl
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_in_trl_loss_and_gradients_are_those_of_its_own_trainer(gkd, beta, monkeypatch):
    fused = gkd("FusedGKDTrainer", beta=beta)
    theirs, model = gkd("GKDTrainer", beta=beta), fused.model
    batch = next(iter(fused.get_train_dataloader()))
    for count in (None, 300, torch.tensor(40)):
        want, _ = theirs.compute_loss(model, batch, True, num_items_in_batch=count)
        grads = torch.autograd.grad(want, list(model.parameters()))
        found = fused.compute_loss(model, batch, num_items_in_batch=count)
        torch.testing.assert_close(found, want, rtol=1e-5, atol=0)
        for grad, other in zip(torch.autograd.grad(found, list(model.parameters())), grads, strict=True):
            torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())
    # no head is called
    for one in (fused.model, fused.teacher_model):
        monkeypatch.setattr(one.get_output_embeddings(), "forward", None)
    fused.compute_loss(model, batch).backward()
    assert model.get_output_embeddings().weight.grad.norm() > 0


@needs_trl
def test_in_trl_the_steps_are_those_of_its_own_trainer(gkd):
    settings = {
        "max_steps": 3,
        "optim": "sgd",
        "learning_rate": 0.05,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "lmbda": 0.0,
    }
    before = gkd("GKDTrainer", **settings).model
    students = []
    for made in ("GKDTrainer", "FusedGKDTrainer"):
        trainer = gkd(made, **settings)
        trainer.train()
        students.append(trainer.model)
    assert apart(*students) < 1e-5 < 1e-3 < apart(before, students[0])


@needs_trl
def test_in_bfloat16_the_trainers_that_make_no_logits_run_their_models_in_it(gkd, trl_trainer, monkeypatch):
    fused = gkd("FusedGKDTrainer", bf16=True)
    batch = next(iter(fused.get_train_dataloader()))
    seen = []
    fused.model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    loss = fused.compute_loss(fused.model, batch)
    assert seen == [torch.bfloat16] and loss.isfinite()
    want = gkd("GKDTrainer").compute_loss(fused.model.float(), batch)
    torch.testing.assert_close(loss, want, rtol=2e-2, atol=0)


@needs_trl
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_function_in_compat_is_trls(trl_trainer, beta):
    from kdkernels.compat.trl import generalized_jsd_loss

    theirs = trl_trainer.GKDTrainer.generalized_jsd_loss
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(2, 3, 5, 11, dtype=torch.float64)
    student.requires_grad_()
    labels = torch.randint(11, (3, 5)).masked_fill(torch.rand(3, 5) < 0.3, -100)
    for marks in (labels, None):
        for how in (("batchmean",), ("sum",), ("mean",), ("batchmean", 7), ("batchmean", torch.tensor(9))):
            values = [each(student, teacher, marks, beta, 1.7, *how) for each in (generalized_jsd_loss, theirs)]
            torch.testing.assert_close(*values, rtol=1e-10, atol=0)
            torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in values))
