# SPDX-License-Identifier: Apache-2.0
"""The contract that every op meets on every backend: it turns a family's `spec.py` into judged measurements.

Error is measured against the float64 reference of the same rounded input and must stay below
min(2 x the same-dtype reference's error + a few eps, the cap of spec.py), as a maximum and in L2, for the value and
for every gradient. The other checks compare a backend with itself under poison, strides, masks, autocast, streams.
Triton's interpreter truncates TF32 factors, as tensor cores do.
`python -m kdkernels validate` prints the result for this machine.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Iterator

from .. import backend as backends
from ..registry import OPS
from . import transforms
from .case import REGIMES, SCALES, Caps, Case, generator_beside, pair, sample, seeded
from .checks import CUDA_ONLY, STRUCTURAL, accuracy, poison
from .probe import Result, probe_of
from .tensor_cores import truncated_tf32

__all__ = [
    "Caps",
    "Case",
    "REGIMES",
    "Result",
    "SCALES",
    "checks_for",
    "contract",
    "generator_beside",
    "measure",
    "pair",
    "poison",
    "sample",
    "seeded",
]


def checks_for(backend: str, device: str) -> list[str]:
    """Names of the checks that apply.

    The reference is the oracle and plain autograd: it may wait for the device, its backward pass, called inside
    autocast, is rounded as any PyTorch expression's is, and transforms of it are PyTorch's. Of Triton's interpreter
    only the kernels are asked: what PyTorch makes of a call does not depend on them, and what they make of NaN is asked
    of more of them in `tests/test_nonfinite.py`.
    """
    names = ["accuracy", *STRUCTURAL]
    if not device.startswith("cuda"):
        names = [name for name in names if name not in CUDA_ONLY]
    if backend == "reference" or (backend == "triton" and device == "cpu"):
        seen_to = {"inference mode", "second derivative"} if backend == "reference" else set()
        names = [name for name in names if name not in (*transforms.CHECKS, "nonfinite") or name in seen_to]
    if backend == "reference":
        names = [name for name in names if name not in (*CUDA_ONLY, "accuracy", "autocast")]
    return names


def contract(op: str, backend: str, device: str = "cpu", quick: bool = False, checks=None) -> list[Result]:
    """Every measurement of one op on one backend; `checks` restricts them. An exception becomes a failed result.

    >>> from kdkernels import testing
    >>> all(result.ok for result in testing.contract("mmd", "torch", quick=True, checks=["twice"]))
    True
    """
    return list(measure(op, backend, device, quick, checks))


def measure(op: str, backend: str, device: str = "cpu", quick: bool = False, checks=None) -> Iterator[Result]:
    """The measurements of `contract`, one by one as they are made."""
    if op not in OPS:
        raise ValueError(f"op is {op!r}: the ops are {sorted(OPS)}")
    why = backends.obstacle(backend, device, op=op)
    if why is not None:
        raise RuntimeError(f"backend={backend!r} cannot run {op} here: {why}")
    checks = checks_for(backend, device) if checks is None else list(checks)
    unknown = set(checks) - {"accuracy", *STRUCTURAL}
    if unknown:
        raise ValueError(f"checks holds {sorted(unknown)}: the checks are {['accuracy', *STRUCTURAL]}")
    spec = importlib.import_module(f"kdkernels.{OPS[op].family}.spec")
    with truncated_tf32() if (backend, device) == ("triton", "cpu") else contextlib.nullcontext():
        yield from _measured(spec.cases(op, backend, quick), backend, device, checks)


def _measured(cases: Iterator[Case], backend: str, device: str, checks: list[str]) -> Iterator[Result]:
    for case in cases:
        if "accuracy" in checks:
            yield from _caught("accuracy", case, accuracy, case, backend, device)
        structural = [name for name in checks if name != "accuracy"] if case.probe else []
        probe = _caught("probe", case, lambda *a: [probe_of(*a)], case, backend, device) if structural else []
        if probe and isinstance(probe[0], Result):
            yield probe[0]
            continue
        for name in structural:
            yield from _caught(name, case, STRUCTURAL[name], *probe)


def _caught(name: str, case: Case, check, *args) -> list:
    try:
        return list(check(*args))
    except Exception as error:
        return [Result(name, case.name, math.inf, 0.0, False, f"{type(error).__name__}: {error}")]
