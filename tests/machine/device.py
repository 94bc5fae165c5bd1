# SPDX-License-Identifier: Apache-2.0
"""A Triton driver whose device executes machine code on the CPU: `kernel[grid](cpu_tensors, ...)` runs as on a GPU.

    device = install(80)  # before the first launch; then every launch compiles for that architecture and runs here
    device.schedules = ...; device.launches

Compilation, specialisation, grids and arguments are Triton's own; only the driver and its launcher are ours.
"""

from __future__ import annotations

import os
import re
import struct

import torch
from cubin import KEPT, Cubin, MachineError
from emulator import SHARED_LIMIT, Function, memory_of
from emulator import Device as Executing

os.environ.setdefault("TRITON_CACHE_DIR", str(KEPT / "triton"))  # by content

import triton
from triton.backends.compiler import GPUTarget

INTEGERS = {f"{sign}{bits}": (bits // 8, sign == "i") for sign in "iu" for bits in (8, 16, 32, 64)}
FLOATS = {"fp32": "<f", "fp64": "<d"}


# Triton lets several lanes hold one value and store it to one word of shared memory. where they added it up in another
# order it differs by a rounding: which is kept is not defined, and each is right. elements that meet are global stores
REPLICAS = re.compile("two lanes store different values to one address, by [0-9a-f]+: (@.* )?STS")


class Launcher:
    """Made by Triton for a compiled kernel; called with the grid and every argument, constants too."""

    def __init__(self, device: Device, source, metadata):
        self.device, self.threads = device, 32 * metadata.num_warps
        self.signature = dict(source.signature)

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
        parameters, tensors = [], {}
        for name, kind, value in _flat(self.signature, dict(zip(self.signature, arguments, strict=True))):
            parameters.append(_packed(name, kind, value))
            if isinstance(value, torch.Tensor):
                tensors[name] = value
        # Triton's own scratch memory, which no kernel here uses
        missing = len(function.cubin.layout.parameters) - len(parameters)
        self.device.ran(function, (x, y, z), self.threads, parameters + missing * [bytes(8)], memory_of(tensors))


def _flat(kinds: dict, values: dict):
    """(name, kind, value) of what a kernel is given: the members of tuples, no constants."""
    for name, kind in kinds.items():
        if isinstance(kind, tuple):
            names = [f"{name}[{i}]" for i in range(len(kind))]
            yield from _flat(dict(zip(names, kind, strict=True)), dict(zip(names, values[name], strict=True)))
        elif kind != "constexpr":
            yield name, kind, values[name]


def _packed(name: str, kind: str, value) -> bytes:
    if kind.startswith("*"):
        return struct.pack("<Q", 0 if value is None else value.data_ptr())
    if kind in INTEGERS:
        size, signed = INTEGERS[kind]
        return int(value).to_bytes(size, "little", signed=signed)
    if kind in FLOATS:
        return struct.pack(FLOATS[kind], value)
    raise MachineError(f"the argument {name} has the type {kind}, which cannot be passed")


class Utils:
    """What Triton asks about the device, and how it loads a compiled kernel."""

    def __init__(self, device: Device):
        self.device = device

    def load_binary(self, name, binary, shared_bytes, _):
        function = Function(Cubin(name, binary), shared_bytes)
        return function, function, 0, 0, 1024  # the first stands for a module: without one Triton loads at each launch

    def get_device_properties(self, _):
        return {"max_shared_mem": SHARED_LIMIT[self.device.architecture], "multiprocessor_count": 1}

    def unload_module(self, _):
        pass


class Device(Executing):
    """Triton's active driver."""

    passes = REPLICAS

    def __init__(self, architecture: int):
        super().__init__(architecture)
        self.utils = Utils(self)

    def launcher_cls(self, source, metadata):
        return Launcher(self, source, metadata)

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self):
        return self.architecture  # Triton keeps what it has compiled for each device

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def is_active(self):
        return True

    def map_python_to_cpp_type(self, kind):
        return kind


def install(architecture: int) -> Device:
    device = Device(architecture)
    triton.runtime.driver.set_active(device)
    return device
