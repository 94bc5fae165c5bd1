# SPDX-License-Identifier: Apache-2.0
"""A weight that rises linearly with training: a buffer changed in place: no recompilation, and checkpoints keep it."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import nn

from .. import checks
from .._types import Result
from ..accumulator import Unrounded


class Ramp(Unrounded):
    """Warm-up of a loss: its weight rises from 0 to 1 over the first calls.

    weight * loss(...), weight = clamp((steps - start) / (end - start), 0, 1); 0 before `start`, 1 from `end` on.

    Needed where a loss is scale-invariant (the CKA family): its gradient is largest at initialisation.

    Args:
        loss: any loss module; the call and `return_parts` are its own.
        start, end: steps, 0 <= start <= end. start == end switches the loss on at that step.
        count: "calls": each call in training mode counts one step, after its value is taken, and calls in eval mode
            count none, so `model.eval()` on a module that holds the loss, or `ramp.eval()`, makes it a measurement.
            "manual": only `step()` counts; use it where a step has several calls (gradient accumulation, two heads,
            activation checkpointing).

    Buffers: `steps` (int64) and `weight`, both in the state dict: a resumed training goes on where it was. Before
    `start` the loss is computed and multiplied by 0: reading the weight on the host would wait for the GPU.

    >>> student, teacher = torch.randn(8, 10), torch.randn(8, 10)
    >>> ramp = kd.losses.Ramp(kd.losses.KDLoss(), start=0, end=4)
    >>> values = [ramp(student, teacher) for _ in range(6)]
    >>> [round((v / values[-1]).item(), 3) for v in values]
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """

    steps: torch.Tensor
    weight: torch.Tensor
    loss: nn.Module
    start: int
    end: int

    def __init__(self, loss: nn.Module, start: int, end: int, *, count: Literal["calls", "manual"] = "calls"):
        super().__init__()
        if not isinstance(loss, nn.Module):
            raise TypeError(f"loss is a {type(loss).__name__}: Ramp wraps a loss module, e.g. kd.losses.RCKALoss()")
        if not (checks.is_number(start) and checks.is_number(end) and 0 <= start <= end < math.inf):
            raise ValueError(f"start is {start!r}, end is {end!r}: the steps must be numbers 0 <= start <= end")
        if count not in ("calls", "manual"):
            raise ValueError(f"count is {count!r}: give 'calls' or 'manual'")
        self.loss, self.start, self.end, self.count = loss, start, end, count
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("weight", torch.zeros(()))
        self._set_weight()

    def forward(self, *args: Any, return_parts: bool = False, **options: Any) -> Result:
        checks.flags(return_parts=return_parts)
        # a copy, as the buffer changes before backward; by an operator, as a compiler would make a plain one again then
        weight = torch.ops.kdkernels.ordinary(self.weight)
        if return_parts:
            total, parts = self.loss(*args, return_parts=True, **options)
            result = total * weight.to(total.dtype), {name: p * weight.to(p.dtype) for name, p in parts.items()}
        else:
            total = self.loss(*args, **options)
            result = total * weight.to(total.dtype)
        if self.training and self.count == "calls":
            self.step()
        return result

    def step(self) -> None:
        """Count one step and set `weight` accordingly, in place."""
        self.steps.add_(1)
        self._set_weight()

    def _set_weight(self):
        # end == start: a rise over less than one step is a switch
        risen = (self.steps - self.start).float() / max(self.end - self.start, 1)
        risen = (self.steps >= self.end).float() if self.end == self.start else risen
        self.weight.copy_(risen.clamp(0, 1))

    def extra_repr(self) -> str:
        return f"start={self.start}, end={self.end}, count={self.count!r}, weight={self.weight.item():g}"
