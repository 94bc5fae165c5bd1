# SPDX-License-Identifier: Apache-2.0
"""Uniform errors for shapes, dtypes and devices: each names the caller's argument and the fix.

No value of a CUDA tensor is read on the host unless `debug_checks()` is on; values of CPU tensors may be read.
"""

from __future__ import annotations

import contextlib
import sys
import warnings

import torch

_debug = False
# within vmap a tensor has no one value
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)


@contextlib.contextmanager
def debug_checks():
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


def floating(tensor, name: str):
    is_tensor(tensor, name)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} is {tensor.dtype}: convert it to a float dtype, e.g. {name}.float()")


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
