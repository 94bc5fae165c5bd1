# SPDX-License-Identifier: Apache-2.0
"""Full kernel matrix transfer through Nystrom features: the theory of the KDA paper as a loss of its own."""

from __future__ import annotations

import torch

from .. import checks
from .._types import Backend, Mask, Result, RowsOf, Selection
from ..distributed import GroupLike
from ..gram.kernels import KernelLike, spec_of
from ..nystrom.checks import check_jitter
from ..nystrom.kda import ClassCenters
from ..nystrom.op import nystrom_transfer, paired_landmarks
from .base import Loss, check_rows, full_precision, row_mask, rows_of_pair, zero_where_masked
from .means import with_spread

RULES = ("greedy", "rpcholesky", "uniform", "kmeans++")


class NystromTransferLoss(Loss):
    """Full kernel matrix transfer through Nyström landmarks: the distance of whole kernel matrices, in O(n m).

    |K~_S - K~_T|_F^2 / |K~_T|_F^2, K~ = C W^+ C' the Nystrom kernel matrix of each side over the batch.

    Source: the full kernel matrix transfer that Qian et al. (arXiv 2009.14416) derive and then bound by KDA
    (`kd.losses.KDALoss`); they train with the bound, so every constant here, the weight 1 too, is ours. See
    `kd.nystrom_transfer`.

    Args:
        num_landmarks: m, at most; a batch with fewer rows takes all of them: K~ is then K itself up to jitter.
        kernel: a name, a kernel object, or a pair (student's, teacher's); a rule of the student's bandwidth has the
            gradient of the spread of its rows, as in `kd.losses.CKALoss`.
        method: how landmarks are chosen among the teacher's rows, see `kd.select_landmarks`; the same samples serve
            both sides. "greedy" (the default) is deterministic.
        centers: a `kd.ClassCenters`: its class means are the landmarks instead, as in the paper. In training mode the
            loss adds the batch to it (labels are then needed); `end_epoch()` swaps. 0 before the first swap.
        normalize: divide by |K~_T|_F^2; False leaves the sum over n^2 pairs.
        rows: what a row is, for more than two dimensions: "tokens", "mean", "flatten", "gap" or "positions".
        weight: factor of the loss, a buffer.
        group: None, or "world" or a process group: the batch is that of all its ranks, see below.
        jitter, backend: as in `kd.nystrom_transfer`.

    Call: `(student_features, teacher_features, labels=None, *, mask, rows, ignore_index=-100, return_parts)`. Widths
    and float dtypes may differ between the sides; computed in at least float32. Rows that are masked or whose label is
    ignore_index do not count. Where a mask leaves fewer than m rows, one is repeated: the value then differs by about
    jitter. An empty batch gives 0 with zero gradient and warns once; an all-zero teacher and an all-masked batch give
    0. NaN in a row that counts gives NaN. Gradient to the student only, through its landmarks too.

    With `group=` value and landmarks are those of the rows of all ranks, the same on each, and the gradient averaged
    over the ranks is that of one process. What travels is in `kd.nystrom_transfer`; landmarks from the batch add the
    teacher's rows of all ranks, m rows of the student's (again backward) and m numbers, `centers` nothing a step:
    `end_epoch()`, called by all ranks, joins their class means. The spread adds d + 1 numbers. A drawn
    `method` draws as rank 0 does.

    >>> student, teacher = torch.randn(32, 16, requires_grad=True), torch.randn(32, 64)
    >>> loss = kd.losses.NystromTransferLoss(num_landmarks=16)
    >>> loss(student, teacher).backward()
    >>> loss(teacher, teacher).item()
    0.0
    """

    num_landmarks: int
    centers: ClassCenters | None
    normalize: bool
    jitter: float

    def __init__(
        self,
        num_landmarks: int = 64,
        *,
        kernel: KernelLike = "rbf",
        method: Selection = "greedy",
        centers: ClassCenters | None = None,
        normalize: bool = True,
        rows: RowsOf | None = None,
        weight: float = 1.0,
        jitter: float = 1e-6,
        group: GroupLike = None,
        backend: Backend = "auto",
    ):
        super().__init__(weight, group)
        spec_of(kernel)
        checks.integer(num_landmarks, "num_landmarks")
        check_jitter(jitter)
        checks.flags(normalize=normalize)
        if method not in RULES:
            raise ValueError(f"method is {method!r}: give one of {RULES}")
        if rows == "groups":
            raise ValueError(
                "rows is 'groups': the transfer compares one kernel matrix a batch, give 'tokens' or 'mean'"
            )
        if centers is not None and not isinstance(centers, ClassCenters):
            raise TypeError(f"centers is a {type(centers).__name__}: give a kd.ClassCenters, or None")
        self.num_landmarks, self.kernel, self.method, self.centers = num_landmarks, kernel, method, centers
        self.normalize, self.rows, self.jitter, self.backend = normalize, check_rows(rows), jitter, backend

    def forward(
        self,
        student_features: torch.Tensor,
        teacher_features: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        mask: Mask = None,
        rows: RowsOf | None = None,
        ignore_index: int = -100,
        return_parts: bool = False,
    ) -> Result:
        rows, batch = self.rows if rows is None else rows, None

        def prepare():
            nonlocal batch
            features, batch = self._prepared(student_features, teacher_features, labels, mask, rows, ignore_index)
            return {"features": features}

        ((s, t, kept),), (group,) = self._over_ranks(prepare, f" with rows={rows!r}")
        if batch is not None:
            with full_precision(s):
                self.centers._add(*batch)
        total = len(s) if group is None else group.total
        if self._too_small(total, 1):
            return self._nothing(["transfer"], student_features, return_parts)
        with full_precision(s):
            s, landmarks = self._landmarks(s, t, kept, min(self.num_landmarks, total), group)
            value = nystrom_transfer(
                s, t, *landmarks, kernel=self.kernel, normalize=self.normalize, mask=kept, jitter=self.jitter,
                group=group, backend=self.backend,
            )  # fmt: skip
            if self.centers is not None:
                value = torch.where(self.centers.known.any(), value, 0)
        return self._total({"transfer": value}, return_parts)

    def _prepared(self, student_features, teacher_features, labels, mask, rows, ignore_index):
        """Rows of both sides, 0 where masked, and their mask; the batch that the class means are to learn of."""
        if check_rows(rows) == "groups":
            raise ValueError(
                "rows is 'groups': the transfer compares one kernel matrix a batch, give 'tokens' or 'mean'"
            )
        s, t, kept = rows_of_pair(self, student_features, teacher_features, rows, mask, "features")
        kept = row_mask(kept, labels, ignore_index, s, "the rows of student_features")
        s, t = zero_where_masked(s, kept), zero_where_masked(t, kept)
        batch = None
        if self.centers is not None and self.training:
            if labels is None:
                raise ValueError("labels is None: with centers, training collects class means and needs the labels")
            batch = self.centers._batch(s, t, labels, kept, ignore_index)
        return (s, t, kept), batch

    def _landmarks(self, s, t, kept, m: int, group):
        """The student's rows, and the landmarks of both sides."""
        if self.centers is not None:
            s, z = with_spread(self.kernel, kept, group, s, self.centers.student_centers)
            return s, (z, self.centers.teacher_centers)
        (s,) = with_spread(self.kernel, kept, group, s)
        how = {"method": self.method, "kernel": spec_of(self.kernel)[1], "mask": kept, "group": group}
        return s, paired_landmarks(s, t, m, **how)

    def end_epoch(self, group: GroupLike = None) -> None:
        """With `centers`: the epoch's class means, over `group` or else the loss' own, become the landmarks."""
        if self.centers is not None:
            self.centers.swap(self.group if group is None else group)

    def _shown(self):
        shown = {"kernel": self.kernel}
        if self.centers is None:
            shown |= {"num_landmarks": self.num_landmarks, "method": repr(self.method)}
        return shown
