# SPDX-License-Identifier: Apache-2.0
"""Named types of arguments that need nothing of the package; `types.py` has all of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import torch

Backend: TypeAlias = Literal["auto", "cuda", "triton", "cpp", "torch", "reference"]
Device: TypeAlias = torch.device | str | int
FilePath: TypeAlias = str | os.PathLike[str]
Number: TypeAlias = float | torch.Tensor
"""A Python number, or a tensor of one value or of one a row."""

Reduction: TypeAlias = Literal["mean", "sum"]
ReductionOrNone: TypeAlias = Literal["mean", "sum", "none"]
Mask: TypeAlias = torch.Tensor | None
"""bool, True for what counts."""

Whitening: TypeAlias = Literal["cholesky", "sqrt"]
Selection: TypeAlias = Literal["rpcholesky", "uniform", "kmeans++", "greedy"]
Regularization: TypeAlias = Literal["l2", "kl"]
StrengthLike: TypeAlias = Number | Literal["auto"] | tuple[Literal["auto"], Number]

Features: TypeAlias = torch.Tensor | Sequence[torch.Tensor] | Mapping[Any, torch.Tensor]
"""One level, or several by index or by key."""
Masks: TypeAlias = torch.Tensor | Sequence[Mask] | Mapping[Any, Mask] | None
RowsOf: TypeAlias = Literal["flatten", "tokens", "mean", "groups", "gap", "positions"]
"""How features of more than two dimensions become rows."""
Weights: TypeAlias = Sequence[float] | torch.Tensor | None
"""One weight a level."""
Parts: TypeAlias = dict[str, torch.Tensor]
Result: TypeAlias = torch.Tensor | tuple[torch.Tensor, Parts]
"""With return_parts=True the pair."""

LayerNames: TypeAlias = str | Sequence[str] | None
"""Of `kd.compare_models`: names and patterns; None is every module without children."""
MaskOf: TypeAlias = torch.Tensor | str | Callable[[Any], Mask] | Literal[False] | None
"""Of `kd.compare_models`: a mask for every batch, a key of the batch, a function of it, or False for no mask."""


class Plan(Protocol):
    """A call of which its shapes have settled all but the tensors: nothing in it depends on autocast."""

    how: tuple  # the last arguments of the operator, `need` included

    def forward(self, *tensors: torch.Tensor | None) -> tuple:
        """(value, *kept)"""
        ...

    def backward(self, grad: torch.Tensor, *read_and_kept: torch.Tensor | None) -> Sequence:
        """A gradient for each of `wanted`."""
        ...
