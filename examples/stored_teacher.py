# SPDX-License-Identifier: Apache-2.0
"""Distillation from a stored teacher: its k likeliest tokens are written once, and the student trains without it.

`python examples/stored_teacher.py` trains a small Llama on sequences of a Markov chain, writes 8 of its 48 classes a
token to a file, and distils that file into a smaller one, straight from hidden states. Row i of the file is sample i's,
and the samples of a step follow from its number: a run that was stopped goes on from its checkpoint as if it had not
been. Both are randomly initialised and nothing is downloaded; it needs transformers, accelerate and safetensors and
runs in seconds on a CPU.
"""

from __future__ import annotations

import argparse
import os
import tempfile

import torch
from hf_trainer import Trainer, arguments, divergence, language_model, linear_logits, next_tokens, sequences

import kdkernels as kd

VOCABULARY, TOKENIZER = 48, "markov-48"  # a real one is named as its repository is
BATCH = 16


def stacked(samples, device) -> dict[str, torch.Tensor]:
    batch = {name: torch.stack([sample[name] for sample in samples]).to(device) for name in samples[0]}
    return {**batch, "labels": next_tokens(batch["labels"])}


@torch.no_grad()
def write(teacher, samples, k: int, file: str):
    """k classes of each position. A corpus that does not fit is written in several files."""
    log_p = []
    for i in range(0, len(samples), 64):
        batch = stacked(samples[i : i + 64], teacher.device)
        logits = teacher.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        log_p.append(logits.float().log_softmax(-1).topk(k))
    values, indices = (torch.cat(side) for side in zip(*log_p, strict=True))
    kd.teachers.save_topk(file, kd.TopKLogits(values, indices, vocab=VOCABULARY), tokenizer=TOKENIZER)


def read(file: str, tail="bucket") -> kd.TopKLogits:
    return kd.teachers.load_topk(file, tokenizer=TOKENIZER, vocab=VOCABULARY, tail=tail)


@torch.no_grad()
def tails(student, teacher, samples, file: str) -> dict[str, float]:
    """KL(teacher || student) in nats a token: of all classes, and of those stored with what is left of 1."""
    batch = stacked(samples, student.device)
    kept = {tail: read(file, tail)[: len(samples)].to(student.device) for tail in ("bucket", "renormalize", "ignore")}
    teachers = {"dense": linear_logits(teacher.eval(), batch), **kept}
    loss, logits = kd.losses.KDLoss(tau=1.0), linear_logits(student.eval(), batch)
    return {name: loss(logits, one, labels=batch["labels"]).item() for name, one in teachers.items()}


def distil(student, samples, file: str, steps: int, checkpoint: str):
    """To so many steps in all, from the last of the checkpoint where there is one."""
    teacher = read(file)
    loss = kd.losses.KDLoss(tau=1.0).to(student.device)  # log-probabilities with a tail are of one temperature
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-2)
    first = 0
    if os.path.exists(checkpoint):
        state = torch.load(checkpoint, map_location=student.device)
        first = state["step"]
        student.load_state_dict(state["student"])
        optimiser.load_state_dict(state["optimiser"])
    student.train()
    for step in range(first, steps):
        rows = rows_of(step, len(samples))
        batch = stacked([samples[row] for row in rows.tolist()], student.device)
        kept = teacher[rows].to(student.device)
        loss(linear_logits(student, batch), kept, labels=batch["labels"]).backward()
        optimiser.step()
        optimiser.zero_grad()
    state = {"step": steps, "student": student.state_dict(), "optimiser": optimiser.state_dict()}
    torch.save(state, checkpoint)


def rows_of(step: int, count: int) -> torch.Tensor:
    """The samples of a step: an order of all of them for each epoch, cut into batches."""
    epoch, batch = divmod(step, count // BATCH)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch))
    return order[batch * BATCH : (batch + 1) * BATCH]


def main(steps: int = 60, k: int = 8, seed: int = 0) -> dict[str, float]:
    torch.manual_seed(seed)
    train, held_out = sequences(512, VOCABULARY), sequences(64, VOCABULARY)
    teacher, student = language_model(64, 2, VOCABULARY), language_model(32, 1, VOCABULARY)
    with tempfile.TemporaryDirectory() as folder:
        Trainer(teacher, arguments(folder, max_steps=2 * steps), train_dataset=train).train()
        student.to(teacher.device)
        before, file = divergence(student, teacher, held_out), os.path.join(folder, "teacher.safetensors")
        write(teacher, train, k, file)
        for stop in (steps // 2, steps):  # a run and its continuation
            distil(student, train, file, stop, os.path.join(folder, "student.pt"))
        found = {"before": before, "after": divergence(student, teacher, held_out), "bytes": os.path.getsize(file)}
        return {**found, **tails(student, teacher, train[:64], file)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of the student; the teacher gets twice as many")
    parser.add_argument("--k", type=int, default=8, help="classes to store of each token")
    parser.add_argument("--seed", type=int, default=0)
    found = main(**vars(parser.parse_args()))
    print(f"KL(teacher || student): {found['before']:.3f} nats a token before, {found['after']:.3f} after")
    print(f"the stored teacher has {found['bytes'] / 2**20:.2f} MiB")
    names = ("dense", "bucket", "renormalize", "ignore")
    print("on what was trained, by what is known of a row:", ", ".join(f"{name} {found[name]:.4f}" for name in names))
