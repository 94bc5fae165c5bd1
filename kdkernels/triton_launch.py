# SPDX-License-Identifier: Apache-2.0
"""Launches that are settled once: the shapes of a call decide all but its tensors.

`kernel[grid](...)` looks at every argument of every launch to find the compiled kernel, 30 us for 30 of them, which
takes longer than the kernel of a small batch. A `Launch` goes that way once and then hands its arguments to the
compiled kernel, in the form that Triton documents: `compiled[grid](*arguments)`, constants among them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from triton.compiler import CompiledKernel
from triton.runtime import driver

PLANS = 256  # kept of each kind, the last used ones
ALIGNED = 15  # bits of an address that are 0 where Triton compiles wide accesses


def cdiv(a: int, b: int) -> int:
    """As `triton.cdiv`, which takes 2 us on the host."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least one that is n at least; as `triton.next_power_of_2`, which takes 2 us on the host."""
    return 1 << (n - 1).bit_length()


class Layout(NamedTuple):
    """Of a tensor, what a plan may follow; it keeps none alive."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def layout(t: torch.Tensor) -> Layout:
    return Layout(t.shape, t.stride(), t.dtype, t.device)


def on_device_of(method: Callable) -> Callable:
    """method(self, tensor, ...) where that tensor's device is the current one: launches go there. To see that it is
    takes less than `torch.cuda.device_of`."""

    def run(self, tensor, *rest):
        if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
            with torch.cuda.device_of(tensor):
                return method(self, tensor, *rest)
        return method(self, tensor, *rest)

    return run


class Launch:
    """A kernel, its grid, its constants (the last of its parameters) and options such as num_warps.

    Called with all other arguments, in their order. Only tensors and floats among them may differ from call to call,
    the tensors in nothing but where they are: whoever keeps a Launch keeps one for each device, dtype and integer, and
    makes the device of the tensors the current one.
    """

    __slots__ = ("_constants", "_grid", "_kernel", "_settled")

    def __init__(self, kernel: Any, grid: tuple[int, ...], **constants: Any):
        self._kernel, self._grid, self._constants, self._settled = kernel, (*grid, 1, 1)[:3], constants, None

    def __call__(self, *arguments: Any) -> None:
        if self._settled is not None:
            run, owner, places, last = self._settled
            if owner is driver.active:
                for k in places:
                    a = arguments[k]
                    if _misaligned(a) if isinstance(a, tuple) else a.data_ptr() & ALIGNED:
                        break
                else:
                    return run(*arguments, *last)
        compiled = self._kernel[self._grid](*arguments, **self._constants)
        # none where Triton interprets, or compiles later; without a module where it compiled and did not launch
        loaded = isinstance(compiled, CompiledKernel) and compiled.module is not None
        if loaded and not any(map(_misaligned, arguments)):
            places = [k for k, a in enumerate(arguments) if _points(a)]
            last = [self._constants[name] for name in self._kernel.arg_names[len(arguments) :]]
            self._settled = compiled[self._grid], driver.active, places, last


def _points(argument) -> bool:
    """Whether this is a tensor, or a tuple that has one."""
    return any(map(_points, argument)) if isinstance(argument, tuple) else isinstance(argument, torch.Tensor)


def _misaligned(argument) -> bool:
    if isinstance(argument, tuple):
        return any(map(_misaligned, argument))
    return isinstance(argument, torch.Tensor) and bool(argument.data_ptr() & ALIGNED)
