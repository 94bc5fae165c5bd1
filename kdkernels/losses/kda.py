# SPDX-License-Identifier: Apache-2.0
"""KDA: similarity to the class means of both networks, which the loss itself collects while it trains."""

from __future__ import annotations

from typing import Literal

import torch

from .. import checks
from .._types import Backend, Mask, Result
from ..distributed import GroupLike
from ..nystrom.kda import ClassCenters
from ..nystrom.kda.op import landmark_similarity_loss
from .base import Loss, check_pair, constant, full_precision, row_mask, warn_once, zero_where_masked


class KDALoss(Loss):
    """Kernel matrix transfer by landmarks (KDA): similarities of each sample to the class centres.

    sum smooth_l1(s S_c' - t T_c') / |t T_c'|_F, S_c and T_c [C, .] the class means of the epoch before.

    Source: KDA, Improved KD via Full Kernel Matrix Transfer, arXiv 2009.14416, the features variant as its public code
    has it: features after pooling, not normalised; sum over batch and classes; weight 0.04; nothing before epoch 5;
    class counts taken in epoch 0. Its recipe: 120 epochs, batch 256, learning rate 0.1 with cosine, weight decay 5e-4.

    Args:
        num_classes: C. student_dim, teacher_dim: widths of the features; they may differ.
        start_epoch: the loss is 0, without gradient, in the epochs before it; epochs are counted by `end_epoch`.
        momentum: None: the paper's swap; a number: our moving average of the centres, see `kd.ClassCenters`.
        counts: "first": sums of each epoch are divided by the class counts of epoch 0, as in the public code: right
            where every epoch sees every sample once; else "epoch".
        weight: factor of the loss, a buffer.
        group: None, or "world" or a process group: the batch is that of all its ranks, see below.
        backend: as in `kd.landmark_similarity_loss`.

    Call: `(student_features, teacher_features, labels=None, *, mask, ignore_index=-100, return_parts)`: features [B,
    d], [B, e] of any float dtype (larger ones are flattened), labels [B] class indices. In training mode the rows are
    added to `centers`; without labels, and in eval mode, they are not. At the end of each epoch call `end_epoch()` (in
    Lightning from `on_train_epoch_end`, in a Trainer from a callback's `on_epoch_end`), which makes the means the
    centres: until then the loss is 0, and says so once where training goes on after an evaluation. Rows whose label is
    ignore_index, and masked rows, count nowhere. Where nothing has a centre yet the loss is 0. Labels out of range
    raise on the CPU, on a GPU such rows are not added. An empty batch gives 0 with zero gradient and warns once.
    Gradient to the student only. `centers`, `epoch`, `weight` are in the state dict.

    With `group=` sum and norm are those of the rows of all ranks, the same value on each, and the gradient averaged
    over the ranks is that of one process; `end_epoch()`, called by all ranks, makes the class means of what all of them
    have seen the centres of each. A rank sends 16 bytes a step and one number backward, and 8 C (d + e + 1) bytes an
    epoch; 224 to agree before each.

    >>> loss = kd.losses.KDALoss(10, 16, 64, start_epoch=1)
    >>> student, teacher = torch.randn(8, 16, requires_grad=True), torch.randn(8, 64)
    >>> labels = torch.randint(10, (8,))
    >>> loss(student, teacher, labels).item()
    0.0
    >>> loss.end_epoch()
    >>> loss(student, teacher, labels).backward()
    """

    start_epoch: int
    centers: ClassCenters

    def __init__(
        self,
        num_classes: int,
        student_dim: int,
        teacher_dim: int,
        *,
        start_epoch: int = 5,
        momentum: float | None = None,
        counts: Literal["epoch", "first"] = "first",
        weight: float = 0.04,
        group: GroupLike = None,
        backend: Backend = "auto",
    ):
        super().__init__(weight, group)
        checks.integer(start_epoch, "start_epoch", 0)
        self.start_epoch, self.backend, self._collecting = start_epoch, backend, False
        self.centers = ClassCenters(num_classes, student_dim, teacher_dim, momentum, counts=counts)

    @property
    def epoch(self) -> torch.Tensor:
        """How many times `end_epoch` was called, a buffer of `centers`."""
        return self.centers.epoch

    def forward(
        self,
        student_features: torch.Tensor,
        teacher_features: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        mask: Mask = None,
        ignore_index: int = -100,
        return_parts: bool = False,
    ) -> Result:
        batch = None

        def prepare():
            nonlocal batch
            names = check_pair(self, student_features, teacher_features, "features")
            s, t = student_features.flatten(1), constant(teacher_features).flatten(1)
            for x, name, width in (
                (s, names[0], self.centers.student_dim),
                (t, names[1], self.centers.teacher_dim),
            ):
                if x.shape[1] != width:
                    raise ValueError(f"{name} has {x.shape[1]} features a sample, this loss was made for {width}")
            counted = row_mask(mask, labels, ignore_index, s, names[0])
            if self.training and labels is not None:
                batch = self.centers._batch(s, t, labels, mask, ignore_index)
            return {"features": (s, t, counted)}

        ((s, t, counted),), (group,) = self._over_ranks(prepare, f" of {self.centers.num_classes} classes")
        if batch is not None:
            self._collecting = True
            with full_precision(s):
                self.centers._add(*batch)
        if self._too_small(len(s) if group is None else group.total, 1):
            return self._nothing(["landmarks"], s, return_parts)
        with full_precision(s):
            # rows of zeros add nothing to either sum
            s, t = zero_where_masked(s, counted), zero_where_masked(t, counted)
            centers = self.centers.student_centers, self.centers.teacher_centers
            value = landmark_similarity_loss(s, t, *centers, group=group, backend=self.backend)
            # a tensor decides, so that nobody waits for the device and nothing is compiled again
            value = torch.where(self.epoch >= self.start_epoch, value, 0)
        return self._total({"landmarks": value}, return_parts)

    def end_epoch(self, group: GroupLike = None) -> None:
        """The epoch's means, over `group` or else the loss' own, become the centres of the next one."""
        self.centers.swap(self.group if group is None else group)

    def train(self, mode: bool = True) -> KDALoss:
        if mode and not self.training and self._collecting and int(self.epoch) == 0:
            warn_once(
                f"{self._token} open",
                "KDALoss trains on after an evaluation, and end_epoch() was never called: without it, at the end of "
                "each epoch, the loss stays 0",
            )
        return super().train(mode)

    def _shown(self):
        return {"start_epoch": self.start_epoch, "backend": repr(self.backend)}
