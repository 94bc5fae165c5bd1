# SPDX-License-Identifier: Apache-2.0
"""Feature distillation by centred kernel alignment: one op a level, no n x n matrix beyond what the op needs."""

from __future__ import annotations

import torch

from ..gram.kernels import spec_of
from ..gram.op import cka
from ..gram.problem import minimum_rows
from .base import (
    Loss,
    check_rows,
    full_precision,
    levels,
    rows_of_pair,
    weight_tensor,
    weight_text,
)


class CKALoss(Loss):
    """sum over levels of w_l (1 - CKA(K_l, L_l)), K_l, L_l the kernel matrices of the student's and teacher's features.

    Source: CKA is Kornblith et al. 2019 (arXiv 1905.00414); as a loss, 1 - CKA, it has no canonical weight: 1 is ours.
    With the unbiased estimator the value can slightly exceed 1, and does not drift with the batch size.

    CKA does not change with the scale of the features, so its gradient goes as 1/|x|: at initialisation, where features
    are small, a large weight can drown the cross-entropy and training may collapse. `kd.losses.Ramp` mends it.

    Args:
        kernel: a name, a kernel object such as `kd.RBF()`, or a pair (student's, teacher's).
        unbiased, center: the estimator, see `kd.cka`. It needs 4 rows; 2 if biased; 1 if also uncentred.
        rows: what a row is, for more than two dimensions. [B, T, d]: "tokens", "mean" or "groups" (one CKA a sample,
            averaged), needed. [B, C, H, W]: "flatten" (default), "gap" or "positions". May also be given in the call.
        weights: one weight a level, a buffer; default 1 each. weight: factor of the loss, a buffer.
        backend: as in `kd.cka`.

    Call: `(student_features, teacher_features, *, mask, rows, return_parts)`; a tensor or a list of levels. Widths and
    float dtypes may differ between the sides; computed in at least float32. mask: bool [B], [B, T] or [B, H, W]: False
    rows do not count. A batch with fewer rows than the estimator needs gives 0 with zero gradient and warns once; so
    does, without a warning, a mask that leaves too few. Where a side is constant CKA is undefined: it counts as 0, so
    the loss is 1 there, with zero gradient. A NaN in a row that counts gives NaN. Gradient to the student only.

    >>> student, teacher = torch.randn(32, 16, requires_grad=True), torch.randn(32, 64)
    >>> loss = kd.losses.CKALoss(kernel="rbf")
    >>> loss(student, teacher).backward()
    >>> bool(loss(teacher, teacher).abs() < 1e-6)
    True
    """

    def __init__(
        self,
        kernel="linear",
        *,
        unbiased: bool = True,
        center: bool = True,
        rows: str | None = None,
        weights=None,
        weight: float = 1.0,
        backend: str = "auto",
    ):
        super().__init__(weight)
        check_estimator(kernel, unbiased, center, False)
        self.kernel, self.unbiased, self.center = kernel, unbiased, center
        self.rows, self.backend = check_rows(rows), backend
        self.register_buffer("weights", None if weights is None else level_weights(weights, "weights"))

    def forward(
        self, student_features, teacher_features, *, mask=None, rows: str | None = None, return_parts: bool = False
    ):
        pairs = levels(student_features, teacher_features)
        single = isinstance(student_features, torch.Tensor)
        names = ["cka"] if single else [f"cka_{i}" for i in range(len(pairs))]
        if self.weights is not None and len(self.weights) != len(pairs):
            raise ValueError(f"student_features has {len(pairs)} levels, weights has {len(self.weights)}")
        least = minimum_rows(self.unbiased, self.center)
        ready = []
        for i, (student, teacher) in enumerate(pairs):
            ready.append(rows_of_pair(student, teacher, self._rows(rows), mask, "features", None if single else i))
        if any(self._too_small(x.shape[-2], least) for x, _, _ in ready):
            return self._nothing(names, student_features, return_parts)
        parts = {}
        for i, (name, (x, y, kept)) in enumerate(zip(names, ready, strict=True)):
            with full_precision(x):
                aligned = cka(x, y, mask=kept, **self._estimator())
                parts[name] = mean_of_groups(1 - aligned, kept, least)
                if self.weights is not None:
                    parts[name] = parts[name] * self.weights[i].to(parts[name].dtype)
        return self._total(parts, return_parts)

    def _rows(self, rows):
        return self.rows if rows is None else check_rows(rows)

    def _estimator(self):
        return {"kernel": self.kernel, "unbiased": self.unbiased, "center": self.center, "backend": self.backend}

    def _shown(self):
        shown = {"kernel": self.kernel, "unbiased": self.unbiased, "center": self.center}
        if self.rows is not None:
            shown["rows"] = self.rows
        if self.weights is not None:
            shown["weights"] = weight_text(self.weights)
        return shown


def check_estimator(kernel, unbiased: bool, center: bool, row_normalize: bool):
    """Refuses at construction what the op would refuse at the first batch."""
    spec_of(kernel)
    if unbiased and not center:
        raise ValueError("center=False with unbiased=True: the unbiased estimator is centred, pass unbiased=False")
    if unbiased and row_normalize:
        raise ValueError("unbiased=True with row_normalize=True: pass row_normalize=False, or unbiased=False")


def level_weights(weights, name: str):
    value = weight_tensor(weights, name)
    if value.dim() != 1:
        raise ValueError(f"{name} is {weights!r}: give a list, one weight a level")
    return value


def mean_of_groups(values, mask, least: int):
    """Mean over the groups in which the mask leaves enough rows, 0 if none does; values [] or [G]."""
    if mask is None:
        return values.mean()
    enough = mask.sum(-1) >= least
    return torch.where(enough, values, 0).sum() / enough.sum().clamp_min(1)
