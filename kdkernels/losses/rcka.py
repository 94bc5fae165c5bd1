# SPDX-License-Identifier: Apache-2.0
"""RCKA: CKA of logits between samples and between classes, and of features by stage; C x C is never formed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import checks
from .._types import Backend, Features, Mask, Result, RowsOf
from ..autograd import at_least_float32, device_type
from ..backend import resolve
from ..distributed import GroupLike
from ..gram import both_ways
from ..gram.both_ways import cka_both_ways
from ..gram.call import minimum_rows
from ..gram.kernels import KernelLike, spec_of
from ..logits import LinearLogits
from .base import (
    Loss,
    check_rows,
    full_precision,
    has_samples,
    mean_of_groups,
    nothing_of,
    rows_of_pair,
    zero_where_masked,
)
from .cka import check_estimator, cka_of
from .levels import at, by_key, levels
from .maps import unit
from .moments import alignment, factors, pays
from .product import product
from .rows import Logits, of_heads, stored
from .weights import term_weight

PRESETS = {
    "lcka": {"row_weight": 15.0, "class_weight": 15.0, "feature_weight": 0.0},
    "dkcka": {"row_weight": 15.0, "class_weight": 0.0, "feature_weight": 1.0, "first_stage": 1},
}
TERMS = {"rows": "row_weight", "classes": "class_weight", "features": "feature_weight"}


class RCKALoss(Loss):
    """Relation CKA (RCKA): minus the CKA of logits between samples, between classes, and of the features of stages.

    - w_row CKA(z_t, z_s) - w_class CKA(z_t', z_s') - sum over stages of w_F CKA(G_t, G_s), logits z [B, C].

    Source: Rethinking CKA in KD, arXiv 2401.11824. As in its public code CKA is linear, uncentred and biased, on raw
    logits, with the Gram rows divided by sqrt(G_ii) (rows only) in the two logit terms, and the loss is -CKA: its least
    value is minus the sum of the weights. FCKA: F the flattened features as they are, G = F F' with each of its rows
    divided by its L2 norm (not the rows of F: a sample counts by its length); G is the feature matrix of the same CKA
    without the row division, ||G_t'G_s||^2 / (||G_t'G_t|| ||G_s'G_s||).
    15, 15 and 1 are the public code's, which runs either 15 + 15 without FCKA (`RCKALoss.preset("lcka")`) or 15 on rows
    + 1 FCKA over the stages after the first (`preset("dkcka")`); all three together, the default, is ours.

    CKA does not change with the scale of the logits, so its gradient goes as 1/|z|: at initialisation 15 + 15 can be 20
    times the gradient of cross-entropy, and a small network may collapse. Wrap it in `kd.losses.Ramp`, rising over the
    first third of training; gradient clipping and learning-rate warm-up did not help.

    Args:
        row_weight, class_weight: buffers; 0 drops the term for good.
        feature_weight: None: 1 a stage if the call has features. A number, or one a stage: the call must have features.
            0: it must have none. A buffer.
        first_stage: the first stage of a list of features that is compared (FCKA).
        row_normalize, center, unbiased, kernel: the estimator, see `kd.cka` and, for bandwidths, `CKALoss`;
            unbiased=True needs center=True and row_normalize=False. In the class term a class is a row, so centring is
            over the classes.
        rows: for logits [B, T, C] (tokens) or [B, C, H, W] (positions), as in `CKALoss`; feature_rows: the same for
            features, [B, C, H, W] being flattened by default.
        weight: factor of the whole loss, a buffer. backend: as in `kd.cka`.
        group: "world" or a process group: the loss of the rows of all its ranks, see `kdkernels.distributed`; logits
            and features are gathered.

    Call: `(student_logits, teacher_logits, student_features=None, teacher_features=None, *, mask, rows, feature_rows,
    return_parts)`; features are one tensor, or a list or dict of stages. mask: bool [B] (or a token, a position): False
    rows take no part in any term. A batch with fewer rows than the estimator needs (1; centred 2; unbiased 4) gives 0
    with zero gradient and warns once; so does, without a warning, a mask that leaves too few. A zero row gives a finite
    value; where a side is zero (or, centred, constant) CKA is undefined and counts as 0. A NaN in a row that counts
    gives NaN. FCKA holds n x n matrices. So do the logit terms (C x C where C < n) on the backends torch and cpp, six
    for backward, unless both sizes are above 512 and within a factor of two. Any float dtypes; computed in at least
    float32. Gradient to the student only.

    Logits may be `kd.LinearLogits`, hidden states [n, H] or tokens. Of both sides, with a linear kernel, without
    unbiased=True, softcap and group=, and with more rows than the heads are wide, moments of hidden states and heads
    take the place of logits, which are never made; elsewhere they are.

    >>> student, teacher = torch.randn(32, 10, requires_grad=True), torch.randn(32, 10)
    >>> loss = kd.losses.RCKALoss()
    >>> loss(student, teacher).backward()
    >>> round(loss(teacher, teacher).item(), 3)
    -30.0
    """

    row_normalize: bool
    center: bool
    unbiased: bool
    first_stage: int
    needs_features: bool
    shown: tuple[str, ...] = (*TERMS.values(), "first_stage", "row_normalize", "center", "unbiased", "kernel")

    def __init__(
        self,
        *,
        row_weight: float = 15.0,
        class_weight: float = 15.0,
        feature_weight: float | Sequence[float] | None = None,
        first_stage: int = 0,
        row_normalize: bool = True,
        center: bool = False,
        unbiased: bool = False,
        kernel: KernelLike = "linear",
        rows: RowsOf | None = None,
        feature_rows: RowsOf | None = None,
        weight: float = 1.0,
        group: GroupLike = None,
        backend: Backend = "auto",
    ):
        super().__init__(weight, group)
        check_estimator(kernel, unbiased, center, row_normalize)
        self.row_normalize, self.center, self.unbiased, self.kernel = row_normalize, center, unbiased, kernel
        self.rows, self.feature_rows = check_rows(rows), check_rows(feature_rows, "feature_rows")
        checks.integer(first_stage, "first_stage", 0)
        self.first_stage, self.backend = first_stage, backend
        self.register_buffer("row_weight", term_weight(row_weight, "row_weight"))
        self.register_buffer("class_weight", term_weight(class_weight, "class_weight"))
        given = 1.0 if feature_weight is None else feature_weight
        self.register_buffer("feature_weight", term_weight(given, "feature_weight", per_stage=True))
        only_features = self.row_weight is None and self.class_weight is None
        self.needs_features = only_features or feature_weight is not None
        if only_features and self.feature_weight is None:
            raise ValueError("row_weight, class_weight and feature_weight are all 0: nothing is left to compute")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> RCKALoss:
        """The two losses of the public code, "lcka" or "dkcka"; `changes` go to the constructor."""
        if name not in PRESETS:
            raise ValueError(f"preset is {name!r}: give one of {tuple(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    def forward(
        self,
        student_logits: Logits,
        teacher_logits: Logits,
        student_features: Features | None = None,
        teacher_features: Features | None = None,
        *,
        mask: Mask = None,
        rows: RowsOf | None = None,
        feature_rows: RowsOf | None = None,
        return_parts: bool = False,
    ) -> Result:
        rows = self.rows if rows is None else rows
        feature_rows = self.feature_rows if feature_rows is None else feature_rows

        heads = None

        def prepare():
            nonlocal heads
            pair, heads = self._without_logits(student_logits, teacher_logits, check_rows(rows))
            x, y, kept = rows_of_pair(self, *pair, rows, mask, "logits")
            if self.class_weight is not None:
                self._check_classes(*(side.shape[-1] for side in heads or (x, y)))
            ready = {"logits": (x, y, kept)}
            for key, s, t in self._stages(student_features, teacher_features):
                compared = rows_of_pair(self, s, t, check_rows(feature_rows, "feature_rows"), mask, "features", key)
                ready[at("features", key)] = compared
            return ready

        ready, groups = self._over_ranks(prepare, f" with rows={rows!r}, feature_rows={feature_rows!r}")
        names = [name for name in ("rows", "classes") if getattr(self, TERMS[name]) is not None]
        names += ["features"] if len(ready) > 1 else []
        least = minimum_rows(self.unbiased, self.center)
        if any(self._level_too_small(level[0], least, group) for level, group in zip(ready, groups, strict=True)):
            stages = [] if student_features is None else by_key(student_features, "student_features").values()
            return self._nothing(names, [*getattr(student_logits, "tensors", [student_logits]), *stages], return_parts)
        with full_precision(ready[0][0]):
            levels_of_all = [self._gathered(*level, group) for level, group in zip(ready, groups, strict=True)]
            parts = self._logits(*levels_of_all[0], names, least, heads)
            parts = {name: value * -getattr(self, TERMS[name]).to(value.dtype) for name, value in parts.items()}
            if "features" in names:
                parts["features"] = self._features(levels_of_all[1:], least)
            return self._total(parts, return_parts)

    def _gathered(self, x, y, kept, group):
        """Rows are those of all ranks from here on; samples [G, n, d] stay where they are, with the group."""
        if group is None or x.dim() == 3:
            return x, y, kept, group
        return *group.gather(x, y, kept), None

    def _without_logits(self, student, teacher, rows):
        """What makes rows, and both heads where their moments are less than the logits."""
        if not of_heads(student, teacher):
            return (student, teacher), None
        if any(getattr(side, "group", None) is not None for side in (student, teacher)):
            raise ValueError(
                "group of kd.LinearLogits: RCKALoss takes no slices of a vocabulary: KDLoss and DKDLoss do"
            )
        linear = all(spec.name == "linear" for spec in spec_of(self.kernel)) and not self.unbiased
        heads = student, teacher
        fits = all(isinstance(side, LinearLogits) for side in heads) and (rows == "tokens" or student.hidden.dim() == 2)
        if self.group is None and linear and self.row_normalize != self.center and fits and pays(*heads):
            return (student.hidden, teacher.hidden), (student, teacher.detach())
        return stored(student, teacher), None

    def _logits(self, x, y, kept, group, names, least, heads):
        """CKA between samples and between classes, those of `names`."""
        if not has_samples(x, group, least):
            aligned = {name: nothing_of(x, y) for name in names if name != "features"}
            return {name: mean_of_groups(value, None, 0, group) for name, value in aligned.items()}
        aligned = self._aligned(x, y, kept, names) if heads is None else self._by_moments(heads, (x, y), kept, names)
        return {name: mean_of_groups(value, kept, least, group) for name, value in aligned.items()}

    def _aligned(self, x, y, kept, names):
        """CKA between samples and between classes, those of `names`; [] or a value a group."""
        if self._published:
            chosen = resolve("cka", self.backend, device_type(x), (x.dtype, y.dtype))
            columns = "classes" in names
            if both_ways.worth_it(chosen, x, columns):
                x, y = (zero_where_masked(side, kept) for side in (x, y))
                values = cka_both_ways(x, y, columns, chosen == "cpp")
                return {name: value for name, value in zip(TERMS, values.unbind(), strict=False) if name in names}
        aligned = {}
        if "rows" in names:
            aligned["rows"] = cka_of(self, x, y, kept, row_normalize=self.row_normalize)
        if "classes" in names:
            # a masked sample is a zero feature of each class: it enters no product, norm, distance or mean over classes
            x, y = zero_where_masked(x, kept), zero_where_masked(y, kept)
            aligned["classes"] = cka_of(self, x.mT, y.mT, None, row_normalize=self.row_normalize)
        return aligned

    def _by_moments(self, heads, rows, kept, names):
        sides = [factors(head, side, kept) for head, side in zip(heads, rows, strict=True)]
        aligned = {}
        if "rows" in names:
            aligned["rows"] = alignment(*sides, self.center, kept)
        if "classes" in names:
            aligned["classes"] = alignment(*(side[::-1] for side in sides), self.center)
        return aligned

    @property
    def _published(self) -> bool:
        linear = all(spec.name == "linear" for spec in spec_of(self.kernel))
        return linear and self.row_normalize and not (self.center or self.unbiased)

    def _features(self, stages, least):
        total = 0
        for i, (s, t, kept, group) in enumerate(stages):
            if has_samples(s, group, least):
                aligned = cka_of(self, relations(s, kept), relations(t, kept), kept)
            else:
                aligned, kept = nothing_of(s, t), None
            weight = self.feature_weight if self.feature_weight.dim() == 0 else self.feature_weight[i]
            total = total - mean_of_groups(aligned, kept, least, group) * weight.to(aligned.dtype)
        return total

    def _stages(self, student, teacher):
        """(key, student's, teacher's) of each stage to compare."""
        if (student is None) != (teacher is None):
            raise ValueError("student_features and teacher_features: give both or neither")
        if student is None:
            if self.needs_features and self.feature_weight is not None:
                raise ValueError(
                    "student_features is not given, and feature_weight is: pass features, or feature_weight=0"
                )
            return []
        if self.feature_weight is None:
            raise ValueError("student_features is given and feature_weight is 0: pass a feature_weight, or no features")
        pairs = levels(student, teacher)[self.first_stage :]
        if not pairs:
            raise ValueError(f"student_features has no stage from first_stage={self.first_stage} on: pass all stages")
        if self.feature_weight.dim() == 1 and len(self.feature_weight) != len(pairs):
            raise ValueError(f"feature_weight has {len(self.feature_weight)} numbers for {len(pairs)} stages")
        return pairs

    def _check_classes(self, student: int, teacher: int):
        if student != teacher:
            raise ValueError(
                f"teacher_logits has {teacher} classes, student_logits {student}: the class term compares the "
                "same classes; class_weight=0 drops it"
            )
        least = minimum_rows(self.unbiased, self.center)
        if student < least:
            raise ValueError(
                f"student_logits has {student} classes: the class term with unbiased={self.unbiased}, "
                f"center={self.center} needs {least}; class_weight=0 drops it"
            )


def relations(features, mask):
    """G = F F', each row of G over its L2 norm; F the rows of `features`, a zero or masked one stays zero in G."""
    F = zero_where_masked(features, mask)
    F = F.to(at_least_float32(F))
    # one factor for all of F leaves G, and its gradient, as they are, and keeps the squares from overflow
    largest = F.detach().abs().amax((-2, -1), keepdim=True)
    F = F / torch.where(largest == 0, 1, largest)
    return unit(product(F, F.mT), -1)
