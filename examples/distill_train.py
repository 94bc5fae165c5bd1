# SPDX-License-Identifier: Apache-2.0
"""How a student is trained here: cross-entropy on the labelled rows, plus one distillation loss on all rows."""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from distill_data import Data, Split, augment, draw_labelled
from distill_methods import METHODS, Task
from distill_nets import Output, Setup
from torch import nn

import kdkernels as kd


class Run(NamedTuple):
    method: str
    seed: int
    weight: float | None
    curve: list[float]  # validation accuracy after each epoch, %
    test: float | None  # test accuracy after the last one, %; None while weights are chosen


PHASES = ("forward", "loss", "backward")


class Timing(NamedTuple):
    step_ms: float  # a whole training step
    phases_ms: tuple[float, ...]  # of it: PHASES, the nets forward, all losses forward, everything backward
    loss_ms: float | None  # forward and backward of the added loss alone
    backend: str


@torch.no_grad()
def accuracy(net: nn.Module, split: Split) -> float:
    """Per cent."""
    training = net.training
    net.eval()
    right = sum(
        (net(x).logits.argmax(1) == y).sum().item() for x, y in zip(*(t.split(1024) for t in split), strict=True)
    )
    net.train(training)
    return 100 * right / len(split.labels)


def optimiser(parameters, setup: Setup, steps: int):
    sgd = torch.optim.SGD(parameters, setup.lr, momentum=0.9, nesterov=True, weight_decay=setup.weight_decay)
    return sgd, torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps)


def train_teacher(data: Data, setup: Setup, seed: int, epochs: int, on_epoch=lambda: None) -> nn.Module:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = setup.teacher(data.classes).to(data.train.images.device)
    sgd, schedule = optimiser(net.parameters(), setup, epochs * (len(data.train.labels) // setup.unlabelled))
    for _ in range(epochs):
        order = torch.randperm(len(data.train.labels), generator=generator)
        for rows in order.split(setup.unlabelled):
            if len(rows) < setup.unlabelled:
                break
            logits = net(augment(data.train.images[rows], data, generator)).logits
            sgd.zero_grad()
            F.cross_entropy(logits, data.train.labels[rows]).backward()
            sgd.step()
            schedule.step()
        on_epoch()
    return net.eval().requires_grad_(False)


class Student:
    """One student and what one step of its training does; the same seed gives every method the same start and data."""

    def __init__(self, method: str, weight: float | None, data: Data, teacher, setup: Setup, seed: int, epochs: int):
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.mixing = torch.Generator().manual_seed(seed)  # one of its own: the batches stay those of the others
        self.method, self.data, self.teacher, self.setup = METHODS[method], data, teacher, setup
        self.labelled = draw_labelled(data.train.labels, setup.labels, seed)
        self.net = setup.student(data.classes).to(data.train.images.device)
        self.steps_per_epoch = len(data.train.labels) // setup.unlabelled
        steps = epochs * self.steps_per_epoch
        widths = self.net.head.in_features, teacher.head.in_features
        task = Task(epochs, steps, data.classes, widths, self._teacher_features)
        self.loss = self.method.make(weight, task).to(data.train.images.device) if self.method.make else None
        own = [] if self.loss is None else self.loss.parameters()
        self.sgd, self.schedule = optimiser([*self.net.parameters(), *own], setup, steps)

    @torch.no_grad()
    def _teacher_features(self):
        for images in self.data.train.images.split(1024):
            yield self.teacher(images).features

    def batch(self, order: torch.Tensor):
        """Labelled rows first, then rows whose label nobody reads."""
        drawn = self.labelled[torch.randint(len(self.labelled), (self.setup.labelled,), generator=self.generator)]
        images = self.data.train.images[torch.cat([drawn, order])]
        return augment(images, self.data, self.generator), self.data.train.labels[drawn]

    def forward(self, images: torch.Tensor, labels: torch.Tensor):
        """Outputs of student and teacher, and what else the loss is called with."""
        if self.loss is None:
            return self.net(images), None, ()
        with torch.no_grad():
            teacher = self.teacher(images)
        more = ()
        if self.method.labels or self.method.mixes:
            more = (torch.cat([labels, teacher.logits[len(labels) :].argmax(1)]),)
        if self.method.mixes:
            more = (kd.mixup(images, *more, alpha=1.0, generator=self.mixing),)
            images = more[0].x
            with torch.no_grad():
                teacher = self.teacher(images)
        return self.net(images), teacher, more

    def added(self, student: Output, teacher: Output, more) -> torch.Tensor:
        return self.loss(getattr(student, self.method.uses), getattr(teacher, self.method.uses), *more)

    def total(self, student: Output, teacher: Output | None, labels: torch.Tensor, more) -> torch.Tensor:
        if self.method.mixes:
            return self.added(student, teacher, more)
        total = F.cross_entropy(student.logits[: len(labels)], labels)
        return total if self.loss is None else total + self.added(student, teacher, more)

    def step(self, order: torch.Tensor, passed=lambda phase: None):
        """One step; `passed` is called at the end of each of PHASES."""
        images, labels = self.batch(order)
        passed("data")
        student, teacher, more = self.forward(images, labels)
        passed("forward")
        total = self.total(student, teacher, labels, more)
        passed("loss")
        self.sgd.zero_grad()
        total.backward()
        passed("backward")
        self.sgd.step()
        self.schedule.step()
        return student, teacher, more

    def epoch(self):
        order = torch.randperm(len(self.data.train.labels), generator=self.generator)
        for rows in order[: self.steps_per_epoch * self.setup.unlabelled].split(self.setup.unlabelled):
            self.step(rows)
        if hasattr(self.loss, "end_epoch"):
            self.loss.end_epoch()


def train_student(
    method: str, weight, data: Data, teacher, setup: Setup, seed: int, epochs: int, on_epoch=lambda: None
) -> Run:
    student = Student(method, weight, data, teacher, setup, seed, epochs)
    curve = []
    for _ in range(epochs):
        student.epoch()
        curve.append(accuracy(student.net, data.validation))
        on_epoch()
    test = None if data.test is None else accuracy(student.net, data.test)
    return Run(method, seed, weight, curve, test)


def time_method(method: str, weight, data: Data, teacher, setup: Setup, repeats: int = 60) -> Timing:
    """Medians over steps, one run at a time; the loss is timed once more on the outputs of the same steps.

    On the CPU it is the CPU time of the one thread, which other programs disturb less than the time on the wall.
    """
    device = data.train.images.device
    student = Student(method, weight, data, teacher, setup, seed=0, epochs=repeats)
    rows = torch.arange(setup.unlabelled)

    def clock() -> float:
        if device.type == "cpu":
            return time.process_time()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    seconds = {name: [] for name in ("step", "alone", "data", *PHASES)}
    for i in range(1 + repeats // 6 + repeats):
        if i == 1 + repeats // 6:  # warm
            seconds = {name: [] for name in seconds}
        start = last = clock()

        def passed(phase):
            nonlocal last
            now = clock()
            seconds[phase].append(now - last)  # noqa: B023
            last = now

        output, target, more = student.step(rows, passed)
        seconds["step"].append(clock() - start)
        if student.loss is not None:
            leaves = Output(*(t.detach().requires_grad_() for t in output))
            start = clock()
            student.added(leaves, target, more).backward()
            seconds["alone"].append(clock() - start)
    ms = {name: 1e3 * statistics.median(values) for name, values in seconds.items() if values}
    op, field = METHODS[method].op, METHODS[method].uses
    backend = kd.explain(op, getattr(output, field), getattr(target, field)).backend if op else "plain PyTorch"
    return Timing(ms["step"], tuple(ms[name] for name in PHASES), ms.get("alone"), backend)
