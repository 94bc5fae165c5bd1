# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of csrc/ on CPU tensors: the operators of the CUDA library, checks and choice of kernels included,
over stand-ins for the CUDA runtime and torch's CUDA build (machine/stand_ins/), whose launches run here.

    device = install(80)  # the backend "cuda" of the package takes CPU tensors from now on
    device.schedules = ...; device.shared_limit = ...; device.first_blocks = ...; device.launches

What is executed is the machine code in the library, the code that launches it is what the library launches with.
"""

from __future__ import annotations

import ctypes
import os
from copy import copy
from functools import cache
from pathlib import Path

import torch
from cubin import Cubin, MachineError, of_library, sections
from emulator import SHARED_LIMIT, Device, Function
from machine_build import core, cuda_on_machine

from kdkernels import backend, native
from kdkernels.rank import native_impl, torch_impl


class Range(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_void_p), ("size", ctypes.c_size_t), ("writable", ctypes.c_int)]


class Call(ctypes.Structure):
    """launches.h: Launch"""

    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_size_t),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("ranges", ctypes.POINTER(Range)),
        ("range_count", ctypes.c_int),
        ("operation", ctypes.c_uint),
    ]


RUN = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(Call))


@cache
def loaded(path: Path) -> ctypes.CDLL:
    """Its operators are those of CPU tensors from now on."""
    if native.has("cpu"):
        raise MachineError("the CPU library is loaded and has these operators: set KDK_NATIVE=0")
    torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path))


class Cuda(Device):
    """The device on which the library launches."""

    def __init__(self, architecture: int, library: Path):
        super().__init__(architecture)
        self.files, self.library = of_library(library, architecture), loaded(library)
        self.functions, self._operation, self._memory = {}, None, {}
        self._run = RUN(self._launch)
        self.shared_limit = SHARED_LIMIT[architecture]

    @property
    def shared_limit(self) -> int:
        """Bytes that a block may have: a device of fewer takes other kernels."""
        return self._shared_limit

    @shared_limit.setter
    def shared_limit(self, size: int):
        self._shared_limit = size
        self.library.machine_set_device(self._run, ctypes.c_int(self.architecture), ctypes.c_size_t(size))

    def function(self, name: str, shared: int) -> Function:
        if name not in self.functions:
            (file, *_) = (f for f in self.files if f".nv.info.{name}" in sections(f))
            self.functions[name] = Function(Cubin(name, file), 0)
        function = copy(self.functions[name])
        function.shared_bytes += shared
        return function

    def _launch(self, pointer) -> int | None:
        """What the runtime calls; where it fails, the address of the reason."""
        try:
            self._launched(pointer.contents)
        except Exception as error:
            self._reason = ctypes.create_string_buffer(f"{type(error).__name__}, {error}".encode())
            return ctypes.addressof(self._reason)
        return None

    def _launched(self, call: Call):
        if tuple(call.block[1:]) != (1, 1):
            raise MachineError("blocks of more than one dimension")
        function = self.function(call.kernel.decode(), call.shared)
        sizes = [size for _, size in function.cubin.layout.parameters]
        parameters = [ctypes.string_at(call.arguments[i], size) for i, size in enumerate(sizes)]
        grid = tuple(call.grid)
        self.ran(function, grid, call.block[0], parameters, self._regions(call))

    def _regions(self, call: Call) -> list:
        """Inputs are only read; results and workspace start as garbage and live as long as their operator runs."""
        if call.operation != self._operation:
            self._operation, self._memory = call.operation, {}
        for i in range(call.range_count):
            r = call.ranges[i]
            if (r.begin, r.size) not in self._memory:
                name = f"{'result or workspace' if r.writable else 'input'} {i}"
                self._memory[r.begin, r.size] = core().Region(name, r.begin, r.size, not r.writable, bool(r.writable))
                if r.writable:
                    ctypes.memmove(r.begin, os.urandom(r.size), r.size)
        return list(self._memory.values())


def install(architecture: int, library: Path | None = None) -> Cuda:
    """`library`: another than this checkout's."""
    device = Cuda(architecture, library or cuda_on_machine())
    obstacle = backend.obstacle
    backend.obstacle = lambda name, *rest, **more: None if name == "cuda" else obstacle(name, *rest, **more)
    # as of CUDA tensors
    native_impl.soft_sort_forward = lambda x, *how: torch_impl.of_sorted(native_impl.sort_forward, x, *how)
    native_impl.soft_sort_backward = lambda grad, s, order, start, kl: torch_impl.unsorted(
        native_impl.sort_backward(grad, s, start, kl), order
    )
    return device
