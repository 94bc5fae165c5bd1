# SPDX-License-Identifier: Apache-2.0
"""Class means of both networks' features over an epoch: summed while training, swapped in when the epoch ends.

A batch is one pass: one kernel on a GPU for both networks and the counts, each class summed in the order of the rows:
two runs give the same bits. Sums are float64, means float32, all of it buffers.
"""

from __future__ import annotations

from typing import Literal

import torch

from ... import backend as backends
from ... import checks
from ..._types import Mask
from ...accumulator import Accumulator, summed
from ...distributed import GroupLike


class ClassCenters(Accumulator):
    """Landmarks of KDA: `update` sums features by class, `swap` makes their means the landmarks of the next epoch.

    Source: KDA (arXiv 2009.14416): the centres of an epoch are the class means of the epoch before, no moving average.

    Args:
        num_classes: C. student_dim, teacher_dim: widths d and e of the features.
        momentum: None: the paper's swap. A number in [0, 1), our extension: centre = momentum centre +
            (1 - momentum) mean, except that a class that has no centre yet takes the mean.
        counts: "epoch": the means of what was seen, exact however many rows that was. "first": the sums of every epoch
            are divided by the counts of the first one, as in the public code, which takes the counts in epoch 0.

    `update(s, t, labels, *, mask=None)`: s [B, d], t [B, e] in any float dtype, labels [B] class indices; rows with
    label -100 (`ignore_index`) and masked rows do not count. Detached. Labels outside 0 .. C - 1 raise on the CPU and
    under `kd.debug_checks()`; on a GPU, where reading them would wait for the device, such rows do not count.
    `swap()`: a class that was not seen keeps the centre it has (zero at the start, where it adds nothing to the loss).
    Buffers: student_centers [C, d], teacher_centers [C, e] (float32), the running sums (float64 always) and counts, and
    `epoch`. Several processes: `swap(group)` makes them the means of what all ranks have seen.

    >>> centers = kd.ClassCenters(2, 3, 1)
    >>> centers.update(torch.tensor([[1.0, 0, 0], [3.0, 0, 0]]), torch.tensor([[2.0], [4.0]]), torch.tensor([1, 1]))
    >>> centers.swap()
    >>> centers.student_centers[1], centers.teacher_centers[:, 0]
    (tensor([2., 0., 0.]), tensor([0., 3.]))
    """

    num_classes: int
    student_dim: int
    teacher_dim: int
    momentum: float | None
    ignore_index: int
    student_centers: torch.Tensor
    teacher_centers: torch.Tensor

    def __init__(
        self,
        num_classes: int,
        student_dim: int,
        teacher_dim: int,
        momentum: float | None = None,
        *,
        counts: Literal["epoch", "first"] = "epoch",
        ignore_index: int = -100,
    ):
        super().__init__()
        for value, name in ((num_classes, "num_classes"), (student_dim, "student_dim"), (teacher_dim, "teacher_dim")):
            checks.integer(value, name)
        checks.integer(ignore_index, "ignore_index", None)
        if momentum is not None and not (checks.is_number(momentum) and 0 <= momentum < 1):
            raise ValueError(f"momentum is {momentum!r}: give None for the paper's swap, or a number in [0, 1)")
        if counts not in ("epoch", "first"):
            raise ValueError(f"counts is {counts!r}: give 'epoch' or 'first'")
        self.num_classes, self.student_dim, self.teacher_dim = num_classes, student_dim, teacher_dim
        self.momentum, self.count_rule, self.ignore_index = momentum, counts, ignore_index
        for side, width in (("student", student_dim), ("teacher", teacher_dim)):
            self.register_buffer(f"{side}_centers", torch.zeros(num_classes, width))
            self.register_buffer(f"{side}_sums", torch.zeros(num_classes, width, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("first_counts", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("known", torch.zeros(num_classes, dtype=torch.bool))  # classes that have a centre
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))

    def update(self, s: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, *, mask: Mask = None) -> None:
        """Adds the rows of one batch to the sums of their classes."""
        self._add(*self._batch(s, t, labels, mask, self.ignore_index))

    @torch.no_grad()
    def _batch(self, s: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, mask: Mask, ignore_index: int):
        """What `_add` takes, checked: a loss over ranks adds it when no rank has refused its own."""
        self._check(s, t, labels, mask)
        counted, ignored = (labels >= 0) & (labels < self.num_classes), (self.ignore_index, ignore_index)
        if checks.may_read(labels):
            bad = ~counted
            for index in ignored:
                bad &= labels != index
            # numbers first: a message built eagerly would cost a reduction each call
            if bool(bad.any()):
                raise ValueError(
                    f"labels holds {int(labels[bad][0])}: give class indices from 0 to {self.num_classes - 1}, or "
                    f"{ignore_index} for a row that does not count"
                )
        for index in ignored:
            if 0 <= index < self.num_classes:  # others do not count as it is
                counted &= labels != index
        return s, t, labels, counted if mask is None else counted & mask

    @torch.no_grad()
    def _add(self, s: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, counted) -> None:
        if s.is_cuda and backends.obstacle("triton", "cuda", (s.dtype, t.dtype)) is None:
            from .triton_centers import add_rows

            add_rows(s, t, labels, counted, self.student_sums, self.teacher_sums, self.counts)
            return
        index = torch.where(counted, labels, 0).long()
        self.counts.index_add_(0, index, counted.long())
        for rows, sums in ((s, self.student_sums), (t, self.teacher_sums)):
            # a row that does not count may hold NaN
            sums.index_add_(0, index, torch.where(counted[:, None], rows.double(), 0))

    @torch.no_grad()
    def swap(self, group: GroupLike = None) -> None:
        """Ends an epoch: the means of what was seen become the centres, and the sums start again from zero.

        group: None, or "world" or a process group: the sums of all its ranks are added first, so that every rank ends
            with the centres of one process that saw all batches, whichever rank saw which and how many. All ranks of
            it call swap. One message of 8 C (d + e + 1) bytes a rank, whatever the number of batches, and 224 to agree.
        """
        if group is not None:
            names = ("student_sums", "teacher_sums", "counts")
            handle = self._over_ranks(group, names, f" of momentum={self.momentum}, counts={self.count_rule!r}")
            held = [getattr(self, name) for name in names]
            for own, joined in zip(held, summed(held, handle), strict=True):
                own.copy_(joined)
        seen = self.counts > 0
        divisor = self.counts
        if self.count_rule == "first":
            # a class met for the first time later on has only its own count
            self.first_counts.copy_(torch.where(self.first_counts > 0, self.first_counts, self.counts))
            divisor = self.first_counts
        divisor = divisor.clamp(min=1)[:, None]
        old = 0.0 if self.momentum is None else self.momentum
        for centers, sums in (
            (self.student_centers, self.student_sums),
            (self.teacher_centers, self.teacher_sums),
        ):
            mean = sums / divisor
            if old:
                mean = torch.where(self.known[:, None], old * centers + (1 - old) * mean, mean)
            centers.copy_(torch.where(seen[:, None], mean.to(centers.dtype), centers))
            sums.zero_()
        self.known |= seen
        self.counts.zero_()
        self.epoch += 1

    def _check(self, s: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, mask: Mask):
        for tensor, name, width in ((s, "s", self.student_dim), (t, "t", self.teacher_dim)):
            checks.floating(tensor, name)
            if tensor.dim() != 2 or tensor.shape[1] != width:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}: these centres take [B, {width}]")
            if tensor.device != self.counts.device:
                raise ValueError(f"{name} is on {tensor.device}, the centres on {self.counts.device}: move one")
        checks.is_tensor(labels, "labels")
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise TypeError(f"labels is {labels.dtype}: give class indices, e.g. labels.long()")
        checks.same_device(labels, s, "labels", "s")
        if mask is not None:
            checks.boolean(mask, s, "s")
        for tensor, name in ((t, "t"), (labels, "labels"), *(((mask, "mask"),) if mask is not None else ())):
            if tensor.shape[:1] != s.shape[:1] or (name != "t" and tensor.dim() != 1):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}: one entry a row of s is ({s.shape[0]},)")

    def extra_repr(self) -> str:
        own = f"{self.num_classes}, {self.student_dim}, {self.teacher_dim}, momentum={self.momentum}"
        return f"{own}, counts={self.count_rule!r}"
