# SPDX-License-Identifier: Apache-2.0
"""A case of an op: inputs in a data regime, how to call it, what its errors are measured by, and one run of it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch

SEED = 5
REGIMES = ("bland", "peaky", "edge", "offset3", "offset30", "near")
SCALES = (1e-30, 1e-20, 1e20, 1e30)  # finite in float32, while squares are not


class Caps(NamedTuple):
    """Absolute limits: of the value in units of `Case.scale`, of a gradient in units of its own size, or its terms'."""

    value: float
    gradient: float


class Case(NamedTuple):
    """One call of an op: float64 inputs that are rounded to each dtype, and what its error is measured by."""

    name: str
    inputs: dict[str, torch.Tensor]  # floating inputs are differentiated; bool ones are masks
    call: Callable[[dict, str], torch.Tensor]  # call(inputs, backend)
    caps: Callable[[torch.dtype], Caps]  # for the coarsest dtype among the inputs
    scale: Callable[[dict], torch.Tensor]  # float64 inputs -> the size of the terms that the value adds up
    # float64 inputs -> a function whose gradients are the terms that the gradients are differences of, or None
    terms: Callable[[dict], torch.Tensor] | None = None
    dtypes: tuple = (torch.float32,)  # a dtype, or a tuple with one for each floating input
    masks: dict[str, tuple[str, ...]] = {}  # mask -> the inputs whose rows it drops
    gradient: bool = True  # False where only the value is specified (NaN)
    probe: bool = False  # the structural checks run on probes only
    constants: tuple[str, ...] = ()  # floating inputs that the op gives no gradient to
    linear: bool = False  # in all inputs that get a gradient: then its second derivative is right, and 0
    ruled: bool = False  # by a number that follows from the inputs and is detached: differences would see it move
    alike: int | None = -1  # the dimension along which a probe stays well conditioned where all entries are alike
    context: Callable = contextlib.nullcontext  # forces a path of the implementation, for instance small tiles
    textbook: Callable = contextlib.nullcontext  # in which the reference rounds as its inputs do, where it is wider

    @property
    def floats(self) -> list[str]:
        return [name for name, t in self.inputs.items() if t.is_floating_point()]

    @property
    def leaves(self) -> list[str]:
        return [name for name in self.floats if name not in self.constants]


class Outcome(NamedTuple):
    value: torch.Tensor
    grads: dict[str, torch.Tensor]


@contextlib.contextmanager
def seeded():
    """The default generator of the CPU as a new one: a compiler takes no other."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        yield


def generator_beside(x):
    """None for `seeded`, elsewhere a generator that draws the same: of the CPU, one for every device."""
    return None if x.is_cpu else torch.Generator().manual_seed(SEED)


def sample(regime: str, shape, generator: torch.Generator) -> torch.Tensor:
    """float64 features [..., n, p] of a data regime: one regime with one norm lets real bugs through."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if regime == "bland":
        return 0.1 * x
    if regime == "peaky":
        return 4 * x
    if regime == "edge":  # the mass in the last rows and columns, where a tile is partial
        x[..., -2:, :] *= 8
        x[..., -1] *= 8
        return 0.3 * x
    if regime in ("offset3", "offset30"):
        return x.relu() + float(regime[6:])
    return x


def pair(regime: str, shape_x, shape_y, generator: torch.Generator, rows_match: bool = True):
    """Two sides of a regime; y follows x in part, and within 1e-3 for "near" (student ~ teacher)."""
    x, y = sample(regime, shape_x, generator), sample(regime, shape_y, generator)
    if not rows_match:
        return x, y + 0.3 * y.std()
    follow = x @ torch.eye(shape_x[-1], shape_y[-1], dtype=x.dtype)
    return x, follow + 1e-3 * y if regime == "near" else (y + follow) / 2


def rounded(case: Case, dtype, device) -> dict[str, torch.Tensor]:
    """The inputs on the device, features in `dtype` (or in one dtype each); a parameter is never below float32."""
    each = itertools.cycle(dtype if isinstance(dtype, tuple) else (dtype,))
    inputs = {name: t.to(device) for name, t in case.inputs.items()}
    for name in case.floats:
        own = next(each)
        inputs[name] = inputs[name].to(own if inputs[name].dim() > 1 else torch.promote_types(own, torch.float32))
    return inputs


def evaluate(case: Case, inputs, backend: str, upstream, needs=None) -> Outcome:
    """Value and gradients of sum(upstream * value) for the inputs named in `needs` (default: all floating ones)."""
    needs = [*(case.leaves if needs is None else needs)] if case.gradient else []
    inputs = {name: t.detach().requires_grad_(name in needs) for name, t in inputs.items()}
    with case.context():
        value = case.call(inputs, backend)
        if not needs:
            return Outcome(value.detach(), {})
        grads = torch.autograd.grad(value, [inputs[name] for name in needs], upstream(value))
    return Outcome(value.detach(), dict(zip(needs, grads, strict=True)))
