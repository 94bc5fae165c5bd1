# SPDX-License-Identifier: Apache-2.0
"""A compiled function, executed on the memory of CPU tensors under a schedule."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

import torch
from cubin import Cubin, MachineError
from decode import functions
from machine_build import core

ARCHITECTURES = (80, 90)  # unless others are asked for
MOST_BLOCKS, MOST_STEPS = 1 << 16, 400_000_000  # of one launch: blocks, and instructions of a warp (minutes)
# in constant bank 0: the block's and the grid's sizes from its start on, where shared memory lies among the addresses
# of any memory (sm_80), and where a lane's stack ends
WINDOW, STACK = 0x18, 0x28
STACK_BYTES = 32768
SECTOR_BYTES = 32  # of a cache line
SM90_RESERVED = 1024  # bytes of shared memory before the kernel's own
SHARED_LIMIT = {80: 166912, 86: 101376, 90: 232448}  # bytes a block may ask for, of what is modelled

Lanes = IntEnum("Lanes", "LOWEST HIGHEST RANDOM", start=0)  # of a diverged warp: whose pc goes first
Warps = IntEnum("Warps", "IN_TURN REVERSED RANDOM", start=0)  # up to the next barrier, or step by step


class Share(NamedTuple):
    """The blocks that one multiprocessor gets are run alone, without looking for races, and traced for bench/model."""

    multiprocessors: int
    l1_bytes: Callable[[Function, int], int]  # that a block has; of a function and its warps


class Schedule(NamedTuple):
    blocks: str = "forward"  # or reversed, random
    warps: Warps = Warps.IN_TURN
    lanes: Lanes = Lanes.LOWEST
    early: bool = False  # asynchronous copies and products end when issued, not when waited for
    truncated_sums: bool = False  # of tensor cores: terms aligned to the largest and cut, not exact
    seed: int = 1
    first_blocks: int = MOST_BLOCKS  # only so many are executed
    share: Share | None = None

    @property
    def step(self) -> int:
        return self.share.multiprocessors if self.share else 1

    def order(self, count: int) -> list[int]:
        """Of `count` blocks, each `step` of the grid."""
        blocks = [self.step * k for k in range(min(count, self.first_blocks))]
        if self.blocks == "random":
            random.Random(self.seed).shuffle(blocks)
        return blocks[::-1] if self.blocks == "reversed" else blocks


SCHEDULES = (
    Schedule(),
    Schedule("reversed", Warps.REVERSED, early=True),
    Schedule("random", Warps.RANDOM, Lanes.RANDOM),
    Schedule("random", Warps.RANDOM, Lanes.HIGHEST, early=True),
    Schedule("reversed", truncated_sums=True),
)


class Launch(NamedTuple):
    """What was seen in one launch."""

    function: Function
    grid: tuple[int, int, int]
    steps: int  # instructions of warps
    reports: dict[str, int]  # of races and the like: how often
    counts: list[int]  # executions of each instruction
    trace: object  # of the schedule's share, for bench/model; or None


def readable(symbol: str) -> str:
    """rank_rows_kernel<fLi32ELi4E> of a mangled name; another one as it is."""
    mangled = re.match(r"_ZN(?:\d+\w+?)*?\d+([A-Za-z_]+)I(.*?)EEv", symbol)
    return f"{mangled[1]}<{mangled[2][:24]}>" if mangled else symbol


class Function:
    """A kernel whose every instruction is modelled; anything else is an error here, before it runs."""

    def __init__(self, cubin: Cubin, shared_bytes: int):
        if cubin.architecture not in SHARED_LIMIT:
            raise MachineError(
                f"{cubin.name} is compiled for sm_{cubin.architecture}: what is modelled is "
                + ", ".join(f"sm_{a}" for a in SHARED_LIMIT)
            )
        self.cubin, self.name = cubin, readable(cubin.name)
        reserved = SM90_RESERVED if cubin.architecture >= 90 else 0
        self.shared_bytes = max(cubin.shared_bytes, reserved) + shared_bytes
        self.code = functions(cubin.listing)[cubin.name]
        self.program = core().Program()
        for line in self.code:
            self.program.add(line.pc, line.text, line.opcode, line.modifiers, line.guard, line.operands, line.target)

    def run(self, grid, threads: int, parameters: list[bytes], memory: list, schedule: Schedule):
        """One launch; `memory` holds the core().Regions that it may touch. Returns a Launch or raises core().Fault."""
        blocks = len(range(0, grid[0] * grid[1] * grid[2], schedule.step))
        if min(blocks, schedule.first_blocks + 1) > MOST_BLOCKS:
            raise MachineError(f"{self.name}: a grid of {blocks} blocks is too large to emulate, {MOST_BLOCKS} go")
        if threads % 32:
            raise MachineError(f"{self.name}: {threads} threads a block: only whole warps are modelled")
        machine = core().Machine(
            self.program, schedule.lanes, schedule.warps, schedule.early, schedule.truncated_sums,
            schedule.seed,
        )  # fmt: skip
        machine.set_constants(0, self._bank(grid, threads, parameters))
        for bank, data in self.cubin.constants.items():
            machine.set_constants(bank, data)
        share = schedule.share
        trace = machine.start_trace(share.l1_bytes(self, threads // 32) // SECTOR_BYTES) if share else None
        for region in memory:
            machine.add_global(region)
        try:
            machine.run(grid, threads // 32, self.shared_bytes, schedule.order(blocks), MOST_STEPS)
        except core().Fault as fault:
            raise core().Fault(f"{self.name}: {fault}; {schedule}") from None
        return Launch(self, grid, machine.steps, machine.reports, machine.counts, trace)

    def _bank(self, grid, threads: int, parameters: list[bytes]) -> bytes:
        layout = self.cubin.layout
        bank = bytearray(layout.start + layout.size)
        for i, size in enumerate((threads, 1, 1, *grid)):
            bank[4 * i : 4 * i + 4] = size.to_bytes(4, "little")
        bank[WINDOW : WINDOW + 8] = core().SHARED_WINDOW.to_bytes(8, "little")
        bank[STACK : STACK + 4] = STACK_BYTES.to_bytes(4, "little")
        for value, (offset, size) in zip(parameters, layout.parameters, strict=True):
            if len(value) != size:
                raise MachineError(f"{self.name}: a parameter of {len(value)} bytes where {size} are declared")
            bank[layout.start + offset : layout.start + offset + size] = value
        return bytes(bank)


def memory_of(tensors: dict[str, torch.Tensor]) -> list:
    """The memory under tensors, each once: views share theirs."""
    found = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if storage.nbytes() and all(storage.data_ptr() != other.data_ptr() for other in found.values()):
            found[name] = storage
    return [core().Region(name, storage.data_ptr(), storage.nbytes()) for name, storage in found.items()]


class Report(AssertionError):
    """A launch that ended, in which two accesses had no order, or memory was read before it was written."""


class Device:
    """Launches take the schedules in turn; one with reports raises."""

    passes: re.Pattern = re.compile(r"(?!)")  # reports that are none

    def __init__(self, architecture: int):
        if architecture not in SHARED_LIMIT:
            raise MachineError(f"sm_{architecture} is not modelled: {', '.join(f'sm_{a}' for a in SHARED_LIMIT)} are")
        self.architecture, self.launches = architecture, []
        self.schedules, self.first_blocks = SCHEDULES, MOST_BLOCKS
        self.restart()

    def restart(self):
        """As if nothing had been launched."""
        self._number = itertools.count(1)
        self.launches.clear()

    def ran(self, function: Function, *how):
        number = next(self._number)
        schedule = self.schedules[number % len(self.schedules)]._replace(seed=number, first_blocks=self.first_blocks)
        launch: Launch = function.run(*how, schedule)
        self.launches.append(launch)
        lines = [line for line in launch.reports if not self.passes.match(line)]
        if lines:
            raise Report(f"{function.name}, {len(lines)} reports: {'; '.join(lines[:3])}; {schedule}")
