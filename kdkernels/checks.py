# SPDX-License-Identifier: Apache-2.0
"""Uniform errors for shapes, dtypes and devices: each names the caller's argument and the fix.

No value of a CUDA tensor is read on the host unless `debug_checks()` is on; values of CPU tensors may be read.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch

_debug = False
# within vmap a tensor has no one value
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)


@contextlib.contextmanager
def debug_checks() -> Iterator[None]:
    """Inside, value checks (NaN, infinity, sigma <= 0) also run for CUDA tensors: they synchronise."""
    global _debug
    before, _debug = _debug, True
    try:
        yield
    finally:
        _debug = before


def may_read(tensor) -> bool:
    """Whether a value check may look into this tensor here."""
    readable = _debug or tensor.device.type == "cpu"
    # a dispatch mode may be one that traces
    return readable and not (torch.compiler.is_compiling() or _transforms_active() or _modes())


def debugging() -> bool:
    return _debug and not torch.compiler.is_compiling()


def settles(*tensors: torch.Tensor) -> bool:
    """Whether all that is checked of such `plain` tensors follows from their layouts: no value is looked at."""
    for tensor in tensors:
        if tensor.is_nested or tensor.layout is not torch.strided:
            return False
    return not _debug


class Recent:
    """What was found for the last `size` keys that were new. A key, and what was found, hold no tensor."""

    def __init__(self, size: int):
        self.size = size
        self.found: dict[Hashable, Any] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Any:
        return self.found.get(key)

    def keep(self, key: Hashable, value: Any) -> None:
        with self._lock:
            self.found[key] = value
            while len(self.found) > self.size:
                del self.found[next(iter(self.found))]


def outside(sizes, least: float, most: float) -> bool:
    """Whether one of a few float32 numbers [G] on the CPU is not between the two: squares leave float32 beyond 1e19 and
    below 1e-19. A GPU would have to wait for the answer."""
    return sizes.is_cpu and sizes.dtype == torch.float32 and beyond(sizes.tolist(), least, most)


def beyond(sizes: list[float], least: float, most: float) -> bool:
    """Whether one is not between the two. NaN has no size: its group changes nothing for the others."""
    return any(size <= least or size >= most for size in sizes)


# whose frames lie between a caller and the line that warns: this package, modules, compilers, wrappers
_BETWEEN = {__package__, "torch", "torchmetrics", "contextlib", "functools"}


def warn(message: str):
    """A warning that points at the line that called the package, however deep below it this is."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).split(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def is_tensor(value, name: str):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}: pass a torch.Tensor")


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def floating(tensor, name: str):
    is_tensor(tensor, name)
    if tensor.is_nested:
        raise TypeError(f"{name} is a nested tensor: pass a padded one and a mask, e.g. {name}.to_padded_tensor(0.0)")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}: make it dense, e.g. {name}.to_dense()")
    if tensor.dtype not in FLOATS:
        how = "dequantize" if tensor.is_quantized else "abs" if tensor.is_complex() else "float"
        wide = " of 16 to 64 bits" if tensor.is_floating_point() else ""
        raise TypeError(f"{name} is {tensor.dtype}: convert it to a float dtype{wide}, e.g. {name}.{how}()")


def flags(**given):
    for name, value in given.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}: give True or False")


def is_number(value) -> bool:
    """Whether it is one that a float can hold, infinities and NaN too."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, float) or -(2**1023) < value < 2**1023


def integer(value, name: str, least: int | None = 1, hint: str = ""):
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a {type(value).__name__}: give an integer{hint}")
    if least is not None and value < least:
        raise ValueError(f"{name} is {value}: give at least {least}{hint}")
    if value >= 2**63:
        raise ValueError(f"{name} is {value}: give an integer of 64 bits{hint}")


def source(generator, device) -> tuple:
    """Where random numbers are drawn, and by what: nothing for None, as that leaves a symbolic number of rows one."""
    if generator is None:
        return device, {}
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator is a {type(generator).__name__}: give a torch.Generator, e.g. torch.Generator().manual_seed(0)"
        )
    return generator.device, {"generator": generator}


def same_device(a, b, name_a: str, name_b: str):
    if a.device != b.device:
        raise ValueError(f"{name_a} is on {a.device}, {name_b} on {b.device}: move both to one device")


def boolean(mask, like, of: str, name: str = "mask", what: str = "what counts"):
    """A mask, on the device of `like`, the argument named `of`."""
    is_tensor(mask, name)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} is {mask.dtype}: pass a bool tensor, True for {what}, e.g. {name}.bool()")
    same_device(mask, like, name, of)


def not_empty(tensor, name: str):
    if tensor.numel() == 0:
        raise ValueError(f"{name} is empty, shape {tuple(tensor.shape)}: it needs at least one sample and one feature")


def finite(tensor, name: str):
    """Only under `debug_checks()`: elsewhere a NaN travels into the value, as in any PyTorch function."""
    if debugging() and not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} holds NaN or infinity (a check of debug_checks)")


def explained(name: str, function: Callable) -> Callable:
    """The same, where an error of capturing says what to do."""

    def run(*a):
        try:
            return function(*a)
        except RuntimeError as error:
            told = _of_capture(name, error)
            if told is None:
                raise
            raise told from error

    return run


def _of_capture(name: str, error: RuntimeError) -> RuntimeError | None:
    """What to do about an error inside the capture of a CUDA graph, where nothing can be compiled or loaded."""
    if "stream is capturing" not in str(error):
        return None
    return RuntimeError(
        f"{name} ran for the first time inside the capture of a CUDA graph, where its kernels cannot be compiled and "
        "loaded: run the step once before the capture, its backward pass included, as kd.warmup does"
    )
