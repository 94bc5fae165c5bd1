# SPDX-License-Identifier: Apache-2.0
"""Distillation on several ranks with a loss of the batch of all of them: what it trains is what one process trains.

    torchrun --nproc-per-node 2 examples/ddp_distill.py          (under a minute on two cores, CPU and gloo)
    torchrun --nproc-per-node 2 examples/ddp_distill.py --check  (once more in one process: how far do weights differ?)
    python examples/ddp_distill.py                               (one process)

Set-up A of examples/distill.py: digits, few labels, cross-entropy plus the CKA of penultimate features. CKA compares
samples with each other, so a rank's rows alone would give another loss, of half the pairs: `group="world"` compares the
rows of all ranks. Batches have an odd number of rows and the last one of an epoch is smaller: ranks differ by a row.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path

try:
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from distill_data import load
    from distill_nets import SETUPS
    from distill_train import Student, accuracy, optimiser, train_teacher
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
except ModuleNotFoundError as error:
    sys.exit(f"{error}: run `make demo` once, which installs what is needed, or: pip install -e '.[demo]'")

import kdkernels as kd

WEIGHTS = Path(__file__).with_name("weights.json")
ROWS = 65  # without a label, beside 32 with one: 97 rows do not split evenly


class RankStudent(Student):
    """The student of examples/distill.py on one of `world` ranks, which sees every world-th row of the same batches."""

    def __init__(self, weight: float, data, teacher, setup, seed: int, epochs: int, rank: int = 0, world: int = 1):
        super().__init__("cka", weight, data, teacher, setup, seed, epochs)
        self.rank, self.world = rank, world
        self.steps_per_epoch = -(-len(data.train.labels) // setup.unlabelled)  # with the smaller last batch
        steps = epochs * self.steps_per_epoch
        # nothing else changes: the loss asks the other ranks itself
        loss = kd.losses.CKALoss(weight=weight, group="world" if world > 1 else None)
        self.loss = kd.losses.Ramp(loss, start=0, end=steps // 3)
        self.net = without_batch_statistics(self.net)
        if world > 1:
            self.net = DistributedDataParallel(self.net)
        self.sgd, self.schedule = optimiser(self.net.parameters(), setup, steps)

    def batch(self, order: torch.Tensor):
        """This rank's rows of the batch that all ranks draw alike."""
        images, labels = super().batch(order)
        return images[self.rank :: self.world], labels[self.rank :: self.world]

    def total(self, student, teacher, labels, more) -> torch.Tensor:
        # a mean over all labelled rows: DDP averages the ranks, whose numbers of rows differ
        ce = F.cross_entropy(student.logits[: len(labels)], labels, reduction="sum")
        return ce * self.world / self.setup.labelled + self.added(student, teacher, more)


def without_batch_statistics(module: nn.Module) -> nn.Module:
    """Batch norm replaced by group norm: statistics of a rank's own rows would depend on the number of ranks.

    (On GPUs `torch.nn.SyncBatchNorm` is the other way out.)
    """
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return nn.GroupNorm(1, module.num_features)
    for name, child in module.named_children():
        setattr(module, name, without_batch_statistics(child))
    return module


def the_teacher(data, setup, seed: int, epochs: int, rank: int, world: int) -> nn.Module:
    """Trained by rank 0, the same on all."""
    if rank == 0:
        teacher = train_teacher(data, setup, seed, epochs)
    else:
        teacher = setup.teacher(data.classes).eval().requires_grad_(False)
    if world > 1:
        for tensor in teacher.state_dict().values():
            dist.broadcast(tensor, 0)
    return teacher


def trained(student: Student, epochs: int) -> tuple[nn.Module, list[torch.Tensor]]:
    """The network, and its weights as they were after the first epoch."""
    net = student.net.module if student.world > 1 else student.net
    early = []
    for _ in range(epochs):
        student.epoch()
        early = early or [p.detach().clone() for p in net.parameters()]
    return net, early


def difference(ours, theirs) -> str:
    with torch.no_grad():
        return f"{max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)):.1e}"


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=30, help="of teacher and student (default: 30)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="in float64; rank 0 then trains alone")
    options = parser.parse_args(arguments)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if options.check and world == 1:
        parser.error("--check compares several ranks with one process: start it with torchrun, as its first lines show")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")  # one input channel
    if world > 1:
        dist.init_process_group("gloo")
    began = time.perf_counter()
    setup, data = SETUPS["digits", "A"]._replace(unlabelled=ROWS), load("digits")
    if options.check:  # in float32 a rounding that takes one ReLU across 0 soon changes every digit of the weights
        torch.set_default_dtype(torch.float64)
        splits = ((name, getattr(data, name)) for name in ("train", "validation", "test"))
        data = data._replace(**{name: split._replace(images=split.images.double()) for name, split in splits})
    weight = json.loads(WEIGHTS.read_text())["digits"]["A"]["cka"]["weight"]
    teacher = the_teacher(data, setup, options.seed, options.epochs, rank, world)
    how = (weight, data, teacher, setup, options.seed, options.epochs)
    net, early = trained(RankStudent(*how, rank, world), options.epochs)
    if rank == 0:
        report("teacher", teacher, data)
        report(f"student, {world} process{'es' if world > 1 else ''}", net, data)
    if options.check and rank == 0 and world > 1:
        alone, early_alone = trained(RankStudent(*how), options.epochs)
        report("student, 1 process", alone, data)
        with torch.no_grad():
            answers = [one(data.test.images).logits.argmax(1) for one in (net, alone)]
        print(f"test images with another answer: {(answers[0] != answers[1]).sum()}")
        # nothing but rounding differs, and training multiplies that: one process with a start 1e-15 away from these
        # weights ended 0.28 away after 20 epochs
        print(f"largest difference of a weight: {difference(early, early_alone)} after the first epoch,", end=" ")
        print(f"{difference(net.parameters(), alone.parameters())} after the last")
    if rank == 0:
        print(f"Took {time.perf_counter() - began:.0f} s.")
    if world > 1:
        dist.destroy_process_group()
    return 0


def report(what: str, net: nn.Module, data):
    print(f"{what:22s} test {accuracy(net, data.test):5.2f} %", flush=True)


if __name__ == "__main__":
    sys.exit(main())
