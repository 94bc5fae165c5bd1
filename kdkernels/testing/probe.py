# SPDX-License-Identifier: Apache-2.0
"""What a check is given and what it yields: a case run once on a backend, and judged measurements."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .case import Case, Outcome, evaluate, rounded
from .yardstick import Yardstick


class Result(NamedTuple):
    """One measurement; error and budget are relative, NaN and wrong dtypes count as an infinite error."""

    check: str
    case: str
    error: float
    budget: float
    ok: bool
    note: str = ""


class Probe(NamedTuple):
    """One case on one backend: its float32 inputs, and the outcome to repeat."""

    case: Case
    backend: str
    device: str
    inputs: dict[str, torch.Tensor]
    yardstick: Yardstick
    want: Outcome
    upstream: torch.Tensor  # made once: a probe under capture must not copy from the host

    def run(self, inputs, needs=None, upstream=None, call=None) -> Outcome:
        """The call, or another in its place, on these inputs."""
        case = self.case if call is None else self.case._replace(call=call)
        return evaluate(case, inputs, self.backend, upstream or (lambda value: self.upstream), needs)

    def alike(self, check: str, how: str, got: Outcome) -> Iterator[Result]:
        """Whether the outcome is repeated, within the rounding of two runs."""
        return alike(check, f"{self.case.name} {how}".rstrip(), self.yardstick, got, self.want)


def alike(check: str, label: str, yardstick: Yardstick, got: Outcome, want: Outcome) -> Iterator[Result]:
    for part, *verdict in yardstick.judge(got, want):
        yield Result(check, f"{label} {part}", *verdict)


def same(check: str, label: str, got: Outcome, want: Outcome) -> Iterator[Result]:
    """The same bits."""
    for part, a, b in [
        ("value", got.value, want.value),
        *((f"gradient {k}", g, want.grads[k]) for k, g in got.grads.items()),
    ]:
        error = 0.0 if torch.equal(a, b) else math.inf
        yield Result(check, f"{label} {part}", error, 0.0, error == 0)


def probe_of(case: Case, backend: str, device: str) -> Probe:
    inputs = rounded(case, torch.float32, device)
    yardstick = Yardstick(case, inputs, backend)
    want = evaluate(case, inputs, backend, yardstick.oracle.upstream)
    return Probe(case, backend, device, inputs, yardstick, want, yardstick.oracle.upstream(want.value))
