# SPDX-License-Identifier: Apache-2.0
"""Distillation from a stored teacher: its k likeliest tokens are written once, and the student trains without it.

`python examples/stored_teacher.py` trains a small Llama on sequences of a Markov chain, writes 8 of its 48 classes a
token to a file, and distils that file into a smaller one. Both are randomly initialised and nothing is downloaded; it
needs transformers, accelerate and safetensors and runs in seconds on a CPU.
"""

from __future__ import annotations

import argparse
import os
import tempfile

import torch
from hf_trainer import IGNORED, Trainer, arguments, divergence, language_model, sequences

import kdkernels as kd

VOCABULARY, TOKENIZER = 48, "markov-48"  # a real one is named as its repository is


def stacked(samples) -> dict[str, torch.Tensor]:
    """The batch of samples; label i is the token that position i predicts."""
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    batch["labels"] = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    return batch


def logits_of(model, batch):
    device = model.device
    return model(batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device)).logits


@torch.no_grad()
def write(teacher, samples, k: int, file: str):
    """k classes of each position. A corpus that does not fit is written in several files."""
    log_p = [
        logits_of(teacher.eval(), stacked(samples[i : i + 64])).float().log_softmax(-1)
        for i in range(0, len(samples), 64)
    ]
    values, indices = torch.cat(log_p).topk(k)
    kd.teachers.save_topk(file, kd.TopKLogits(values, indices, vocab=VOCABULARY), tokenizer=TOKENIZER)


def distil(student, samples, file: str, steps: int):
    teacher = kd.teachers.load_topk(file, tokenizer=TOKENIZER, vocab=VOCABULARY, tail="bucket")
    loss = kd.losses.KDLoss(tau=1.0).to(student.device)  # log-probabilities with a tail are of one temperature
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-2)
    student.train()
    for _ in range(steps):
        chosen = torch.randint(len(samples), (16,))
        batch = stacked([samples[i] for i in chosen.tolist()])
        kept = teacher[chosen].to(student.device)
        loss(logits_of(student, batch), kept, labels=batch["labels"].to(student.device)).backward()
        optimiser.step()
        optimiser.zero_grad()


def main(steps: int = 60, k: int = 8, seed: int = 0) -> dict[str, float]:
    torch.manual_seed(seed)
    train, held_out = sequences(512, VOCABULARY), sequences(64, VOCABULARY)
    teacher, student = language_model(64, 2, VOCABULARY), language_model(32, 1, VOCABULARY)
    with tempfile.TemporaryDirectory() as folder:
        Trainer(teacher, arguments(folder, max_steps=2 * steps), train_dataset=train).train()
        student.to(teacher.device)
        before, file = divergence(student, teacher, held_out), os.path.join(folder, "teacher.safetensors")
        write(teacher, train, k, file)
        distil(student, train, file, steps)
        return {"before": before, "after": divergence(student, teacher, held_out), "bytes": os.path.getsize(file)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of the student; the teacher gets twice as many")
    parser.add_argument("--k", type=int, default=8, help="classes to store of each token")
    parser.add_argument("--seed", type=int, default=0)
    found = main(**vars(parser.parse_args()))
    print(f"KL(teacher || student): {found['before']:.3f} nats a token before, {found['after']:.3f} after")
    print(f"the stored teacher has {found['bytes'] / 2**20:.2f} MiB")
