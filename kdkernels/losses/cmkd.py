# SPDX-License-Identifier: Apache-2.0
"""CMKD: Pearson and Spearman correlation of logits, mixed by the teacher's entropy; one z-score a side serves both."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch

from .. import checks
from .._types import Backend, Mask, Number, Reduction, Regularization, Result
from ..autograd import at_least_float32
from ..distributed import GroupLike
from ..logits.op import Asked, kind
from ..rank.checks import widened
from ..rank.op import spearman
from ..rank.scores import score
from .base import Loss, full_precision, zero_where_masked
from .dist import centred
from .means import number_of_rows
from .rows import Logits, of_heads, only_rows, options_of, over_heads, row_terms_alone, rows_of, sides, stored
from .weights import term_weight

REGULARIZATIONS = ("l2", "kl")
TERMS = {"pearson": "pearson_weight", "spearman": "spearman_weight", "classes": "class_weight"}


class CMKDLoss(Loss):
    """Correlation matching (CMKD): Pearson and Spearman correlations of each sample's logits, weighed by difficulty.

    mean_i [ w_P(i) (1 - pearson(z_s, z_t)) + w_S(i) (1 - spearman(z_s, z_t)) ], z the logits z-scored by row.

    Source: KD from a Stronger Teacher by Correlation Matching, arXiv 2410.06561. From the paper: the two correlations,
    the z-score, weights that change with the difficulty of the sample, differentiable ranks. Its code is not public, so
    every constant here is ours: the weights w_S(i) = H(softmax(y_i / weight_tau)) / log C, y the teacher's logits as
    they come, and w_P = 1 - w_S, with weight_tau = 4 (at temperature 1 a trained teacher is so sure that w_S is about
    0.03: Spearman would vanish); the factors 1 and 1; the strength. The class term, Pearson over the batch, is that of
    DIST (arXiv 2205.10536) on z in place of its softmax; off by default.

    Args:
        weight_tau: temperature of the entropy.
        spearman_share: "entropy": the w_S above; a number in [0, 1]: the same w_S for each row; or a function of the
            teacher's logits [..., C] in float ([n, C] with `group`) that gives w_S [...].
        pearson_weight, spearman_weight: factors of the two terms beside w_P and w_S; buffers, 0 drops the term for
            good.
        class_weight: factor of mean_c (1 - pearson over the rows of z_s[:, c], z_t[:, c]); a buffer, 0 drops it.
        regularization, strength: of the soft ranks, see `kd.spearman`. "auto" or ("auto", c) is
            c sqrt(12) / C standard deviations of the row; a number counts in standard deviations too. At 1.0 the ranks
            of 10 classes or more are one block, and Spearman is Pearson: see kdkernels/rank/STRENGTH.md.
        hard_target: hard ranks, ties averaged, on the teacher's side.
        weight: factor of the whole loss, a buffer. reduction: "mean" over the rows that count, or "sum".
        group: "world" or a process group: the loss of the rows of all its ranks, see `kdkernels.distributed`; sums
            travel, no logits. normalizer is then of all ranks too.
        backend: as in `kd.spearman`.

    Call: `(student_logits, teacher_logits, *, mask, labels, ignore_index=-100, token_weights, normalizer, vocab, chunk,
    return_parts)`, as in `KDLoss`, but that the class term takes no token_weights: logits [..., C], each leading index
    a row, C >= 2, or, without class term, function as spearman_share and group, `kd.LinearLogits`; float16 to float64,
    each side its own dtype, computed in at least float32; masked rows take no part. normalizer replaces the number of
    rows, of the row terms alone: the class term is one statistic of the batch, 0 where fewer than two rows count. A
    logit of -inf, or finfo.min of its dtype, on either side takes the class out of that row (in the class term it
    stands at the row's mean). A constant row correlates 0: it adds w_P + w_S, with zero gradient. NaN or +inf in a row
    that counts gives NaN. A batch without rows gives 0 with zero gradient and warns once; so does one row for the class
    term alone, which is 0; all masked gives 0. Gradient to the student only, through its z-score too: it does not
    change the logits' mean or scale.

    >>> student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> loss = kd.losses.CMKDLoss()
    >>> loss(student, teacher).backward()
    >>> bool(loss(3 * teacher + 1, teacher).abs() < 1e-5)
    True
    """

    strength: float | Literal["auto"] | tuple[Literal["auto"], float]
    weight_tau: float
    hard_target: bool
    takes_heads = True
    shown: tuple[str, ...] = (
        "weight_tau",
        "spearman_share",
        *TERMS.values(),
        "regularization",
        "strength",
        "hard_target",
        "reduction",
    )

    def __init__(
        self,
        *,
        weight_tau: float = 4.0,
        spearman_share: float | Literal["entropy"] | Callable[[torch.Tensor], torch.Tensor] = "entropy",
        pearson_weight: float = 1.0,
        spearman_weight: float = 1.0,
        class_weight: float = 0.0,
        regularization: Regularization = "l2",
        strength: float | Literal["auto"] | tuple[Literal["auto"], float] = "auto",
        hard_target: bool = False,
        weight: float = 1.0,
        reduction: Reduction = "mean",
        group: GroupLike = None,
        backend: Backend = "auto",
    ):
        super().__init__(weight, group)
        if not (checks.is_number(weight_tau) and 0 < weight_tau < math.inf):
            raise ValueError(f"weight_tau is {weight_tau!r}: a temperature is a positive number")
        if regularization not in REGULARIZATIONS:
            raise ValueError(f"regularization is {regularization!r}: give one of {REGULARIZATIONS}")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction is {reduction!r}: give 'mean' or 'sum'")
        self.weight_tau, self.spearman_share, self.reduction = float(weight_tau), check_share(spearman_share), reduction
        self.regularization, self.strength = regularization, check_strength(strength)
        checks.flags(hard_target=hard_target)
        self.hard_target, self.backend = hard_target, backend
        for name, given in zip(TERMS.values(), (pearson_weight, spearman_weight, class_weight), strict=True):
            self.register_buffer(name, term_weight(given, name))
        if all(getattr(self, name) is None for name in TERMS.values()):
            raise ValueError("pearson_weight, spearman_weight and class_weight are all 0: nothing is left to compute")

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
            if x.dim() < 2 or x.shape[-1] < 2:
                raise ValueError(f"student_logits has shape {tuple(x.shape)}: give [..., C] with C >= 2 classes")
            only_rows(token_weights, self.class_weight is not None, "the class term is", "class_weight=0")
            how = {"ignore_index": ignore_index, "token_weights": token_weights, "normalizer": normalizer}
            rows = rows_of(x, self.reduction, mask=mask, labels=labels, **how)
            if self.group is not None:
                x, y, rows = x.flatten(0, -2), y.flatten(0, -2), rows.flat()
            return {"logits": (x, y.detach(), rows.mask)}

        call = options_of(token_weights=token_weights, normalizer=normalizer)
        ((student, teacher, counted),), (group,) = self._over_ranks(prepare, call)
        terms = [name for name in TERMS if getattr(self, TERMS[name]) is not None]
        n = math.prod(student.shape[:-1]) if group is None else group.total
        if self._too_small(n, 2 if terms == ["classes"] else 1):
            return self._nothing(terms, student_logits, return_parts)
        if "classes" in terms:  # to say so: they are 0 then
            self._too_small(n, 2, "rows for its class term")
        with full_precision(student):
            dtype = at_least_float32(student, teacher)
            pair = (zero_where_masked(side, counted) for side in (student, teacher))
            z_x, z_y, values = self._row_terms(*pair, terms)
            parts = {name: rows.mean(value, group) for name, value in values.items()}
            if "classes" in terms:
                z_y = z_y.masked_fill(z_y == -math.inf, 0)
                parts["classes"] = classes_apart(z_x.flatten(0, -2), z_y.flatten(0, -2), counted, group)
            weighted = {name: value * getattr(self, TERMS[name]).to(dtype) for name, value in parts.items()}
            return self._total(weighted, return_parts)

    def _of_heads(self, student, teacher, vocab, chunk, return_parts, **marks):
        """The row terms alone; one pass over the heads, parts that are asked for take one each."""
        row_terms_alone(self, "class_weight=0", self.class_weight is None)
        if callable(self.spearman_share):
            raise ValueError(
                "spearman_share is a function of logits, which kd.LinearLogits never stores: give a number"
            )
        student, teacher = sides(self, student, teacher, vocab)
        rows, R = rows_of(student, self.reduction, **marks), math.prod(student.shape[:-1])
        terms = [name for name in ("pearson", "spearman") if getattr(self, TERMS[name]) is not None]
        if self._too_small(R, 1):
            return self._nothing(terms, getattr(student, "tensors", student), return_parts)
        pair = student, teacher.detach()
        if self.backend == "reference":
            x, y = stored(*(rows.hidden(side, self.backend) for side in pair))
            how = {"mask": rows.mask, "token_weights": rows.weights, "normalizer": rows.normalizer}
            return self(x, y, **how, return_parts=return_parts)
        parts = {}
        for some in [[name] for name in terms] if return_parts else [terms]:
            weights = [
                getattr(self, TERMS[name]).expand(R) if name in some else None for name in ("pearson", "spearman")
            ]
            asked = Asked(f"correlations {self.regularization}", self._numbers(), self.backend, chunk=chunk)
            parts[some[0]] = over_heads(pair, rows, asked, *weights)
        return self._total(parts, return_parts)

    def _numbers(self) -> tuple:
        share = -1.0 if self.spearman_share == "entropy" else self.spearman_share
        relative = isinstance(self.strength, tuple)
        strength = 0.0 if self.strength == "auto" else self.strength[1] if relative else self.strength
        return self.weight_tau, share, strength, relative, self.hard_target

    def _row_terms(self, student, teacher, terms):
        """Both sides' scores, and the terms of each row."""
        dtype = at_least_float32(student, teacher)
        x, y = (widened(side, dtype) for side in (student, teacher))
        by_entropy, values = self.spearman_share == "entropy", {}
        z_x, z_y, share, pearson = score(x, y, self.weight_tau if by_entropy else 0.0, self.backend)
        if not by_entropy:
            share = self._share(y)
        if "pearson" in terms:
            values["pearson"] = (1 - share) * (1 - pearson)
        if "spearman" in terms:
            # the -inf of z_y takes the pair out of both sides
            values["spearman"] = share * (1 - self._spearman(z_x, z_y))
        return z_x, z_y, values

    def _spearman(self, x, y):
        how = {"regularization": self.regularization, "regularization_strength": self.strength}
        return spearman(x, y, **how, hard_target=self.hard_target, backend=self.backend)

    def _share(self, teacher):
        """w_S [...], what Spearman gets of each row, where the caller gave it."""
        if isinstance(self.spearman_share, float):
            return torch.full_like(teacher[..., 0], self.spearman_share)
        share = self.spearman_share(teacher)
        if not isinstance(share, torch.Tensor) or share.shape != teacher.shape[:-1]:
            what = tuple(share.shape) if isinstance(share, torch.Tensor) else type(share).__name__
            raise ValueError(f"spearman_share gave {what}: it must give one number a row, {teacher.shape[:-1]}")
        return share.to(teacher.dtype)


def _kind(regularization: str):
    @kind(f"correlations {regularization}")
    def rows(z, y, pearson_weight, spearman_weight, _, numbers, backend):
        weight_tau, share, strength, relative, hard = numbers
        strength = ("auto", strength) if relative else strength or "auto"
        how = {"weight_tau": weight_tau, "spearman_share": "entropy" if share < 0 else share, "backend": backend}
        loss = CMKDLoss(regularization=regularization, strength=strength, hard_target=bool(hard), **how)
        weights = {"pearson": pearson_weight, "spearman": spearman_weight}
        weights = {name: weight for name, weight in weights.items() if weight is not None}
        _, _, terms = loss._row_terms(z, y, list(weights))
        return sum(terms[name] * weight.to(terms[name].dtype) for name, weight in weights.items())


for _regularization in REGULARIZATIONS:
    _kind(_regularization)


def check_share(share):
    if share == "entropy" or callable(share):
        return share
    if checks.is_number(share) and 0 <= share <= 1:
        return float(share)
    raise ValueError(f"spearman_share is {share!r}: give 'entropy', a number in [0, 1], or a function of the logits")


def check_strength(strength) -> float | Literal["auto"] | tuple[Literal["auto"], float]:
    number = strength[1] if isinstance(strength, (tuple, list)) and len(strength) == 2 else strength
    relative = number is not strength and strength[0] == "auto"
    positive = checks.is_number(number) and 0 < number < math.inf
    if strength == "auto" or (positive and (relative or number is strength)):
        return ("auto", float(number)) if relative else strength
    raise ValueError(f"strength is {strength!r}: give 'auto', ('auto', c) or a number, c and the number positive")


def classes_apart(x, y, mask, group=None):
    """mean_c (1 - pearson over the rows that count of x[:, c], y[:, c]), x, y [n, C]; 0 with fewer than two rows."""
    mask = None if mask is None else mask.flatten()
    n = number_of_rows(x, mask, group)
    x, y = varying(x, mask, n, group), varying(y, mask, n, group)
    sums = x.square().sum(0), y.square().sum(0), (x * y).sum(0)
    own_x, own_y, dot = sums if group is None else group.sum(torch.stack(sums)).unbind()
    square = own_x * own_y
    constant = square <= 0
    pearson = dot / torch.where(constant, 1, square).sqrt()
    return torch.where(n > 1, (1 - torch.where(constant, 0, pearson)).mean(), 0)


def varying(x, mask, n, group=None):
    """The columns of x [n, C] centred over the rows that count; a constant one is 0."""
    x, mean = centred(x, mask, n, group)
    square = x.detach().square().sum(0)
    square = square if group is None else group.sum(square)
    return torch.where(square <= n * (4 * torch.finfo(x.dtype).eps * mean).square(), 0, x)
