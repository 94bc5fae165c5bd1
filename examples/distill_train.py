# SPDX-License-Identifier: Apache-2.0
"""How a student is trained here: cross-entropy on the labelled rows, plus one distillation loss on all rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from distill_data import Data, Split, augment, draw_labelled
from distill_nets import Output, Setup
from torch import nn

import kdkernels as kd


class PseudoLabel(nn.Module):
    """The control: the teacher's argmax as if it were the label."""

    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.weight = weight

    def forward(self, student_logits, teacher_logits):
        return self.weight * F.cross_entropy(student_logits, teacher_logits.argmax(-1))


class Task(NamedTuple):
    """What a loss may need to know before training starts."""

    epochs: int
    steps: int  # of all epochs
    classes: int
    widths: tuple[int, int]  # of the features: student's, teacher's
    observe: Callable  # () -> the teacher's features of the training images, batch by batch


class Method(NamedTuple):
    title: str
    make: Callable[[float, Task], nn.Module] | None  # (weight, task) -> loss(student, teacher)
    uses: str = "logits"  # field of Output that the loss compares
    grid: tuple[float, ...] = ()  # weights that --tune tries; the first is used where nothing was tuned
    op: str | None = None  # the kdkernels op inside
    labels: bool = False  # whether the loss is called with classes too: the label, or the teacher's argmax without one


def ramped(loss: nn.Module, task: Task) -> nn.Module:
    """CKA does not see the scale of the logits and its gradient is largest at the start: rise over a third."""
    return kd.losses.Ramp(loss, start=0, end=task.steps // 3)


def rcka(weight: float, task: Task) -> nn.Module:
    return ramped(kd.losses.RCKALoss.preset("lcka", row_weight=weight, class_weight=weight), task)


def kda(weight: float, task: Task) -> nn.Module:
    """Rows are drawn anew each epoch, so each epoch has its own counts."""
    how = {"start_epoch": task.epochs // 5, "counts": "epoch", "weight": weight}
    return kd.losses.KDALoss(task.classes, *task.widths, **how)


def rdimkd(variant: str):
    """On the penultimate features, through an adapter, relative to the teacher's variance: k and all this is ours."""

    def make(weight: float, task: Task) -> nn.Module:
        student, teacher = task.widths
        how = {"student_channels": student, "normalizer": "variance", "seed": 0, "weight": weight}
        loss = kd.losses.RdimKDLoss(teacher, min(16, teacher), variant=variant, **how)
        for features in task.observe():
            loss.observe(features.cpu())
        loss.fit()
        return loss

    return make


METHODS = {
    "ce": Method("cross-entropy alone", None),
    "pseudo": Method("control: teacher's argmax", lambda w, task: PseudoLabel(w), "logits", (1.0, 0.3, 3.0, 10.0)),
    "kd": Method("KD, tau 4", lambda w, task: kd.losses.KDLoss(tau=4.0, weight=w), "logits", (1.0, 0.3, 3.0, 10.0)),
    "cka": Method(
        "CKA of features, ramp",
        lambda w, task: ramped(kd.losses.CKALoss(weight=w), task),
        "features",
        (15.0, 5.0, 30.0, 60.0, 120.0),
        "cka",
    ),
    "rcka": Method("RCKA of logits, ramp", rcka, "logits", (15.0, 1.0, 5.0, 30.0, 60.0), "cka"),
    "cmkd": Method(
        "CMKD, entropy at tau 4",
        lambda w, task: kd.losses.CMKDLoss(weight=w),
        "logits",
        (5.0, 1.0, 2.0, 10.0, 20.0),
        "spearman",
    ),
    "kda": Method(
        "KDA, from 20 % of training",
        kda,
        "features",
        (1.0, 0.04, 0.3, 3.0, 10.0),
        "landmark_similarity_loss",
        labels=True,
    ),
    **{
        f"rdimkd-{variant.lower()}": Method(
            f"RdimKD-{variant}, k 16", rdimkd(variant), "features", (5.0, 1.0, 2.0, 10.0, 20.0, 40.0), "projected_mse"
        )
        for variant in "PAR"
    },
}
CONTROLS = ("ce", "pseudo", "kd")  # always in the table


class Run(NamedTuple):
    method: str
    seed: int
    weight: float | None
    curve: list[float]  # validation accuracy after each epoch, %
    test: float | None  # test accuracy after the last one, %; None while weights are chosen


class Timing(NamedTuple):
    step_ms: float  # a whole training step
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

    def distillation(self, student: Output, teacher: Output, labels: torch.Tensor):
        compared = getattr(student, self.method.uses), getattr(teacher, self.method.uses)
        if not self.method.labels:
            return self.loss(*compared)
        return self.loss(*compared, torch.cat([labels, teacher.logits[len(labels) :].argmax(1)]))

    def step(self, order: torch.Tensor):
        images, labels = self.batch(order)
        student, teacher = self.net(images), None
        total = F.cross_entropy(student.logits[: len(labels)], labels)
        if self.loss is not None:
            with torch.no_grad():
                teacher = self.teacher(images)
            total = total + self.distillation(student, teacher, labels)
        self.sgd.zero_grad()
        total.backward()
        self.sgd.step()
        self.schedule.step()
        return student, teacher

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
    """Medians over steps, one run at a time; the loss is timed on the outputs of the same steps, cut off the net.

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

    steps, losses, output, warm_up = [], [], None, 1 + repeats // 6
    for i in range(warm_up + repeats):
        start = clock()
        output, target = student.step(rows)
        middle = clock()
        if student.loss is not None:
            leaves = Output(*(t.detach().requires_grad_() for t in output))
            begin = clock()
            student.distillation(leaves, target, target.logits[:0].argmax(1)).backward()
            end = clock()
            if i >= warm_up:
                losses.append(end - begin)
        if i >= warm_up:
            steps.append(middle - start)
    op = METHODS[method].op
    field = METHODS[method].uses
    backend = kd.explain(op, getattr(output, field), getattr(target, field)).backend if op else "plain PyTorch"
    return Timing(1e3 * _median(steps), 1e3 * _median(losses) if losses else None, backend)


def _median(values) -> float:
    return sorted(values)[len(values) // 2]
