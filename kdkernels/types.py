# SPDX-License-Identifier: Apache-2.0
"""The names of what ops and losses take, for annotations: `from kdkernels.types import KernelLike`."""

from ._types import (
    Backend,
    Device,
    Features,
    FilePath,
    LayerNames,
    Mask,
    MaskOf,
    Masks,
    Number,
    Parts,
    Reduction,
    ReductionOrNone,
    Regularization,
    Result,
    RowsOf,
    Selection,
    StrengthLike,
    Weights,
    Whitening,
)
from .distributed import GroupLike
from .gram.kernels import KernelLike, KernelName, Sigma
from .losses.rows import Logits, TeacherLogits

__all__ = [
    "Backend",
    "Device",
    "Features",
    "FilePath",
    "GroupLike",
    "KernelLike",
    "KernelName",
    "LayerNames",
    "Logits",
    "Mask",
    "MaskOf",
    "Masks",
    "Number",
    "Parts",
    "Reduction",
    "ReductionOrNone",
    "Regularization",
    "Result",
    "RowsOf",
    "Selection",
    "Sigma",
    "StrengthLike",
    "TeacherLogits",
    "Weights",
    "Whitening",
]
