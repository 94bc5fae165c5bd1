# SPDX-License-Identifier: Apache-2.0
"""What a run is measured by: the float64 oracle of its inputs, and a budget that follows from their conditioning.

One rule for every op. A run may be off the oracle by a few times what a rounding of its inputs moves the oracle, or by
twice what the reference of the same dtype is off, beside a few eps, and never by more than the cap of the spec; two
runs of one backend may be apart by what both may be off. What a rounding moves is the problem's own on every machine;
the reference's error is measured where the test runs. The textbook itself has no cap but the one below.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from .case import Caps, Case, Outcome, evaluate

FLOOR = 32  # eps granted beside the reference's error
TEXTBOOK = Caps(0.05, 0.05)  # in float32 it cancels where an implementation may not, but it has to be right
DRAWS = (0, 6, 24)  # inputs one rounding apart, more where needed: on a few, errors in one direction are small by luck
STEPS = 4  # roundings on the way from the inputs to the outputs: every backend rounds rows, products, kernels and sums


class Oracle(NamedTuple):
    """The float64 reference on the CPU, the upstream gradient used, and what its errors are measured by."""

    upstream: Callable
    value: torch.Tensor
    grads: dict[str, torch.Tensor]
    scale: float
    terms: dict[str, torch.Tensor]


class Verdict(NamedTuple):
    """Of the value or of one gradient; error and budget are relative."""

    part: str
    error: float
    budget: float
    ok: bool
    note: str


def alternating(value: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """An upstream gradient of four weights in turn."""
    weights = factor * torch.tensor([1.25, -0.75, 1.5, -2.0], device=value.device, dtype=value.dtype)
    return weights.repeat(value.numel() // 4 + 1)[: value.numel()].reshape(value.shape)


def expanded(value: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """The same for every row, with stride 0; one weight for all where the value has no rows."""
    if value.dim() > 1:
        return alternating(value[0], factor).expand(value.shape)
    return value.new_full((), 1.5 * factor).expand(value.shape)


def doubled(case: Case, inputs) -> dict[str, torch.Tensor]:
    """The inputs as the oracle takes them: float64, on the CPU."""
    double = {name: t.detach().cpu() for name, t in inputs.items()}
    return double | {name: double[name].double() for name in case.floats}


def moved(case: Case, inputs, generator: torch.Generator, least: float = 0.0) -> dict[str, torch.Tensor]:
    """The floating inputs with each number as it is or one eps of its dtype, or of `least`, up or down.

    Equal numbers move alike, 0 and infinity not at all: ties, constant sides and rows on landmarks stay what they are.
    """
    numbers = torch.cat([inputs[name].detach().cpu().double().flatten() for name in case.floats])
    _, place = numbers.unique(return_inverse=True)
    ways = (torch.randint(3, numbers.shape, generator=generator) - 1)[place]
    out = dict(inputs)
    for name, way in zip(case.floats, ways.split([inputs[name].numel() for name in case.floats]), strict=True):
        t = inputs[name]
        eps = max(torch.finfo(t.dtype).eps, least)
        out[name] = (t.double() * (1 + eps * way.reshape(t.shape).to(t.device))).to(t.dtype)
    return out


def _largest(grads) -> float:
    return max((float(g.abs().nan_to_num(0.0, 0.0, 0.0).max()) for g in grads.values() if g.numel()), default=0.0)


def oracle_of(case: Case, inputs, weights=alternating) -> Oracle:
    """Powers of two bring the upstream gradient, and so every gradient, near 1: a loss scale for half inputs."""
    double = doubled(case, inputs)
    plain = evaluate(case, double, "reference", weights)
    terms = plain.grads
    if case.terms and case.gradient:
        terms = evaluate(case._replace(call=lambda t, _: case.terms(t)), double, "", weights).grads
    # a gradient that is rounding noise of its terms must not be blown up to 1
    largest = max(_largest(plain.grads), 1e-9 * _largest(terms))
    factor = 2.0 ** -round(math.log2(largest)) if 0 < largest < math.inf else 1.0
    grads, terms = ({name: g * factor for name, g in part.items()} for part in (plain.grads, terms))
    return Oracle(lambda value: weights(value, factor), plain.value, grads, float(case.scale(double)), terms)


def deviation(got: torch.Tensor, want: torch.Tensor, size: float | torch.Tensor) -> tuple[float, float]:
    """Maximum and L2 error relative to `size`, a number for each entry or a tensor of terms; rounding `got` is free.

    NaN or infinity where it is wanted is no error; elsewhere it is an infinite one.
    """
    got, limits, want = got.detach().cpu(), torch.finfo(got.dtype), want.cpu().double()
    free = limits.eps / 2 * want.abs() + limits.tiny * limits.eps / 2
    right = (want.isnan() & got.isnan()) | (want.isinf() & (got == want))
    error = ((got.double() - want).abs() - free).clamp(min=0).masked_fill(right, 0.0)
    if isinstance(size, torch.Tensor):
        want, size = want.nan_to_num(0.0, 0.0, 0.0), size.cpu().double().nan_to_num(0.0, 0.0, 0.0)
        sizes = [max(want.abs().max(), size.abs().max()), max(want.norm(), size.norm())]
    else:
        sizes = [size, size * math.sqrt(max(1, want.numel()))]
    found = (error.max(), error.norm())
    return tuple(_ratio(float(e), float(s)) for e, s in zip(found, sizes, strict=True))


def _ratio(error: float, size: float) -> float:
    if error == 0:
        return 0.0
    return error / size if size > 0 and math.isfinite(error) else math.inf


class Yardstick:
    """The oracle of some inputs, and the budgets of what runs on them."""

    def __init__(self, case: Case, inputs, backend: str, weights=alternating, coarsest: torch.dtype = torch.float32):
        self.case, self.inputs, self.oracle = case, inputs, oracle_of(case, inputs, weights)
        self.own = self._textbook(inputs)
        self.caps = TEXTBOOK if backend == "reference" else case.caps(coarsest)
        self.eps = torch.finfo(coarsest).eps
        self._worst, self._ways = [], torch.Generator().manual_seed(0)

    def _textbook(self, inputs) -> Outcome:
        with self.case.textbook():
            return evaluate(self.case, inputs, "reference", self.oracle.upstream)

    def _parts(self, run: Outcome, want: Outcome | Oracle) -> Iterator[tuple]:
        """(name, of the run, what is wanted, the size of its terms, its cap) of the value and of each gradient."""
        yield "value", run.value, want.value, self.oracle.scale, self.caps.value
        for name, g in run.grads.items():
            yield f"gradient {name}", g, want.grads[name], self.oracle.terms[name], self.caps.gradient

    def errors(self, run: Outcome, want: Outcome | Oracle) -> Iterator[tuple[str, tuple[float, float], float]]:
        """(name, error as a maximum and in L2, cap) of each part."""
        return ((part, deviation(got, right, size), cap) for part, got, right, size, cap in self._parts(run, want))

    def _around(self, draws: int) -> dict[str, tuple[float, float]]:
        """The largest errors of the reference on these inputs and on so many one rounding apart, or how far `STEPS`
        roundings of float32 move the oracle, of which `_verdict` grants twice."""
        while len(self._worst) <= draws:
            self._worst.append(self._one_more())
        return self._worst[draws]

    def _one_more(self) -> dict[str, tuple[float, float]]:
        if not self._worst:
            return {part: error for part, error, _ in self.errors(self.own, self.oracle)}
        worst, run = dict(self._worst[-1]), functools.partial(evaluate, self.case, backend="reference")
        double, single = doubled(self.case, self.inputs), torch.finfo(torch.float32).eps
        inputs = moved(self.case, self.inputs, self._ways)
        own = self._textbook(inputs)
        want = run(doubled(self.case, inputs), upstream=self.oracle.upstream)
        near = run(moved(self.case, double, self._ways, single), upstream=self.oracle.upstream)
        for factor, errors in ((1, self.errors(own, want)), (STEPS / 2, self.errors(near, self.oracle))):
            for part, error, _ in errors:
                worst[part] = tuple(max(w, factor * e) for w, e in zip(worst[part], error, strict=True))
        return worst

    def judge(self, run: Outcome, other: Outcome | None = None) -> Iterator[Verdict]:
        """Each part of a run against the oracle, or against another run of the same backend."""
        dtypes = {part: own.dtype for part, own, *_ in self._parts(self.own, self.oracle)}
        for part, got, want, size, cap in self._parts(run, self.oracle if other is None else other):
            runs = 1 if other is None else 2
            if got.shape != want.shape or got.dtype != dtypes[part]:
                note = f"is {got.dtype} {tuple(got.shape)}, not {dtypes[part]} {tuple(want.shape)}"
                yield Verdict(part, math.inf, runs * cap, False, note)
                continue
            errors = deviation(got, want, size)
            for draws in DRAWS:  # each takes three runs, and most need no more than the error here grants
                verdict = self._verdict(part, errors, self._around(draws)[part], runs, cap)
                if verdict.ok or max(errors) > runs * cap:
                    break
            yield verdict

    def _verdict(self, part, errors, own, runs, cap) -> Verdict:
        """Of the worse of the two norms."""
        # in float64 the oracle errs as much as what it judges: only the cap stands
        exact = self.eps <= torch.finfo(torch.float64).eps
        granted = [runs * (cap if exact else min(2 * o + FLOOR * self.eps, cap)) for o in own]
        error, budget = max(zip(errors, granted, strict=True), key=lambda pair: pair[0] / pair[1])
        return Verdict(part, error, budget, error <= budget, f"reference {max(own):.1e}")
