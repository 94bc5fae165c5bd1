# SPDX-License-Identifier: Apache-2.0
"""Weights of losses as buffers: checked once, shown in a repr, and changed without a recompile."""

from __future__ import annotations

import math

import torch


def weight_tensor(weight, name: str) -> torch.Tensor:
    """A weight, or a list of weights, as the buffer that holds it."""
    try:
        given = torch.as_tensor(weight)
        if given.dtype == torch.bool or given.is_complex():
            raise TypeError
        value = torch.as_tensor(weight, dtype=torch.float32).detach().clone()
    except (TypeError, ValueError, RuntimeError, OverflowError):  # which of them depends on what is no number
        raise TypeError(f"{name} is {weight!r}: give a number") from None
    if value.is_meta:
        raise ValueError(f"{name} is on meta, which has no values: give a number, outside torch.device('meta')")
    if value.dim() > 1 or value.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: give a number, or one number a level")
    if not all(0 <= w < math.inf for w in value.flatten().tolist()):
        raise ValueError(f"{name} is {weight!r}: a weight must be finite, and not negative")
    return value


def level_weights(weights, name: str) -> torch.Tensor:
    value = weight_tensor(weights, name)
    if value.dim() != 1:
        raise ValueError(f"{name} is {weights!r}: give a list, one weight a level")
    return value


def term_weight(weight, name: str, per_stage: bool = False) -> torch.Tensor | None:
    """The buffer of a term's weight, None where it is 0: the term is then never computed."""
    value = weight_tensor(weight, name)
    if value.dim() and not per_stage:
        raise ValueError(f"{name} is {weight!r}: give one number")
    return value if bool(value.any()) else None


def weight_text(weight: torch.Tensor) -> str:
    numbers = [f"{w:g}" for w in weight.flatten().tolist()]
    return numbers[0] if weight.dim() == 0 else f"[{', '.join(numbers)}]"
