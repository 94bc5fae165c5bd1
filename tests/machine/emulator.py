# SPDX-License-Identifier: Apache-2.0
"""A compiled function, executed on the memory of CPU tensors under a schedule."""

from __future__ import annotations

import random
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

import torch
from cubin import Cubin, MachineError
from decode import functions
from machine_build import core

ARCHITECTURES = (80, 90)
MOST_BLOCKS, MOST_STEPS = 1 << 16, 400_000_000  # of one launch: blocks, and instructions of a warp (minutes)
STACK = 0x28  # in constant bank 0: where a lane's stack ends; its parts below are the block's and the grid's sizes
STACK_BYTES = 32768
SECTOR_BYTES = 32  # of a cache line
SM90_RESERVED = 1024  # bytes of shared memory before the kernel's own

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
    share: Share | None = None

    @property
    def step(self) -> int:
        return self.share.multiprocessors if self.share else 1

    def order(self, count: int) -> list[int]:
        """Of `count` blocks, each `step` of the grid."""
        blocks = [self.step * k for k in range(count)]
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


class Function:
    """A kernel whose every instruction is modelled; anything else is an error here, before it runs."""

    def __init__(self, cubin: Cubin, shared_bytes: int):
        if cubin.architecture not in ARCHITECTURES:
            raise MachineError(
                f"{cubin.name} is compiled for sm_{cubin.architecture}: what is modelled is "
                + ", ".join(f"sm_{a}" for a in ARCHITECTURES)
            )
        self.cubin, self.name = cubin, cubin.name
        self.shared_bytes = shared_bytes + (SM90_RESERVED if cubin.architecture >= 90 else 0)
        self.code = functions(cubin.listing)[cubin.name]
        self.program = core().Program()
        for line in self.code:
            self.program.add(line.pc, line.text, line.opcode, line.modifiers, line.guard, line.operands, line.target)

    def run(self, grid, threads: int, parameters: list[bytes], tensors: dict[str, torch.Tensor], schedule: Schedule):
        """One launch; `tensors` name the memory that it may touch. Returns a Launch or raises core().Fault."""
        blocks = len(range(0, grid[0] * grid[1] * grid[2], schedule.step))
        if blocks > MOST_BLOCKS:
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
        for name, storage in _storages(tensors).items():
            machine.add_global(name, storage.data_ptr(), storage.nbytes())
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
        bank[STACK : STACK + 4] = STACK_BYTES.to_bytes(4, "little")
        for value, (offset, size) in zip(parameters, layout.parameters, strict=True):
            if len(value) != size:
                raise MachineError(f"{self.name}: a parameter of {len(value)} bytes where {size} are declared")
            bank[layout.start + offset : layout.start + offset + size] = value
        return bytes(bank)


def _storages(tensors: dict[str, torch.Tensor]) -> dict:
    """The memory under tensors, each once: views share theirs."""
    found = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if storage.nbytes() and all(storage.data_ptr() != other.data_ptr() for other in found.values()):
            found[name] = storage
    return found
