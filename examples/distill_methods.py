# SPDX-License-Identifier: Apache-2.0
"""The losses that the demonstration compares, each with the weights that `--tune` tries."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
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
    mixes: bool = False  # whether it is called on mixed samples, and holds its own cross-entropy


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


def relational(title: str, name: str, grid: tuple[float, ...], op: str) -> Method:
    """The first weight of the grid is that of the reference implementation."""
    return Method(title, lambda w, task: getattr(kd.losses, name)(weight=w), "features", grid, op)


LOGITS = (1.0, 0.3, 3.0, 10.0)  # weights tried for a loss of the size of cross-entropy

METHODS = {
    "ce": Method("cross-entropy alone", None),
    "pseudo": Method("control: teacher's argmax", lambda w, task: PseudoLabel(w), "logits", LOGITS),
    "kd": Method("KD, tau 4", lambda w, task: kd.losses.KDLoss(tau=4.0, weight=w), "logits", LOGITS, "distillation_kl"),
    "dkd": Method(
        "DKD 1 : 8, tau 4",
        lambda w, task: kd.losses.DKDLoss(weight=w),
        "logits",
        (1.0, 0.1, 0.3, 3.0),
        "distillation_kl",
        labels=True,
    ),
    "dist": Method(
        "DIST, tau 4", lambda w, task: kd.losses.DISTLoss(tau=4.0, weight=w), "logits", (0.2, 0.05, 0.1, 0.5, 1.0)
    ),
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
    "stkd": Method(
        "STKD, tau 4; weight: alpha",
        lambda alpha, task: kd.losses.STKDLoss(alpha=alpha),
        "logits",
        (0.9, 0.3, 0.5, 0.7, 0.95),
        "mixed_distillation",
        mixes=True,
    ),
    "kda": Method(
        "KDA, from 20 % of training",
        kda,
        "features",
        (1.0, 0.04, 0.3, 3.0, 10.0),
        "landmark_similarity_loss",
        labels=True,
    ),
    "sp": relational("SP of features", "SPLoss", (3000.0, 300.0, 1000.0, 10000.0), "gram_mse"),
    "rkd": relational("RKD of features, 25 : 50", "RKDLoss", (1.0, 0.3, 3.0, 10.0), "rkd_angle"),
    "pkt": relational("PKT of features", "PKTLoss", (30000.0, 3000.0, 10000.0, 100000.0), "pkt"),
    **{
        f"rdimkd-{variant.lower()}": Method(
            f"RdimKD-{variant}, k 16", rdimkd(variant), "features", (5.0, 1.0, 2.0, 10.0, 20.0, 40.0), "projected_mse"
        )
        for variant in "PAR"
    },
}
CONTROLS = ("ce", "pseudo", "kd")  # always in the table
