# SPDX-License-Identifier: Apache-2.0
"""TRL's GKDTrainer without logits: its loss, the generalised Jensen-Shannon divergence, straight from hidden states.

`python examples/trl_trainer.py` compares the loss with TRL's on one batch, then distils a small Llama into a smaller
one, half of the steps on sequences that the student makes. Both are randomly initialised and nothing is downloaded; it
needs trl, transformers and accelerate and runs in seconds on a CPU. `FusedGKDTrainer` is all that a real model needs.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile

import torch
from hf_trainer import (
    IGNORED,
    Trainer,
    arguments,
    divergence,
    language_model,
    next_tokens,
    one_process,
    pair_of_linear_logits,
    sequences,
)

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # GKD is where TRL warns that names may move
try:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, default_data_collator
    from trl.experimental.gkd import GKDConfig, GKDTrainer
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] not in ("datasets", "trl"):
        raise  # one that these import in turn: the traceback says which
    sys.exit(f"{error}: pip install -e '.[integrations]' installs what is needed")

import kdkernels as kd

PROMPT = 2  # the first tokens of each sequence, which the student is given


class FusedGKDTrainer(GKDTrainer):
    """GKDTrainer with its arguments and its loss: no logits, no gradient of their size. In one process."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        one_process(self)
        # at its ends TRL's beta is the two KL divergences; args.temperature is of sampling alone, there as here
        ends = {0: {"divergence": "forward"}, 1: {"divergence": "reverse"}}
        measure = ends.get(self.beta, {"divergence": "jsd", "beta": self.beta})
        self.distillation = kd.losses.KDLoss(tau=1.0, **measure).to(self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = self.distillation(
            *pair_of_linear_logits(self, model, self.teacher_model.eval(), inputs),
            labels=next_tokens(inputs["labels"]),
            ignore_index=IGNORED,
            normalizer=num_items_in_batch,  # TRL's: of the data set, also where the student made the sequences
        )
        return (loss, {"loss": loss}) if return_outputs else loss


def prompted(samples) -> Dataset:
    """Samples as TRL's collator makes them of conversations: prompts apart, and without a label."""
    rows = []
    for sample in samples:
        labels = sample["labels"].clone()
        labels[:PROMPT] = IGNORED
        prompt = {"prompts": sample["input_ids"][:PROMPT], "prompt_attention_mask": sample["attention_mask"][:PROMPT]}
        rows.append({name: row.tolist() for name, row in {**sample, **prompt, "labels": labels}.items()})
    return Dataset.from_list(rows)


def trainer(student, teacher, samples, folder: str, made=FusedGKDTrainer, **changes) -> GKDTrainer:
    vocabulary = {str(token): token for token in range(student.config.vocab_size)}  # a real model brings a tokenizer
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    settings = {"bf16": False, "max_new_tokens": 12, **changes}  # TRL's default is bf16
    return made(
        student,
        teacher,
        arguments(folder, GKDConfig, **settings),
        data_collator=default_data_collator,
        train_dataset=prompted(samples),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="0"),
    )


def beside_trl(folder: str, vocabulary: int, seed: int) -> dict[str, tuple[float, int]]:
    """Of one batch and models that have learned nothing: the loss, and the bytes that wait for its backward pass."""
    teacher, student = language_model(64, 2, vocabulary), language_model(32, 1, vocabulary)
    ours = trainer(student, teacher, sequences(16, vocabulary), folder, seed=seed)
    batch = next(iter(ours.get_train_dataloader()))
    count = (next_tokens(batch["labels"]) != IGNORED).sum()
    found = {}
    for name, made in (("TRL", GKDTrainer), ("kdkernels", FusedGKDTrainer)):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t,
            lambda t: t,
        ):
            loss = made.compute_loss(ours, ours.model, batch, num_items_in_batch=count)
        found[name] = loss.item(), sum(kept.values())
    return found


def main(steps: int = 60, vocabulary: int = 8000, seed: int = 0) -> dict:
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        found = beside_trl(folder, vocabulary, seed)  # making a trainer sets torch's seed anew
        train, held_out = sequences(512, 48), sequences(64, 48)
        teacher, student = language_model(64, 2, 48), language_model(32, 1, 48)
        Trainer(teacher, arguments(folder, max_steps=2 * steps), train_dataset=train).train()
        before = divergence(student, teacher, held_out)
        trainer(student, teacher, train, folder, max_steps=steps, seed=seed).train()
    return {**found, "before": before, "after": divergence(student, teacher, held_out)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of the student; the teacher gets twice as many")
    parser.add_argument("--vocabulary", type=int, default=8000, help="of the comparison; 48 tokens are trained")
    parser.add_argument("--seed", type=int, default=0)
    found = main(**vars(parser.parse_args()))
    for name in ("TRL", "kdkernels"):
        print(f"{name:9} loss {found[name][0]:.7f}, {found[name][1] / 2**20:.1f} MiB kept for the backward pass")
    print(f"KL(teacher || student): {found['before']:.3f} nats a token before, {found['after']:.3f} after")
