# SPDX-License-Identifier: Apache-2.0
"""A function of machine code as the model of cycles.h takes it: its costs, and how many blocks are resident."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

from emulator import Schedule, Share, Warps

from ..machine import ROOT
from .rates import COSTS, H200, PIPES, Cost, Effect, Machine, tensor

# two rows of one version were played by the same rules on the same table
PARTS = (Path(__file__), Path(__file__).with_name("rates.py"), ROOT / "tests" / "machine" / "core" / "cycles.h")
VERSION = hashlib.sha256(b"".join(path.read_bytes() for path in PARTS)).hexdigest()[:8]
NO_SCOREBOARD, PRODUCTS = 7, 6  # products of a warpgroup have a scoreboard of their own
SM90_RESERVED = 1024


class Operation(NamedTuple):
    """cycles.h's Operation."""

    stall: int
    yields: bool
    writes: int
    reads: int
    waits: int
    pipes: int
    interval: float
    latency: int
    effect: Effect
    scoreboard: int = NO_SCOREBOARD
    left: int = 0


@cache
def by_opcode(costs: tuple[Cost, ...]) -> dict[str, Cost]:
    return {opcode: cost for cost in costs for opcode in cost.opcodes.split()}


def operation(line, costs: tuple[Cost, ...] = COSTS) -> Operation:
    """Of a decoded instruction; KeyError where the table has no row for it."""
    try:
        cost = by_opcode(costs)[line.opcode]
    except KeyError:
        raise KeyError(f"{line.opcode} has no row in bench/model/rates.py: {line.text}") from None
    pipes = sum(1 << PIPES.index(pipe) for pipe in cost.pipes.split())
    interval = tensor(line.opcode, line.modifiers) if "tensor" in cost.pipes else cost.interval
    return Operation(*line.control, pipes, interval, cost.latency, *_effect(line, cost.effect))


def _effect(line, effect: Effect) -> tuple[Effect, int, int]:
    """(effect, scoreboard, how many may be left), by the operands where they say it."""
    if effect is Effect.WAIT and len(line.operands) > 1:  # DEPBAR.LE SB0, 0x1
        return effect, line.operands[0].index, line.operands[1].value
    if effect is Effect.PRODUCT_WAIT and "DEPBAR" in line.modifiers:  # WARPGROUP.DEPBAR.LE gsb0, 0x0
        return Effect.WAIT, PRODUCTS, line.operands[1].value
    if effect is Effect.PRODUCT:  # the last of a group names its barrier
        return effect, PRODUCTS, int(any(o.kind.name == "NONE" for o in line.operands[2:]))
    return Effect.NONE if effect in (Effect.WAIT, Effect.PRODUCT_WAIT) else effect, NO_SCOREBOARD, 0


class Occupancy(NamedTuple):
    blocks: int  # resident on a multiprocessor
    warps: int
    limit: str  # what allows no more


def occupancy(function, warps: int, machine: Machine = H200) -> Occupancy:
    """How many blocks of a function, of so many warps, fit on a multiprocessor."""
    of_warp = -(-32 * function.cubin.registers // 256) * 256
    shared = _shared(function)
    fits = {
        "registers": 4 * (machine.registers // 4 // max(256, of_warp)) // warps,
        "shared memory": machine.shared_bytes // shared,
        "warps": machine.warps // warps,
        "blocks": machine.blocks,
    }
    limit = min(fits, key=fits.get)
    if not fits[limit]:
        raise ValueError(f"{function.name}: no block of {warps} warps fits: {limit}")
    return Occupancy(fits[limit], fits[limit] * warps, limit)


def _shared(function) -> int:
    """Of a block, with the 1,024 bytes that the system takes, which the code of sm_90 counts itself."""
    return -(-(function.shared_bytes + (0 if function.cubin.architecture >= 90 else SM90_RESERVED)) // 128) * 128


def l1_bytes(function, warps: int, machine: Machine = H200) -> int:
    """What shared memory leaves of L1 to each resident block."""
    blocks = occupancy(function, warps, machine).blocks
    return (machine.l1_and_shared_bytes - blocks * _shared(function)) // blocks


# warps go on in any order, as L1 sees them
SHARE = Schedule(warps=Warps.RANDOM, share=Share(H200.rates.multiprocessors, l1_bytes))


def play(core, launch, machine: Machine = H200, costs: tuple[Cost, ...] = COSTS):
    """cycles.h's Played of a traced launch."""
    function = launch.function
    program = [operation(line, costs) for line in function.code]
    resident = occupancy(function, launch.trace.warps, machine).blocks
    return core.play(launch.trace, program, machine.rates, resident)
