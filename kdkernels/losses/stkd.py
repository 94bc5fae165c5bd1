# SPDX-License-Identifier: Apache-2.0
"""STKD: hard two-label cross-entropy and soft divergence on mixed samples, both from one pass over the logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import checks
from .._types import Backend, Mask, Number, Reduction, Result
from ..logits import MixupBatch
from ..logits.checks import check_fraction, check_labels, check_lam, check_mix, check_tau
from ..logits.op import Asked, kind, mixed_distillation
from .base import Loss, constant
from .mesh import over_mesh
from .rows import NAMES, Logits, cut, of_heads, on_mesh, over_heads, rows_of, sides, stored


class STKDLoss(Loss):
    """Similarity transfer (STKD): mixed labels and the teacher's soft labels, on samples from `kd.mixup`.

    (1 - alpha) CE(y~, p_s(x~)) + alpha tau^2 KL(q || p_s^tau(x~)), mean over the rows of a mixed batch x~.

    x~ = lam x + (1 - lam) x[perm], y~ = lam e_labels + (1 - lam) e_labels[perm]; q = k1 p_t^tau(x~) + k2 [lam
    p_t^tau(x) + (1 - lam) p_t^tau(x)[perm]] + k3 y~. Source: Similarity Transfer for KD, arXiv 2103.10047. From the
    paper: virtual samples by mixup, mixed labels, knowledge as similarity over the categories. Its code is not public,
    so every constant is ours: alpha = 0.9, tau = 4, mix = (1, 0, 0), and Beta(1, 1) in `kd.mixup`. This is the one
    loss that holds its cross-entropy: add none beside it.

    Args:
        tau: temperature of the soft term. alpha: its share, in [0, 1].
        mix: (k1, k2, k3) >= 0 with sum 1; k2 > 0 needs `teacher_clean`, the teacher's logits before mixing.
        weight: factor of the whole loss, a buffer. reduction: "mean" over the rows that count, or "sum".
        backend: as in `kd.mixed_distillation`.

    Call: `(student_logits, teacher_logits, mixup_batch, teacher_clean=None, *, mask, ignore_index=-100, token_weights,
    normalizer, vocab, chunk, return_parts)`. Logits [B, C] of the mixed samples, float16 to float64, each side its own
    dtype, computed in at least float32, or, with k2 = 0, `kd.LinearLogits` (chunk as in `KDLoss`); mixup_batch from
    `kd.mixup` (labels, permuted_labels, lam and permutation are used). mask: bool [B], False rows do not count, nor do
    rows one of whose labels is ignore_index. token_weights [B] weigh both terms of their rows, and normalizer and vocab
    are as in `KDLoss`, and so are DTensors with k2 = 0 and a vocabulary that is not cut. An empty batch, or all
    masked, gives 0 with zero gradient. NaN in a row that counts gives NaN. Gradient to the student only. parts: "hard"
    and "soft", two more passes.

    >>> student, teacher = torch.nn.Linear(5, 10), torch.nn.Linear(5, 10)
    >>> batch = kd.mixup(torch.randn(8, 5), torch.randint(10, (8,)))
    >>> loss = kd.losses.STKDLoss(alpha=0.9, tau=4.0)
    >>> loss(student(batch.x), teacher(batch.x), batch).backward()
    """

    tau: float
    alpha: float
    mix: tuple[float, float, float]
    takes_heads = True
    shown: tuple[str, ...] = ("tau", "alpha", "mix", "reduction")

    def __init__(
        self,
        *,
        tau: float = 4.0,
        alpha: float = 0.9,
        mix: Sequence[float] = (1.0, 0.0, 0.0),
        weight: float = 1.0,
        reduction: Reduction = "mean",
        backend: Backend = "auto",
    ):
        super().__init__(weight)
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction is {reduction!r}: give 'mean' or 'sum'")
        self.tau, self.alpha, self.mix = check_tau(tau), check_fraction(alpha, "alpha"), check_mix(mix)
        self.reduction, self.backend = reduction, backend

    def forward(
        self,
        student_logits: Logits,
        teacher_logits: Logits,
        mixup_batch: MixupBatch,
        teacher_clean: Logits | None = None,
        *,
        mask: Mask = None,
        ignore_index: int = -100,
        token_weights: torch.Tensor | None = None,
        normalizer: Number | None = None,
        vocab: int | None = None,
        chunk: int | None = None,
        return_parts: bool = False,
    ) -> Result:
        if on_mesh(student_logits, teacher_logits):
            marks = {"mask": mask, "labels": None, "ignore_index": ignore_index, "token_weights": token_weights}
            call = {"vocab": vocab, "chunk": chunk, "return_parts": return_parts}
            marks["normalizer"] = normalizer
            return self._over_mesh((student_logits, teacher_logits), mixup_batch, marks, call)
        student, teacher = sides(self, student_logits, teacher_logits, vocab)
        if not isinstance(mixup_batch, MixupBatch):
            raise TypeError(f"mixup_batch is a {type(mixup_batch).__name__}: give what kd.mixup returns")
        if len(student.shape) != 2:
            raise ValueError(f"student_logits has shape {tuple(student.shape)}: give [B, C]")
        if self.mix[1] and teacher_clean is None:
            raise ValueError(f"teacher_clean is missing: mix is {self.mix}, and its second weight needs it")
        if self._too_small(student.shape[0], 1):
            named = [name for name, _ in self._shares()]
            return self._nothing(named, getattr(student_logits, "tensors", student_logits), return_parts)
        first, second, labelled = self._labels(mixup_batch, student, ignore_index)
        how = {"labels": None, "ignore_index": ignore_index, "token_weights": token_weights, "normalizer": normalizer}
        rows = rows_of(student, self.reduction, mask=mask, **how).among(labelled)
        clean = {}
        if self.mix[1]:
            clean = {"teacher_clean": cut(constant(teacher_clean), vocab), "permutation": mixup_batch.permutation}
        heads, teacher = of_heads(student, teacher) and self.backend != "reference", teacher.detach()
        if heads and clean:
            raise ValueError(f"mix is {self.mix}: its second weight reads clean rows, which kd.LinearLogits has not")
        if not heads:
            student, teacher = stored(*(rows.hidden(side, self.backend) for side in (student, teacher)))
            teacher = constant(teacher)

        def value(alpha):
            if heads:
                asked = Asked("mixed", (self.tau, alpha, *self.mix), self.backend, chunk=chunk)
                lam = lam_of_rows(mixup_batch.lam, student)
                return over_heads((student, teacher), rows, asked, first, second, lam)
            values = mixed_distillation(
                student, teacher, first, second, mixup_batch.lam, tau=self.tau, alpha=alpha, mix=self.mix,
                reduction="none", backend=self.backend, **clean,
            )  # fmt: skip
            return rows.mean(values)

        checks.flags(return_parts=return_parts)
        total = value(self.alpha)
        total = total * self.weight.to(total.dtype)
        if not return_parts:
            return total
        parts = {name: value(float(name == "soft")) * share for name, share in self._shares()}
        return total, {name: part * self.weight.to(part.dtype) for name, part in parts.items()}

    def _over_mesh(self, pair, batch, marks, call):
        if self.mix[1]:
            raise ValueError(f"mix is {self.mix}, logits are a DTensor: its second weight reads rows of other ranks")
        mask, labelled = marks["mask"], self._labels(batch, pair[0], marks["ignore_index"])[2]
        if mask is not None:
            labelled = labelled & (mask.full_tensor() if on_mesh(mask) else mask)

        def local(of_rows):
            labels = {name: of_rows(getattr(batch, name)) for name in ("labels", "permuted_labels", "lam")}
            return (batch._replace(**labels),)

        return over_mesh(self, pair, {**marks, "mask": labelled}, call, more=local, vocabulary=False)

    def _shares(self):
        """Names of the terms that are computed, with their weights."""
        return [(name, share) for name, share in (("hard", 1 - self.alpha), ("soft", self.alpha)) if share]

    def _labels(self, batch, student, ignore_index):
        """Both labels, 0 where ignored, and the rows where neither is."""
        pair, used = [], []
        for labels, name in ((batch.labels, "labels"), (batch.permuted_labels, "permuted_labels")):
            check_labels(labels, student.shape[0], None, student, f"mixup_batch.{name}", NAMES[0])
            used.append(labels != ignore_index)
            pair.append(torch.where(used[-1], labels, 0))
        return *pair, used[0] & used[1]


def lam_of_rows(lam, student):
    lam = check_lam(lam, student.shape[0], student, NAMES[0])
    if not isinstance(lam, torch.Tensor):
        lam = torch.full((), lam, dtype=student.dtype, device=student.device)
    return lam.expand(student.shape[0])


@kind("mixed")
def _mixed(z, y, labels, permuted, lam, numbers, backend):
    tau, alpha, *mix = numbers
    how = {"tau": tau, "alpha": alpha, "mix": tuple(mix), "reduction": "none", "backend": backend}
    return mixed_distillation(z, y, labels, permuted, lam, **how)
