# SPDX-License-Identifier: Apache-2.0
"""PCKA: CKA between the patches of feature maps, channel by channel; all channels of a level are one batched op."""

from __future__ import annotations

from typing import Any

import torch

from .._types import Backend, Weights
from ..autograd import device_type
from ..backend import resolve
from ..distributed import GroupLike
from ..gram.call import minimum_rows
from ..gram.kernels import KernelLike, spec_of
from ..gram.patches import PATCH, patch_cka, patch_rows
from .base import FeatureLoss, check_pair, constant, zero_of
from .cka import check_estimator, cka_of
from .maps import mask_of_positions, same_channels
from .weights import term_weight

PRESETS = {
    "detection": {"weight": 10.0},
    "two_stage_detection": {"weight": 10.0, "transposed": 1.0},
}


class PCKALoss(FeatureLoss):
    """Patch CKA (PCKA), for feature pyramids of detectors: CKA of the patches of each channel, minus it as a loss.

    - sum over levels of mean_c [ CKA(X_c, Y_c) + w_T CKA(X_c', Y_c') ], X_c the patches of channel c as rows.

    Source: Rethinking CKA in KD, arXiv 2401.11824, its loss for feature pyramids. As in its public code a map [H, W] is
    resized (bilinear, align_corners=False) to the next multiples of 16 and cut into patches of 16 x 16: X_c is
    [patches, B 256], a row the same patch in every sample. CKA is linear, uncentred and biased, without row norms; the
    loss is -CKA. 15 is the default of the public class. Its detection configurations give 10 to each of the levels P2
    to P5 (`PCKALoss.preset("detection")`), and for two-stage detectors 10 to the transposed term as well
    (`preset("two_stage_detection")`); the weight of both terms is one number there, and here.

    CKA does not change with the scale of the features, so its gradient goes as 1/|x|: see `RCKALoss`, and
    `kd.losses.Ramp` for what mends it.

    Args:
        weight: factor of the loss, a buffer. weights: one factor a level, a buffer; default 1 each.
        transposed: w_T, a buffer; 0, the default, drops the term for good. Its rows are the 256 B positions.
        row_normalize: divide the rows of the Gram matrices by sqrt(K_ii), an option of the public class.
        center, unbiased, kernel: the textbook variants, see `kd.cka` and, for bandwidths, `CKALoss`. They need more
            patches: 2 centred, 4 unbiased.
        group: "world" or a process group: the loss of the samples of all its ranks, see `kdkernels.distributed`. A row
            is the same patch in every sample, so the maps of all ranks are gathered: B is then the global batch.
        backend: as in `kd.cka`.

    Call: `(student_features, teacher_features, *, mask, return_parts)`; a tensor [B, C, H, W], or a list or dict of
    levels with one mask for all or one a level. Batch and channels must agree; height and width may differ as long as
    both round up to one multiple of 16. Float16 to float64, each side its own dtype, resized and computed in at least
    float32. mask: bool [B], samples that count: a masked one takes no part; or bool [B, H, W], positions: a masked one
    is 0 on both sides before the resize, which leaves it out of every product (linear and uncentred only, both sides of
    one size). A level with one patch, or fewer than the estimator needs, and an empty batch, add 0 with zero gradient
    and warn once: the CKA of one patch is 1 whatever the maps hold (the public code raises there). A channel that is
    zero on a side counts as CKA 0 (NaN in the public code). All masked gives 0. A NaN that counts gives NaN. Gradient
    to the student only; the resize adds it up with atomics on CUDA. The public form keeps the maps and one n x n matrix
    a channel, side and term for backward, n patches; the variants keep the patches of both sides, backend="reference"
    what autograd keeps (and it alone has second derivatives).

    >>> student, teacher = torch.randn(2, 8, 40, 30, requires_grad=True), torch.randn(2, 8, 40, 30)
    >>> loss = kd.losses.PCKALoss()
    >>> loss(student, teacher).backward()
    >>> round(loss(teacher, teacher).item(), 3)
    -15.0
    """

    row_normalize: bool
    center: bool
    unbiased: bool
    least_patches: int
    shown: tuple[str, ...] = ("transposed", "row_normalize", "center", "unbiased", "kernel")

    def __init__(
        self,
        *,
        weight: float = 15.0,
        weights: Weights = None,
        transposed: float = 0.0,
        row_normalize: bool = False,
        center: bool = False,
        unbiased: bool = False,
        kernel: KernelLike = "linear",
        group: GroupLike = None,
        backend: Backend = "auto",
    ):
        super().__init__(weights=weights, weight=weight, group=group)
        check_estimator(kernel, unbiased, center, row_normalize)
        self.row_normalize, self.center, self.unbiased, self.kernel = row_normalize, center, unbiased, kernel
        self.backend = backend
        self.least_patches = max(2, minimum_rows(unbiased, center))  # one patch has CKA 1 with any other
        self.register_buffer("transposed", term_weight(transposed, "transposed"))

    @classmethod
    def preset(cls, name: str, **changes: Any) -> PCKALoss:
        """The loss of the public detection configurations; `changes` go to the constructor."""
        if name not in PRESETS:
            raise ValueError(f"preset is {name!r}: give one of {tuple(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    def _compared(self, student, teacher, rows, mask, key):
        names = check_pair(self, student, teacher, "features", key)
        for side, name in zip((student, teacher), names, strict=True):
            if side.dim() != 4 or rows is not None:
                how = "" if rows is None else f" with rows={rows!r}"
                raise ValueError(f"{name} has shape {tuple(side.shape)}{how}: give feature maps [B, C, H, W], no rows")
        same_channels(student, teacher, names)
        if to_patches(student) != to_patches(teacher):
            raise ValueError(
                f"{names[1]} has maps of {tuple(teacher.shape[2:])}, {names[0]} of {tuple(student.shape[2:])}: both "
                f"must round up to the same multiples of {PATCH}; resize one of them"
            )
        kept = mask_of_positions(mask, student, student.shape[2:], names[0], student.shape == teacher.shape)
        if kept is not None and mask.dim() == 3:
            if self.center or any(spec.name != "linear" for spec in spec_of(self.kernel)):
                raise ValueError(
                    f"mask has shape {tuple(mask.shape)}: positions can be left out of the linear, uncentred CKA only; "
                    "mask samples with [B]"
                )
            kept = mask
        return student, constant(teacher), kept

    def _terms(self, student, teacher, kept, group=None):
        """-CKA of each term, averaged over the channels."""
        size = to_patches(student)
        patches = size[0] * size[1] // PATCH**2
        names = ["patches"] if self.transposed is None else ["patches", "transposed"]
        enough = not self._too_small(len(student) if group is None else group.total, 1)
        if not enough or self._too_small(patches, self.least_patches, "patches of 16 x 16"):
            return {name: zero_of(student) for name in names}
        if group is not None:
            student, teacher, kept = group.gather(student, teacher, kept)
        parts = dict(zip(names, self._aligned(student, teacher, size, kept), strict=True))
        parts = {name: -value.mean() for name, value in parts.items()}
        if self.transposed is not None:
            parts["transposed"] = parts["transposed"] * self.transposed.to(parts["transposed"].dtype)
        if kept is not None:  # kernels of distances see two sides of zeros as alike
            parts = {name: torch.where(kept.any(), value, 0) for name, value in parts.items()}
        return parts

    def _aligned(self, student, teacher, size, kept):
        """CKA of each channel [C] between patches, and between positions where that term is wanted."""
        chosen = resolve("cka", self.backend, device_type(student), (student.dtype, teacher.dtype))
        textbook = self.center or self.unbiased or self.row_normalize or chosen == "reference"
        if not textbook and all(spec.name == "linear" for spec in spec_of(self.kernel)):
            return patch_cka(student, teacher, size, kept, self.transposed is not None).unbind()
        x, y = (patch_rows(side, size, kept) for side in (student, teacher))
        between_patches = cka_of(self, x, y, None, row_normalize=self.row_normalize)
        if self.transposed is None:
            return (between_patches,)
        # a row is a position of a sample; masked positions of single patches are zeros
        rows = None if kept is None or kept.dim() == 3 else kept.repeat_interleave(PATCH**2, dim=0)[:, 0]
        rows = None if rows is None else rows.expand(len(x), -1)
        return between_patches, cka_of(self, x.mT, y.mT, rows, row_normalize=self.row_normalize)


def to_patches(maps) -> tuple[int, ...]:
    """The size that maps [B, C, H, W] are resized to."""
    return tuple(-(-n // PATCH) * PATCH for n in maps.shape[2:])
