# SPDX-License-Identifier: Apache-2.0
"""What the losses on logits share in a call: both sides with the same classes, and the rows that count, weighed."""

from __future__ import annotations

import math
import numbers
from typing import NamedTuple, TypeAlias

import torch

from .. import checks
from ..autograd import at_least_float32
from ..logits import LinearLogits, TopKLogits
from ..logits.checks import check_tau, check_tau_tensor
from ..logits.op import Asked, check_count, rows_of_heads
from .base import check_pair, row_mask
from .means import zero_where_masked

Logits: TypeAlias = torch.Tensor | LinearLogits
TeacherLogits: TypeAlias = Logits | TopKLogits
NAMES = "student_logits", "teacher_logits"


def sides(loss, student_logits, teacher_logits, vocab=None, slices=None):
    """Logits of both sides, which are of the same rows and classes; of each the first `vocab` classes, if given, or the
    slice that is here."""
    if isinstance(teacher_logits, TopKLogits):
        return beside_topk(loss, student_logits, teacher_logits, vocab, slices)
    given = student_logits, teacher_logits
    name = type(loss).__name__
    if on_mesh(*given):
        raise TypeError(
            f"logits are a DTensor, and {name} takes tensors: give logits.full_tensor(), or, where the rows are cut, "
            "logits.to_local() to the loss with group="
        )
    if any(getattr(side, "group", None) is not None for side in given):
        raise ValueError(
            f"kd.LinearLogits has a group, and {name} takes no slices of a vocabulary: KDLoss and DKDLoss do"
        )
    check_pair(loss, *(map(tensor_of, given) if loss.takes_heads else given), "logits")
    shapes = tuple(student_logits.shape), tuple(teacher_logits.shape)
    if vocab is not None:
        checks.integer(vocab, "vocab")
        for name, shape in zip(NAMES, shapes, strict=True):
            if vocab > shape[-1]:
                raise ValueError(f"vocab is {vocab}, {name} has {shape[-1]} classes: give the classes that both have")
        shapes = tuple((*shape[:-1], vocab) for shape in shapes)
    if shapes[0] != shapes[1]:
        fix = "; vocab=n takes the first n classes of both" if shapes[0][:-1] == shapes[1][:-1] else ""
        raise ValueError(
            f"{NAMES[1]} has shape {shapes[1]}, {NAMES[0]} {shapes[0]}: "
            f"the loss needs the same rows and classes on both sides{fix}"
        )
    return cut(student_logits, vocab), cut(teacher_logits, vocab)


def on_mesh(*tensors) -> bool:
    """Whether one is a DTensor."""
    if all(type(t) in (torch.Tensor, torch.nn.Parameter, type(None)) for t in tensors):
        return False  # without an import that takes long
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(t, DTensor) for t in tensors)


def beside_topk(loss, student_logits, teacher: TopKLogits, vocab, slices):
    """`sides`, of a teacher that knows k classes, which are left as they are."""
    name = type(loss).__name__
    if not loss.takes_topk:
        raise TypeError(f"{NAMES[1]} is TopKLogits, and {name} reads every class of the teacher: KDLoss reads k")
    check_pair(loss, tensor_of(student_logits) if loss.takes_heads else student_logits, teacher.values, "logits")
    if tuple(student_logits.shape[:-1]) != teacher.rows:
        raise ValueError(f"{NAMES[1]} has rows {teacher.rows}, {NAMES[0]} {tuple(student_logits.shape[:-1])}")
    if slices is not None:  # cut already
        check_count(teacher.values, sum(slices.sizes), f"{NAMES[0]} has")
        return student_logits, teacher
    vocab = teacher.vocab if vocab is None else vocab
    if vocab is not None:
        checks.integer(vocab, "vocab")
        for whose, classes in ((NAMES[0], student_logits.shape[-1]), (NAMES[1], teacher.vocab or vocab)):
            if vocab > classes:
                raise ValueError(f"vocab is {vocab}, {whose} has {classes} classes: give the classes that both have")
    student = cut(student_logits, vocab)
    if student.numel():
        check_count(teacher.values, student.shape[-1], f"{NAMES[0]} has")
    return student, teacher


def tensor_of(logits):
    """The rows of a side: logits, or the hidden states of `kd.LinearLogits`."""
    return logits.hidden if isinstance(logits, LinearLogits) else logits


def of_heads(*pair) -> bool:
    return any(isinstance(side, LinearLogits) for side in pair)


def stored(*pair):
    """Both sides as logits, for the textbook."""
    return (side.logits() if isinstance(side, LinearLogits) else side for side in pair)


def over_heads(pair, rows, asked: Asked, *of_rows, factors=None):
    """`rows.mean` of the values of a kind, times factors [R], straight from hidden states; of_rows: what it reads of
    each row, [R, ...]."""
    reduction, weights = rows.of_op(pair[0], factors)
    return rows_of_heads(*pair, of_rows, weights, asked._replace(reduction=reduction))


def row_terms_alone(loss, off: str, fine: bool):
    """kd.LinearLogits makes the rows of a chunk, on one process: what all rows share needs the logits."""
    if not fine:
        raise ValueError(f"kd.LinearLogits gives {type(loss).__name__} its row terms: make the loss with {off}")
    if loss.group is not None:
        raise ValueError("group= compares stored rows over the ranks: with kd.LinearLogits leave it out and average")


def cut(logits, vocab):
    if vocab is None or logits.shape[-1] == vocab:
        return logits
    return logits.of(*logits.tensors, vocab=vocab) if isinstance(logits, LinearLogits) else logits[..., :vocab]


def hold_tau(loss, tau):
    """A temperature as `loss.tau`: a number, or a float tensor, which moves with the module; its shape is of a call."""
    if not isinstance(tau, torch.Tensor):
        loss.tau = check_tau(tau)
        return
    check_tau_tensor(tau)
    if tau.is_meta:
        raise ValueError("tau is on meta, which has no values: give one that has, outside torch.device('meta')")
    loss.register_buffer("tau", tau.detach(), persistent=False)


class Rows(NamedTuple):
    """Rows of logits [..., C] as a loss adds them up."""

    reduction: str
    mask: torch.Tensor | None = None  # bool [...]: those that count; None: all
    weights: torch.Tensor | None = None  # float [...], 0 where they do not; None: 1 each
    normalizer: object = None  # divides their sum, in the place of their weights'

    def plain(self) -> bool:
        return self.mask is None and self.normalizer is None

    def flat(self):
        """Of logits flattened to [R, C]."""
        mask, weights = (None if t is None else t.flatten() for t in (self.mask, self.weights))
        return self._replace(mask=mask, weights=weights)

    def among(self, mask):
        """Those of them that count in `mask` too."""
        mask = mask if self.mask is None else self.mask & mask
        weights = None if self.weights is None else torch.where(mask, self.weights, 0)
        return self._replace(mask=mask, weights=weights)

    def hidden(self, logits, backend: str):
        """Logits whose masked rows may go to a row op: only the textbook lets a row of no weight reach its gradient."""
        if backend != "reference":
            return logits
        rows = zero_where_masked(tensor_of(logits), self.mask)
        return logits.of(rows, *logits.tensors[1:]) if isinstance(logits, LinearLogits) else rows

    def mean(self, values, group=None):
        """Sum of `values` [...] times their weights over the rows that count, divided by `normalizer`, or, for the
        mean, by the sum of the weights.

        With a process group: both sums are those of all ranks, and so is `normalizer`.
        """
        if self.weights is not None:
            values = values * self.weights.to(values.dtype)
        values = values if self.mask is None else torch.where(self.mask, values, 0)
        if self.reduction == "none":
            return values
        total = values.sum()
        if group is not None:
            total = group.sum(total)
        if self.normalizer is None and self.reduction == "sum":
            return total
        if self.plain():
            return total / (values.numel() if group is None else group.total)
        return total / self._divisor(total, group)

    def of_op(self, like, factors=None):
        """`mean` of a value for each row of `like` times factors [R], as (reduction, weights [R] or None) of its op."""
        if self.plain() and factors is None:
            return self.reduction, None
        dtype = at_least_float32(like)
        weights = tensor_of(like).new_ones(like.shape[:-1], dtype=dtype)
        if self.mask is not None:
            weights = self.mask.to(dtype) if self.weights is None else self.weights.to(dtype)
        if factors is not None:
            factors = factors.to(dtype).reshape(weights.shape)
            weights = weights * factors if self.mask is None else torch.where(self.mask, weights * factors, 0)
        if self.plain():
            return self.reduction, weights.reshape(-1)
        if self.normalizer is not None or self.reduction == "mean":
            weights = weights / self._divisor(weights)
        return "none" if self.reduction == "none" else "sum", weights.reshape(-1)

    def _divisor(self, like, group=None):
        """`normalizer`, or the weight of the rows that count; the least number for 0: of nothing the mean is 0."""
        divisor = self.normalizer
        if divisor is None:
            divisor = self.mask.sum() if self.weights is None else self.weights.sum()
            divisor = divisor if group is None else group.sum(divisor)
        elif not isinstance(divisor, torch.Tensor):
            return divisor or torch.finfo(like.dtype).tiny
        elif divisor.is_meta:
            checks.same_device(divisor, like, "normalizer", NAMES[0])
        divisor = divisor.reshape(()).to(like.dtype)
        return torch.where(divisor == 0, torch.finfo(like.dtype).tiny, divisor)


def rows_of(logits, reduction: str, *, mask, labels, ignore_index, token_weights, normalizer) -> Rows:
    """Those of a call, checked."""
    check_normalizer(normalizer, reduction)
    mask = row_mask(mask, labels, ignore_index, logits, NAMES[0])
    if token_weights is None:
        return Rows(reduction, mask, None, normalizer)
    weights = check_weights(token_weights, logits)
    mask = weights != 0 if mask is None else mask & (weights != 0)
    return Rows(reduction, mask, torch.where(mask, weights, 0), normalizer)


def only_rows(token_weights, coupled: bool, what: str, off: str):
    if token_weights is not None and coupled:
        raise ValueError(
            f"token_weights weigh rows, and {what} one statistic of the batch: make the loss with {off}, or pass mask="
        )


def options_of(**given) -> str:
    """What the ranks of a group must agree on having given."""
    named = [name for name, value in given.items() if value is not None]
    return f" with {' and '.join(named)}" if named else ""


def check_normalizer(normalizer, reduction: str):
    """What replaces the number of rows as the divisor of the mean; None does not."""
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError("normalizer replaces the divisor of the mean: use it with reduction='mean'")
    if isinstance(normalizer, torch.Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer has shape {tuple(normalizer.shape)}: give one number to divide by")
    elif isinstance(normalizer, bool) or not (isinstance(normalizer, numbers.Real) and 0 <= normalizer < math.inf):
        raise ValueError(f"normalizer is {normalizer!r}: give a positive number to divide by, 0 where no row counts")


def check_weights(weights, logits):
    """A float tensor, one number >= 0 a row of logits, as a constant."""
    checks.floating(weights, "token_weights")
    checks.same_device(weights, logits, "token_weights", NAMES[0])
    if weights.shape != logits.shape[:-1]:
        shape = tuple(logits.shape[:-1])
        raise ValueError(f"token_weights has shape {tuple(weights.shape)}: one number a row of {NAMES[0]} is {shape}")
    weights = weights.detach().to(at_least_float32(logits))
    fine = (weights >= 0) & (weights < math.inf)
    if checks.may_read(fine) and not bool(fine.all()):
        raise ValueError("token_weights holds a value that is negative, infinite or NaN: 0 leaves a row out")
    return torch.where(fine, weights, torch.nan)
