# SPDX-License-Identifier: Apache-2.0
"""The kernels of micro.cu: cycles that an iteration takes, on a GPU and on the model."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import NamedTuple

import torch
from cubin import Cubin
from emulator import Function, memory_of
from machine_build import core

from .built import compiled
from .multiprocessor import SHARE, play
from .rates import COSTS, H200, Cost, Machine

SPINNING = 1 << 22  # cycles
FEW, MANY = (12, 24), (256, 1280)  # iterations: of the model, of a GPU


class Micro(NamedTuple):
    kernel: str
    entry: str  # that its time determines: MUFU.latency of the table's rows, dram of Rates
    threads: int = 32
    blocks: int = 1


# each after those whose entries its time depends on, too
MICROS = (
    Micro("chain_product", "branch"),
    Micro("chain_special", "MUFU.latency"),
    Micro("chain_special", "MUFU.interval", threads=1024),
    Micro("chain_shuffle", "SHFL.latency"),
    Micro("chain_shared", "LDS.latency"),
    Micro("chain_barrier", "barrier"),
    Micro("chain_l1", "l1"),
    Micro("chain_l2", "l2"),
    Micro("chain_dram", "dram"),
    Micro("stream_l2", "l2_bytes", threads=256, blocks=8 * 132),
    Micro("stream_dram", "dram_bytes", threads=256, blocks=8 * 132),
)


def floats(micro: Micro, most: int) -> int:
    """Of the memory that a kernel reads, at its largest number of iterations."""
    streamed = micro.blocks * micro.threads * 4 * most
    return max(streamed if micro.blocks > 1 else 0, 16 * 1024 * 2 * most, 1 << 20)


@cache
def traced(micro: Micro, iterations: int):
    function = Function(Cubin(micro.kernel, compiled("micro.cu", 90)), 0)
    read, out = torch.zeros(floats(micro, FEW[1])), torch.zeros(1024)
    values = [iterations.to_bytes(4, "little"), *(t.data_ptr().to_bytes(8, "little") for t in (read, out))]
    values = values[: len(function.cubin.layout.parameters)]
    return function.run((micro.blocks, 1, 1), micro.threads, values, memory_of({"read": read, "out": out}), SHARE)


def predicted(micro: Micro, model: Machine = H200, costs: tuple[Cost, ...] = COSTS) -> float:
    """Cycles of an iteration on the model."""
    few, many = (play(core(), traced(micro, n), model, costs).cycles for n in FEW)
    return (many - few) / (FEW[1] - FEW[0])


class Gpu:
    """Launches of micro.cu on the current device."""

    def __init__(self):
        torch.cuda.init()
        self.stream = torch.cuda.current_stream()
        self.cuda = ctypes.CDLL("libcuda.so.1")
        self.module = ctypes.c_void_p()
        torch.zeros(1, device="cuda")  # makes the context current
        self._ask("cuModuleLoadData", ctypes.byref(self.module), compiled("micro.cu", 90))
        self.clock = SPINNING / self._seconds(Micro("spin", ""), SPINNING, torch.zeros(1, device="cuda"))

    def _ask(self, name: str, *arguments):
        if status := getattr(self.cuda, name)(*arguments):
            raise RuntimeError(f"{name} failed with {status}")

    def _seconds(self, micro: Micro, iterations: int, read: torch.Tensor) -> float:
        """The fastest of some launches."""
        function, out = ctypes.c_void_p(), torch.zeros(1024, device="cuda")
        self._ask("cuModuleGetFunction", ctypes.byref(function), self.module, micro.kernel.encode())
        values = [ctypes.c_int(iterations), ctypes.c_void_p(read.data_ptr()), ctypes.c_void_p(out.data_ptr())]
        pointers = (ctypes.c_void_p * 3)(*(ctypes.cast(ctypes.byref(v), ctypes.c_void_p) for v in values))
        sizes = [micro.blocks, 1, 1, micro.threads, 1, 1, 0]
        times = []
        for _ in range(20):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.empty(1 << 27, device="cuda").zero_()  # nothing of `read` is left in L2
            start.record()
            self._ask("cuLaunchKernel", function, *sizes, ctypes.c_void_p(self.stream.cuda_stream), pointers, None)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e-3)
        return min(times)

    def measured(self, micro: Micro) -> float:
        """Cycles of an iteration."""
        read = torch.zeros(floats(micro, MANY[1]), device="cuda")
        few, many = (self._seconds(micro, n, read) for n in MANY)
        return (many - few) / (MANY[1] - MANY[0]) * self.clock
