# SPDX-License-Identifier: Apache-2.0
"""A teacher of which the k likeliest classes were kept: what a loss on logits makes of it. MATH.md, section 10."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch

from .. import checks
from .._types import Device
from ..autograd import at_least_float32, in_pytorch
from . import buckets
from .checks import check_tau

KINDS, TAILS = ("logprobs", "logits"), ("bucket", "renormalize", "ignore")
MOST = 1 + 1e-3  # of the probabilities of a row: rounded to float16 they add up to a little more than 1


class TopKLogits:
    """A teacher by its k likeliest classes, in the place of its logits [..., C]: `loss(student, TopKLogits(...))`.

    Args:
        values: of those classes, float [..., k], each leading index a row; float16 to float64, a constant.
        indices: the classes, int [..., k], none twice in a row.
        kind: "logprobs": values are log-probabilities, normalised over the whole vocabulary; "logits": any logits.
        tail: what is made of the other classes. "bucket": they are one class together, of which the teacher has what
            is left of 1 (sparse teachers keep it: without it the student may put anything there); a divergence of k + 1
            outcomes, never more than that of all. "renormalize": both sides are conditioned on the k, the rest of the
            student is not looked at. "ignore": the k terms of KL(p_t || p_s) and nothing else, which may be negative
            and is least where the student has too much of them; "forward" alone.
        vocab: how many classes there are, the first so many of the student's; None: as many as the student has.
        tau: temperature of log-probabilities (how they were normalised). With "bucket" and "ignore" it must be the
            loss's, for the other classes at another one are not known; "renormalize" takes any.

    Accepted by `kd.losses.KDLoss` as the teacher, also of a `kd.LinearLogits` student. `teacher[rows]` and
    `teacher.to(device)` are other such teachers, and `kd.teachers` stores them. A logit or a value of -inf is a class
    with probability 0. Probabilities that add up to more than 1 by their rounding are divided by their sum.

    Raises:
        TypeError, ValueError: shapes, dtypes and names that do not fit, more than vocab classes, kind="logits" with a
            tail they do not tell. When a loss looks at the rows that count (CUDA tensors are not looked at: such a row
            is NaN): indices outside the vocabulary, or twice in a row; probabilities that add up to more than 1.001.

    >>> teacher, student = torch.randn(4, 1000), torch.randn(4, 1000, requires_grad=True)
    >>> kept = kd.TopKLogits(*teacher.log_softmax(-1).topk(64))
    >>> kd.losses.KDLoss(tau=1.0)(student, kept).backward()
    >>> kept
    TopKLogits(64 logprobs of (4,) rows, tail='bucket', tau=1)
    """

    values: torch.Tensor
    indices: torch.Tensor
    vocab: int | None
    tau: float

    def __init__(
        self,
        values: torch.Tensor,
        indices: torch.Tensor,
        *,
        kind: Literal["logprobs", "logits"] = "logprobs",
        tail: Literal["bucket", "renormalize", "ignore"] = "bucket",
        vocab: int | None = None,
        tau: float = 1.0,
    ):
        for name, value, known in (("kind", kind, KINDS), ("tail", tail, TAILS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}: give one of {known}")
        if kind == "logits" and tail != "renormalize":
            raise ValueError(
                f"tail is {tail!r}: logits of k classes do not say what the others have, give tail='renormalize', or "
                "log-probabilities"
            )
        _check_tensors(values, indices)
        if vocab is not None:
            checks.integer(vocab, "vocab")
            check_count(values, vocab, "vocab is")
        self.values, self.indices = values.detach(), indices.detach()
        self.kind, self.tail, self.vocab, self.tau = kind, tail, vocab, check_tau(tau)

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(self.values.shape[:-1])

    def __getitem__(self, rows: Any) -> TopKLogits:
        """Those rows, as by the same index into logits [..., C] along the leading dimensions."""
        return self.of(self.values[rows], self.indices[rows])

    def to(self, device: Device) -> TopKLogits:
        """The same on another device."""
        return self.of(self.values.to(device), self.indices.to(device))

    def of(self, values: torch.Tensor, indices: torch.Tensor) -> TopKLogits:
        """The same of other tensors."""
        return TopKLogits(values, indices, kind=self.kind, tail=self.tail, vocab=self.vocab, tau=self.tau)

    def __repr__(self) -> str:
        k, kind, tail = self.values.shape[-1], self.kind, self.tail
        return f"TopKLogits({k} {kind} of {self.rows} rows, tail={tail!r}, tau={self.tau:g})"


def _check_tensors(values, indices):
    checks.floating(values, "values")
    checks.is_tensor(indices, "indices")
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices is {indices.dtype}: give classes, int32 or int64")
    checks.same_device(values, indices, "values", "indices")
    if values.dim() == 0 or values.shape != indices.shape or values.shape[-1] == 0:
        raise ValueError(
            f"values has shape {tuple(values.shape)}, indices {tuple(indices.shape)}: give both as [..., k], k >= 1"
        )


def check_count(values, classes: int, whose: str):
    if values.shape[-1] > classes:
        raise ValueError(f"{whose} {classes}, values has {values.shape[-1]} classes a row: give at most all")


def checked(teacher: TopKLogits, classes: int, mask, dtype):
    """Values in dtype and int64 classes of the rows; one that does not count reads the first k, and one that nobody may
    look at and that is wrong is NaN."""
    values, index = teacher.values.to(dtype), teacher.indices.long()
    if mask is not None:
        index = torch.where(mask[..., None], index, torch.arange(index.shape[-1], device=index.device))
    outside = ((index < 0) | (index >= classes)).any(-1)
    in_order = index.sort(-1)[0]
    twice = (in_order[..., 1:] == in_order[..., :-1]).any(-1)
    much = torch.zeros_like(twice) if teacher.kind == "logits" else values.logsumexp(-1) > math.log(MOST)
    if mask is not None:
        much = much & mask
    wrong = outside | twice | much
    if checks.may_read(index) and checks.may_read(values) and bool(wrong.any()):
        if bool(outside.any()):
            raise ValueError(f"indices of the teacher hold a value outside 0 to {classes - 1}, the student's classes")
        if bool(twice.any()):
            raise ValueError("indices of the teacher hold a class twice in a row: give each of the k classes once")
        most = values[much].exp().sum(-1).max()
        raise ValueError(
            f"values of the teacher are no log-probabilities: those of a row add up to {most:.4g}, not to 1 at most; "
            "of logits give kind='logits' and tail='renormalize'"
        )
    return torch.where(wrong[..., None], torch.nan, values), index.clamp(0, classes - 1)


def outcomes(student, teacher: TopKLogits, classes: int, mask, temperatures):
    """The teacher as logits of few outcomes [..., n], and the classes of all but the last, or of all: [..., k].

    The k classes with tail="renormalize", for the loss's temperature, (tau, taus); else the k and the rest, for 1.
    """
    tau, taus = temperatures
    values, index = checked(teacher, classes, mask, at_least_float32(student, teacher.values))
    if teacher.tail == "renormalize":
        return values * teacher.tau if teacher.kind == "logprobs" else values, index
    if taus is not None or tau != teacher.tau:
        raise ValueError(
            f"tau is {'a tensor' if taus is not None else f'{tau:g}'}, the teacher's log-probabilities are of "
            f"{teacher.tau:g}: only there it is known what the other classes have (tail='renormalize' takes any)"
        )
    if index.shape[-1] == classes:
        return values, index
    rest = values.logsumexp(-1, keepdim=True)
    # never 1 - sum, whose digits are gone
    return torch.cat([values, torch.where(rest < 0, (-rest.expm1()).log(), -math.inf)], -1), index


def outcomes_of(student, index, tail: str, tau: float, backend: str):
    """Logits [..., C] as those of `outcomes`."""
    if tail == "renormalize":
        return student.gather(-1, index)
    if backend == "reference":
        found = in_pytorch(buckets.textbook, (student, index), tau)
    else:
        found = buckets.buckets(student, index, tau, backend)
    return found if index.shape[-1] < student.shape[-1] else found[..., :-1]


def ignoring(student, teacher, k: int):
    """sum over the k of q (log q - log p) of outcomes [..., n], the first k of which are the teacher's classes."""
    log_p, log_q = student[..., :k] - student.logsumexp(-1, keepdim=True), teacher[..., :k]
    return (log_q.exp() * torch.where(log_q == -math.inf, 0, log_q - log_p)).sum(-1)
