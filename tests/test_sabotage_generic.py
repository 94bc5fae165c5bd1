# SPDX-License-Identifier: Apache-2.0
"""Whatever the op, the contract notices what any kernel can get wrong: each is planted around the call of a probe.

What only one family can get wrong stands in its own sabotage file.
"""

import importlib
import itertools

import pytest
import torch
from broken import packed

from kdkernels.registry import OPS
from kdkernels.testing.checks import STRUCTURAL, accuracy
from kdkernels.testing.probe import probe_of


class Bent(torch.autograd.Function):
    """The identity, whose backward pass changes what comes through."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.change(grad), None


def value(change):
    return lambda case, call: lambda t, backend: change(call(t, backend))


def given(change):
    """The op sees other features."""

    def broken(case, call):
        return lambda t, backend: call(
            t | {name: change(t[name]) for name in case.floats if t[name].dim() > 1}, backend
        )

    return broken


def gradient(change, when=lambda asked, name: True):
    """The gradient of the inputs, with what `when` says of those that are asked for and of each."""

    def broken(case, call):
        def run(t, backend):
            asked = [name for name in case.leaves if t[name].requires_grad]
            return call(t | {n: Bent.apply(t[n], change) for n in asked if when(asked, n)}, backend)

        return run

    return broken


def upstream(change):
    return lambda case, call: lambda t, backend: Bent.apply(call(t, backend), change)


def last_not_written(v):
    return torch.cat([v.flatten()[:-1], v.new_empty(1)]).reshape(v.shape) + 0 * v


def without_largest(g, across):
    """Without the row (or column) that holds the largest entry: a masked one would not be missed."""
    if g.dim() < 2:
        return 0 * g
    return g.masked_fill(g.abs().amax(across, keepdim=True) == g.abs().amax(), 0)


CALLS = itertools.count()


def another(v):
    return v * (1 + 1e-6 * next(CALLS)) + 1e-6 * next(CALLS)


def leaks(case, call):
    """A mask by multiplication: 0 times what it drops."""
    rows = [(mask, name) for mask, names in case.masks.items() for name in names]
    leak = lambda t: sum((t[name] * t[mask][..., None]).sum() * 0 for mask, name in rows)  # noqa: E731
    return lambda t, backend: call(t, backend) + leak(t).detach()


def rounded_inside_autocast(case, call):
    def run(t, backend):
        out = call(t, backend)
        return out.bfloat16().to(out.dtype) if torch.is_autocast_enabled("cpu") else out

    return run


# what is planted -> the check that must fail, and how it is planted
SABOTAGE = {
    "zeros": ("value", value(lambda v: 0 * v)),
    "sign flip": ("value", value(torch.neg)),
    "5 % scale": ("value", value(lambda v: v * 1.05)),
    "another dtype": ("value", value(torch.Tensor.double)),
    "not a number": ("value", value(lambda v: v * float("nan"))),
    "zero gradient": ("gradient", gradient(torch.zeros_like)),
    "gradient sign flip": ("gradient", gradient(torch.neg)),
    "gradient 5 % scale": ("gradient", gradient(lambda g: g * 1.05)),
    "gradient rounded to bfloat16": ("gradient", gradient(lambda g: g.bfloat16().to(g.dtype))),
    "gradient without a row": ("gradient", gradient(lambda g: without_largest(g, -1))),
    "gradient without a column": ("gradient", gradient(lambda g: without_largest(g, -2))),
    "gradient of the last input alone 5 % off": (
        "gradient",
        gradient(lambda g: g * 1.05, lambda asked, name: name == asked[-1]),
    ),
    "ignored upstream gradient": ("gradient", upstream(torch.ones_like)),
    "half where one gradient is asked for": ("needs", gradient(lambda g: g / 2, lambda asked, name: len(asked) == 1)),
    "not the same twice": ("twice", value(another)),
    "unwritten tail": ("poison", value(last_not_written)),
    "strides not read": ("layouts", given(packed)),
    "mask by multiplication": ("masks", leaks),
    "a number for NaN": ("nonfinite", value(lambda v: v.nan_to_num(0.0, 0.0, 0.0))),
    "rounded by autocast": ("autocast", rounded_inside_autocast),
}


def applies(check, case) -> bool:
    if check in ("gradient", "needs"):
        return case.gradient and len(case.leaves) > (check == "needs")
    if check == "autocast":  # bfloat16 holds the numbers of what is counted
        return case.gradient
    if check == "nonfinite":  # counts and places are numbers whatever they are of
        return case.gradient
    return check != "masks" or bool(case.masks)


def probes():
    for op in OPS.values():
        spec = importlib.import_module(f"kdkernels.{op.family}.spec")
        cases = [case for case in spec.cases(op.name, "torch", quick=True) if case.probe]
        for name, (check, plant) in SABOTAGE.items():
            fitting = [case for case in cases if applies(check, case)]
            if fitting:
                yield pytest.param(fitting[0], check, plant, id=f"{op.name} {name}")


@pytest.mark.parametrize("case, check, plant", list(probes()))
def test_the_contract_rejects(case, check, plant):
    broken = plant(case, case.call)
    planted = case._replace(call=lambda t, backend: (case.call if backend == "reference" else broken)(t, backend))
    if check in ("value", "gradient"):
        results = list(accuracy(planted, "torch", "cpu"))
        assert any(result.check.startswith(check) and not result.ok for result in results)
    else:
        results = list(STRUCTURAL[check](probe_of(planted, "torch", "cpu")))
        assert not all(result.ok for result in results)
