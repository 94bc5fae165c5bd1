# SPDX-License-Identifier: Apache-2.0
"""The regularisation strength of a row: a number, a tensor, or "auto", relative to the spread and length of the row.

Relative strength c: eps = c std(valid) sqrt(12) / n_valid, the strength c of n points spread evenly over the same
standard deviation one apart; population standard deviation, float64, without gradient.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..checks import is_number, may_read

SMALLEST = torch.finfo(torch.float64).tiny  # of a spread: 1 / eps stays finite


class Strength(NamedTuple):
    """eps of row r = number * (tensor[r] or tensor[0], if there is one) * (the row's spread, if relative)."""

    tensor: torch.Tensor | None  # float64 [1], or one value a row, in the order of the rows
    number: float
    relative: bool


def parse(value, x, name: str = "regularization_strength") -> Strength:
    """What a caller may give: a number >= 0, a tensor (0-d or one value a row), "auto", or ("auto", c), for x [..., n].

    A tensor within the pair is allowed too. The tensor keeps its graph.
    """
    relative = False
    if isinstance(value, str) or (isinstance(value, (tuple, list)) and value and isinstance(value[0], str)):
        rule, *factor = (value,) if isinstance(value, str) else value
        if rule != "auto" or len(factor) > 1:
            raise ValueError(f'{name} is {value!r}: give a number, a tensor, "auto" or ("auto", c)')
        value, relative = factor[0] if factor else 1.0, True
    if isinstance(value, torch.Tensor):
        return Strength(_checked(value, x, name), 1.0, relative)
    if not is_number(value):
        raise TypeError(f'{name} is a {type(value).__name__}: give a number, a tensor, "auto" or ("auto", c)')
    if not (0 <= value < math.inf) or (relative and value == 0):
        least = "c > 0" if relative else "a finite number >= 0 (0 gives hard ranks, with zero gradient)"
        raise ValueError(f"{name} is {value!r}: it needs {least}")
    return Strength(None, float(value), relative)


def _checked(value, x, name):
    if not value.is_floating_point():
        raise TypeError(f"{name} is a tensor of {value.dtype}: it needs a floating-point tensor")
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}, x on {x.device}: move both to one device")
    rows = x.shape[:-1]
    if value.numel() != 1 and value.shape != rows and value.shape != (*rows, 1):
        raise ValueError(f"{name} has shape {tuple(value.shape)}: give a 0-d tensor, or one value a row, {tuple(rows)}")
    if may_read(value) and not bool(((value > 0) & value.isfinite()).all()):
        raise ValueError(f"{name} holds a value that is not positive and finite: a tensor strength must be > 0")
    return value.double().reshape(-1)


def spread(x, valid) -> torch.Tensor:
    """sqrt(12) std / n_valid of each row of x [..., n] over its valid elements, float64 [...]; 1 for a constant row.

    The row is centred at its maximum and divided by its range first: a constant row is then exactly 0 in any dtype,
    and no square leaves float64.
    """
    x, count = x.detach().double(), valid.sum(-1)
    if x.shape[-1] == 0:
        return x.new_ones(x.shape[:-1])
    top = x.masked_fill(~valid, -math.inf).amax(-1, keepdim=True)
    d = (x - top).masked_fill(~valid, 0.0)
    reach = -d.amin(-1)
    d = d / reach.masked_fill(reach == 0, 1.0)[..., None]
    some = count.clamp(min=1)
    d = (d - (d.sum(-1) / some)[..., None]).masked_fill(~valid, 0.0)
    found = reach * (12 * d.square().sum(-1) / some).sqrt() / some
    return torch.where(reach == 0, 1.0, found.clamp(min=SMALLEST))


def of_rows(x, valid, poisoned, strength: Strength, spreads=None) -> torch.Tensor:
    """eps of each row of x [..., n], float64 [...], with the graph of a tensor strength; NaN for a poisoned row.

    A relative strength needs `valid`, which elements are present, or `spreads`, each row's spread, where that is known.
    poisoned: None if no row is.
    """
    if strength.relative:
        eps = (spread(x, valid) if spreads is None else spreads) * strength.number
    else:
        eps = torch.full(x.shape[:-1], strength.number, dtype=torch.float64, device=x.device)
    if strength.tensor is not None:
        eps = eps * (strength.tensor if strength.tensor.numel() == 1 else strength.tensor.reshape(eps.shape))
    return eps if poisoned is None else eps * torch.where(poisoned, math.nan, 1.0)  # a tensor's gradient is NaN too
