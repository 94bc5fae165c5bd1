# SPDX-License-Identifier: Apache-2.0
"""DIST: Pearson correlation of the tempered softmaxes along the rows and along the columns, from sums of the batch."""

from __future__ import annotations

import math

import torch

from .. import checks
from .._types import Mask, Number, Reduction, Result
from ..autograd import at_least_float32
from ..distributed import GroupLike
from ..logits.checks import check_tau
from ..logits.op import Asked, columns_of_heads, kind
from .base import Loss, full_precision, zero_where_masked
from .means import number_of_rows
from .rows import Logits, of_heads, only_rows, options_of, over_heads, row_terms_alone, rows_of, sides

EPS = 1e-8  # beside the product of the norms, as in the reference implementation


class DISTLoss(Loss):
    """DIST: Pearson correlations of the probabilities, of each sample over classes and of each class over samples.

    tau^2 [beta (1 - mean_i pearson(s_i, t_i)) + gamma (1 - mean_c pearson(s_.c, t_.c))], s = softmax(z / tau).

    Rows s_i are samples (the paper's inter-class relation), columns s_.c are classes (intra-class). Source: Knowledge
    Distillation from A Stronger Teacher, arXiv 2205.10536; formula and defaults of its reference implementation: beta
    = gamma = tau = 1, Pearson with 1e-8 added to the product of the norms (its CIFAR-100 recipes use 2, 2 and tau = 4).
    That is not small beside the norms of very many classes: at 100,000, 64 rows and tau = 4 the column term of two
    equal sides is 0.7 tau^2 instead of 0, at 1,000 it is 1e-4.

    Args:
        beta, gamma: factors of the two terms; 0 drops the term.
        tau: temperature.
        weight: factor of the whole loss, a buffer. reduction: of the row term, "mean" over the rows that count, or
            "sum"; the column term is one statistic of the batch.
        group: "world" or a process group: the loss of the rows of all its ranks, see `kdkernels.distributed`; sums of
            columns travel, no logits. normalizer is then of all ranks too.

    Call: `(student_logits, teacher_logits, *, mask, labels, ignore_index=-100, token_weights, normalizer, vocab, chunk,
    return_parts)`, as in `KDLoss`: logits [..., C], each leading index a row, or, without group,
    `kd.LinearLogits`; masked rows enter no mean. normalizer replaces the number of rows in the row term; token_weights,
    which weigh that term, need gamma=0. The column term needs 2 rows: it is 0 in a batch of one, which warns once, and
    where a mask leaves fewer. A batch without rows gives 0 with zero gradient. A row or column of equal probabilities
    correlates 0 and has no gradient through its norm. NaN in a row that counts gives NaN. Gradient to the student only.
    parts: "rows", "columns".

    >>> student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> loss = kd.losses.DISTLoss(beta=2.0, gamma=2.0, tau=4.0)
    >>> loss(student, teacher).backward()
    >>> bool(loss(teacher, teacher) < 1e-3)
    True
    """

    beta: float
    gamma: float
    tau: float
    takes_heads = True
    shown: tuple[str, ...] = ("beta", "gamma", "tau", "reduction")

    def __init__(
        self,
        beta: float = 1.0,
        gamma: float = 1.0,
        tau: float = 1.0,
        *,
        weight: float = 1.0,
        reduction: Reduction = "mean",
        group: GroupLike = None,
    ):
        super().__init__(weight, group)
        for value, name in ((beta, "beta"), (gamma, "gamma")):
            if not (checks.is_number(value) and 0 <= value < math.inf):
                raise ValueError(f"{name} is {value!r}: give a number >= 0")
        if beta == gamma == 0:
            raise ValueError("beta and gamma are both 0: nothing is left to compute")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction is {reduction!r}: give 'mean' or 'sum'")
        self.beta, self.gamma, self.tau, self.reduction = float(beta), float(gamma), check_tau(tau), reduction

    def forward(
        self,
        student_logits: Logits,
        teacher_logits: Logits,
        *,
        mask: Mask = None,
        labels: torch.Tensor | None = None,
        ignore_index: int = -100,
        token_weights: torch.Tensor | None = None,
        normalizer: Number | None = None,
        vocab: int | None = None,
        chunk: int | None = None,
        return_parts: bool = False,
    ) -> Result:
        if of_heads(student_logits, teacher_logits):
            how = {"ignore_index": ignore_index, "token_weights": token_weights, "normalizer": normalizer}
            return self._of_heads(
                student_logits, teacher_logits, vocab, chunk, return_parts, mask=mask, labels=labels, **how
            )
        rows = None

        def prepare():
            nonlocal rows
            x, y = sides(self, student_logits, teacher_logits, vocab)
            if x.dim() < 2:
                raise ValueError(f"student_logits has shape {tuple(x.shape)}: give [..., C]")
            only_rows(token_weights, self.gamma > 0, "the column term is", "gamma=0")
            how = {"ignore_index": ignore_index, "token_weights": token_weights, "normalizer": normalizer}
            rows = rows_of(x, self.reduction, mask=mask, labels=labels, **how).flat()
            return {"logits": (x.flatten(0, -2), y.detach().flatten(0, -2), rows.mask)}

        call = options_of(token_weights=token_weights, normalizer=normalizer)
        ((x, y, counted),), (group,) = self._over_ranks(prepare, call)
        terms = [name for name, factor in (("rows", self.beta), ("columns", self.gamma)) if factor]
        if self._level_too_small(x, 1 if self.beta else 2, group):
            return self._nothing(terms, student_logits, return_parts)
        if self.gamma:  # to say so: its columns are 0 then
            self._level_too_small(x, 2, group, " for its column term")
        with full_precision(x):
            dtype = at_least_float32(x, y)
            s, t = ((zero_where_masked(side, counted).to(dtype) / self.tau).softmax(-1) for side in (x, y))
            parts = {}
            if self.beta:
                parts["rows"] = self.beta * self.tau**2 * rows.mean(rows_apart(s, t), group)
            if self.gamma:
                n = number_of_rows(s, counted, group)
                apart = 1 - cosine(*(centred(side, counted, n, group)[0] for side in (s, t)), 0, group).mean()
                parts["columns"] = self.gamma * self.tau**2 * torch.where(n > 1, apart, 0)
            return self._total(parts, return_parts)

    def _of_heads(self, student, teacher, vocab, chunk, return_parts, **marks):
        """Each term by itself, from the hidden states."""
        row_terms_alone(self, "gamma=0", True)
        only_rows(marks["token_weights"], self.gamma > 0, "the column term is", "gamma=0")
        student, teacher = sides(self, student, teacher, vocab)
        rows, number = rows_of(student, self.reduction, **marks), math.prod(student.shape[:-1])
        terms = [name for name, factor in (("rows", self.beta), ("columns", self.gamma)) if factor]
        if self._too_small(number, 1 if self.beta else 2):
            return self._nothing(terms, getattr(student, "tensors", student), return_parts)
        if self.gamma:  # to say so: its columns are 0 then
            self._too_small(number, 2, "rows for its column term")
        pair, parts = (student, teacher.detach()), {}
        if self.beta:
            asked = Asked("dist", (self.tau,), "auto", chunk=chunk)
            parts["rows"] = self.beta * over_heads(pair, rows, asked)
        if self.gamma:
            counted = None if rows.mask is None else rows.mask.reshape(-1).to(at_least_float32(student))
            apart = columns_of_heads(*pair, counted, self.tau, EPS, chunk)
            parts["columns"] = self.gamma * self.tau**2 * apart
        return self._total(parts, return_parts)


def rows_apart(s, t):
    return 1 - cosine(*(side - side.mean(1, keepdim=True) for side in (s, t)), 1)


@kind("dist")
def _rows(z, y, first, second, third, numbers, backend):
    dtype, (tau,) = at_least_float32(z, y), numbers
    return tau**2 * rows_apart(*((side.to(dtype) / tau).softmax(-1) for side in (z, y)))


def centred(x, mask, n, group=None):
    """x [n, C] minus the mean over the rows that count, of all ranks, the others 0; and that mean."""
    total = zero_where_masked(x, mask).sum(0)
    mean = (total if group is None else group.sum(total)) / n.clamp_min(1)
    return zero_where_masked(x - mean, mask), mean


def cosine(a, b, dim: int, group=None):
    """<a, b> / (|a| |b| + EPS) along dim, 0 with gradient 0 for zeros; a group's dim 0 is the rows of all ranks."""
    sums = (a * b).sum(dim), a.square().sum(dim), b.square().sum(dim)
    dot, a2, b2 = sums if group is None else group.sum(torch.stack(sums)).unbind()
    return dot / (root(a2) * root(b2) + EPS)


def root(square):
    return torch.where(square == 0, 0, torch.where(square == 0, 1, square).sqrt())
