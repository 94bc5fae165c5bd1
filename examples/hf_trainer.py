# SPDX-License-Identifier: Apache-2.0
"""Token-level distillation in the Hugging Face Trainer: one method, exact under gradient accumulation and padding.

`python examples/hf_trainer.py` trains a small Llama on sequences of a Markov chain, then distils it into a smaller one.
Both are randomly initialised and nothing is downloaded; it needs transformers and accelerate and runs in seconds on a
CPU. `DistillationTrainer` is all that a real model needs. `--fused` takes both losses from the last hidden states:
`FusedDistillationTrainer` never makes logits [batch, tokens, vocabulary].
"""

from __future__ import annotations

import argparse
import sys
import tempfile

try:
    import accelerate  # noqa: F401  the Trainer imports it late, in the middle of a traceback
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] not in ("accelerate", "torch", "transformers"):
        raise  # one that these import in turn: the traceback says which
    sys.exit(f"{error}: pip install -e '.[integrations]' installs what is needed")

import kdkernels as kd

IGNORED = -100  # the label of padding, in transformers and in kd.losses alike


class DistillationTrainer(Trainer):
    """(1 - alpha) cross-entropy + alpha tau^2 KL(teacher || student), both per counted token of the accumulated batch.

    The model must be a causal language model called with labels; `teacher` is any model with the same vocabulary.
    """

    def __init__(self, *args, teacher: torch.nn.Module, tau: float = 2.0, alpha: float = 0.5, **options):
        super().__init__(*args, **options)
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        self.alpha, self.distillation = alpha, kd.losses.KDLoss(tau).to(self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        hard, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        with torch.no_grad():
            teacher_logits = self.teacher(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        soft = self.distillation(
            outputs.logits,
            teacher_logits,
            labels=next_tokens(inputs["labels"]),
            ignore_index=IGNORED,
            # counted over all micro-batches of the step: without it a short micro-batch would weigh as much as a long
            normalizer=num_items_in_batch,
        )
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            soft = soft * self.accelerator.num_processes  # as the Trainer does: the gradients will be averaged
        loss = (1 - self.alpha) * hard + self.alpha * soft
        return (loss, outputs) if return_outputs else loss


class FusedDistillationTrainer(DistillationTrainer):
    """The same loss from the last hidden states and the heads, in one process: no logits, no gradient of their size."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        one_process(self)
        self.cross_entropy = kd.losses.KDLoss(tau=1.0).to(self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        student, teacher = pair_of_linear_logits(self, model, self.teacher, inputs)
        labels = next_tokens(inputs["labels"])
        counted = {"labels": labels, "ignore_index": IGNORED, "normalizer": num_items_in_batch}
        # cross-entropy is the divergence from a teacher that is sure of the label: of one class kept, log 1
        sure = kd.TopKLogits(torch.zeros(*labels.shape, 1, device=labels.device), labels[..., None])
        hard, soft = self.cross_entropy(student, sure, **counted), self.distillation(student, teacher, **counted)
        loss = (1 - self.alpha) * hard + self.alpha * soft
        return (loss, {"loss": loss}) if return_outputs else loss


def next_tokens(labels):
    """Label i is the token that position i predicts; padding, and what else the labels ignore, takes no part.

    Labels are shifted, not logits: the gradient of logits[:, :-1] would be copied into one of all positions.
    """
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def one_process(trainer: Trainer):
    if trainer.accelerator.num_processes > 1:
        raise ValueError("the heads are called outside of the model's forward pass, where DDP and FSDP do not see it")


def pair_of_linear_logits(trainer: Trainer, model, teacher, inputs) -> tuple[kd.LinearLogits, kd.LinearLogits]:
    """Of student and teacher. bf16=True is a matter of the forward pass that is gone round, so it is asked for here."""
    with trainer.accelerator.autocast():
        student = linear_logits(model, inputs)
        with torch.no_grad():
            return student, linear_logits(teacher, inputs)


def linear_logits(model, inputs) -> kd.LinearLogits:
    """The logits of a causal language model as what makes them."""
    hidden = model.base_model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    return kd.LinearLogits(hidden, model.get_output_embeddings().weight)


def language_model(width: int, layers: int, vocabulary: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=32,
            use_cache=False,
        )
    )


def sequences(count: int, vocabulary: int, length: int = 24) -> list[dict]:
    """Walks on one Markov chain, four successors a token, of 4 to `length` tokens, padded with token 0."""
    chain = torch.Generator().manual_seed(0)
    successors = torch.randint(1, vocabulary, (vocabulary, 4), generator=chain)
    samples = []
    for _ in range(count):
        tokens = [int(torch.randint(1, vocabulary, ()))]
        for _ in range(int(torch.randint(3, length, ()))):
            tokens.append(int(successors[tokens[-1], torch.randint(4, ())]))
        padding = length - len(tokens)
        samples.append(
            {
                "input_ids": torch.tensor(tokens + [0] * padding),
                "attention_mask": torch.tensor([1] * len(tokens) + [0] * padding),
                "labels": torch.tensor(tokens + [IGNORED] * padding),
            }
        )
    return samples


def arguments(folder: str, made=TrainingArguments, **changes) -> TrainingArguments:
    settings = {
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    return made(output_dir=folder, **{**settings, **changes})


@torch.no_grad()
def divergence(student, teacher, samples) -> float:
    """KL(teacher || student) in nats a token."""
    batch = {name: torch.stack([s[name] for s in samples]).to(student.device) for name in samples[0]}
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    pair = (model.eval().to(student.device)(**inputs).logits[:, :-1] for model in (student, teacher))
    return kd.losses.KDLoss(tau=1.0)(*pair, labels=batch["labels"][:, 1:]).item()


def main(steps: int = 60, seed: int = 0, fused: bool = False) -> dict[str, float]:
    torch.manual_seed(seed)
    vocabulary = 48
    train, held_out = sequences(512, vocabulary), sequences(64, vocabulary)
    teacher, student = language_model(64, 2, vocabulary), language_model(32, 1, vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        Trainer(teacher, arguments(folder, max_steps=2 * steps), train_dataset=train).train()
        before = divergence(student, teacher, held_out)
        settings = arguments(folder, max_steps=steps, per_device_train_batch_size=8, gradient_accumulation_steps=2)
        made = FusedDistillationTrainer if fused else DistillationTrainer
        made(student, settings, train_dataset=train, teacher=teacher).train()
    return {"before": before, "after": divergence(student, teacher, held_out)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of the student; the teacher gets twice as many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fused", action="store_true", help="from hidden states, without logits")
    nats = main(**vars(parser.parse_args()))
    print(f"KL(teacher || student): {nats['before']:.3f} nats a token before, {nats['after']:.3f} after")
