# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs for a call, and why: an explicit request runs or raises, `auto` takes the best that can."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from functools import cache
from typing import NamedTuple

import torch

from . import checks, native
from ._types import Backend
from .registry import OPS

BACKENDS = ("reference", "torch", "cpp", "triton", "cuda")


@cache
def _triton_found() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def interpreting() -> bool:
    """As Triton itself sees it: the variable counts when the kernels are first imported, not when it changes."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _triton_obstacle(device: str, dtypes) -> str | None:
    if not _triton_found():
        return "the package triton is not installed"
    if device != "cuda" and not interpreting():
        return f"the tensors are on {device} (triton runs on CUDA tensors, on CPU ones only under TRITON_INTERPRET=1)"
    if torch.float64 in dtypes:
        return "the Triton kernels compute in float32 and the input is float64"
    if torch.bfloat16 in dtypes and interpreting():
        return "Triton's interpreter is wrong in bfloat16"
    if any(t.itemsize == 2 for t in dtypes) and device == "cuda" and _fails_on_halves():
        return "Triton 3.6 does not compile products of half rows for this GPU (compute capability 10): update torch"
    return None


@cache
def _fails_on_halves() -> bool:
    old = importlib.metadata.version("triton").startswith("3.6")
    return old and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 10


def obstacle(backend: str, device: str, dtypes=(), op: str | None = None, long: bool = False) -> str | None:
    """Why `backend` cannot run (an op) for tensors on this device ("cuda": the current one), or None if it can.

    long: the rows have more entries than the Triton kernels of the op take.
    """
    kind = device.partition(":")[0]
    if backend in ("reference", "torch"):
        return None
    if backend == "triton":
        why = _triton_obstacle(kind, dtypes)
        if why is None and op and long:
            why = f"the rows have more than the {OPS[op].longest:,} entries that a Triton program holds"
        return why
    if backend == "cpp":
        if kind != "cpu":
            return f"the tensors are on {kind} (cpp runs on the CPU)"
        return native.lack("cpu", OPS[op].operators("cpu") if op else ())
    if kind != "cuda":
        return f"the tensors are on {kind} (cuda runs on CUDA tensors)"
    return native.lack("cuda", OPS[op].operators("cuda") if op else ()) or native.refusal(device)


def check_name(requested) -> str:
    if requested not in ("auto", *BACKENDS):
        raise ValueError(f"backend is {requested!r}: give one of {('auto', *BACKENDS)}")
    return requested


def choose(op: str, requested: str, device: str, dtypes, long: bool = False) -> tuple[str, str]:
    backends = OPS[op].backends
    if check_name(requested) != "auto":
        if requested not in backends:
            raise ValueError(f"backend is {requested!r}: {op} has {('auto', *backends)}")
        why = obstacle(requested, device, dtypes, op, long)
        if why is not None:
            raise RuntimeError(f"backend={requested!r} cannot run {op} here: {why}")
        return requested, "requested"
    passed = []
    for backend in backends:
        # the interpreter is for tests: it is never what a caller who asked for nothing wants
        why = "only on request under TRITON_INTERPRET=1" if backend == "triton" and device == "cpu" else None
        why = obstacle(backend, device, dtypes, op, long) or why
        if why is None:
            return backend, "; ".join(passed) or "the first choice"
        passed.append(f"not {backend}: {why}")
    raise AssertionError("reference always runs")


@cache
def _choose_cached(op, requested, device, dtypes, long, _interpreting) -> str:
    chosen, _ = choose(op, requested, device, dtypes, long)
    kind = device.partition(":")[0]
    if requested == "auto" and {"cpu": "cpp", "cuda": "cuda"}.get(kind) in OPS[op].backends:
        why = native.missed(kind) or native.refusal(device)
        if why:
            _warn(why)
    return chosen


@cache
def _warn(why: str):
    """Once, not for each op: the library was to run here and does not."""
    checks.warn(f"{why}. The next backend in line runs instead: kdkernels.explain names it")


@torch.compiler.assume_constant_result
def resolve(op: str, requested: str, device: str, dtypes: tuple[torch.dtype, ...], long: bool = False) -> str:
    """The backend that runs `op` on tensors of these dtypes on this device; an op without cuda may give its type."""
    requested = requested if isinstance(requested, str) else check_name(requested)
    return _choose_cached(op, requested, device, dtypes, long, interpreting())


@torch.compiler.assume_constant_result
def runs_compiled(requested: str, device: str, operators: tuple[str, ...]) -> bool:
    """Whether a step that is no op by itself runs in the compiled CPU library: these operators of it."""
    return requested in ("auto", "cpp") and device == "cpu" and _has_compiled(operators)


@cache  # asking PyTorch for an operator takes 6 us
def _has_compiled(operators: tuple[str, ...]) -> bool:
    return native.lack("cpu", operators) is None


@cache
def implementation(family: str, backend: str):
    """The module of a family (its package) that runs a backend, loaded when it is first needed."""
    name = {"triton": "triton_impl", "cpp": "native_impl", "cuda": "native_impl"}.get(backend, "torch_impl")
    return importlib.import_module(f"{family}.{name}")


_fp32_precision = getattr(torch._C, "_get_fp32_precision_getter", lambda *_: torch.backends.cuda.matmul.fp32_precision)


def matmul_precision() -> str:
    """`torch.backends.cuda.matmul.fp32_precision`, in a fifth of its time."""
    return _fp32_precision("cuda", "matmul")


def is_long(op: str, requested: str, kind: str, length: int) -> bool:
    """Whether rows have more entries than the Triton kernels of the op take, where that matters: lengths are compared
    there alone, so that an exported program is not held to one side of the bound."""
    return (kind == "cuda" or requested == "triton") and 0 < OPS[op].longest < length


class Explanation(NamedTuple):
    op: str
    backend: str
    why: str

    def __str__(self) -> str:
        return f"{self.op} runs on {self.backend}: {self.why}"


def explain(op: str, *tensors: torch.Tensor, backend: Backend = "auto") -> Explanation:
    """Which backend would run `op` on these tensors, and why not a better one.

    >>> print(kd.explain("cka", torch.randn(8, 4), torch.randn(8, 4), backend="torch"))
    cka runs on torch: requested
    """
    if op not in OPS:
        raise ValueError(f"op is {op!r}: the ops are {sorted(OPS)}")
    if not tensors:
        raise ValueError("explain needs the tensors of the call: kd.explain('cka', x, y)")
    x, dtypes = tensors[0], tuple(t.dtype for t in tensors)
    long = bool(x.dim()) and 0 < OPS[op].longest < x.shape[-1]
    return Explanation(op, *choose(op, backend, str(x.device), dtypes, long))


def available_backends(device: str | None = None) -> dict[str, str]:
    """Each backend with "available", or the reason why not, for tensors on `device` (default: cuda if there is one)."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return {name: obstacle(name, device) or "available" for name in BACKENDS}
