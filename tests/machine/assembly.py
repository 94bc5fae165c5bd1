# SPDX-License-Identifier: Apache-2.0
"""Small programs written as disassembly, for tests of single instructions and of faults that no compiler makes."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from decode import Control
from emulator import Function, Schedule, memory_of

IN_TURN = Schedule()
START = 0x160  # of the parameters: the tensors' addresses, 8 bytes each


def assembled(
    text: str, shared_bytes: int = 0, architecture: int = 80, tensors: int = 2, registers: int = 32, constants=None
) -> Function:
    """A line may end with fields of its control code: LDS R0, [R0] // stall=2 writes=0"""
    lines = [line.strip() for line in text.strip().splitlines()]
    listing = "\n".join(_listed(16 * i, *line.partition("//")[::2]) for i, line in enumerate(lines))
    layout = SimpleNamespace(start=START, size=8 * tensors, parameters=[(8 * i, 8) for i in range(tensors)])
    like_cubin = SimpleNamespace(
        name="written", architecture=architecture, layout=layout, constants=constants or {}, registers=registers,
        shared_bytes=0,
        listing=f"Function : written\n{listing}",
    )  # fmt: skip
    return Function(like_cubin, shared_bytes)


def _listed(pc: int, text: str, codes: str) -> str:
    control = Control(**{name: int(value) for name, value in (code.split("=") for code in codes.split())})
    return f"        /*{pc:04x}*/   {text} ;  /* 0x0 */\n        /* 0x{control.word():016x} */"


def run(function: Function, *tensors: torch.Tensor, grid=(1, 1, 1), threads: int = 32, schedule=IN_TURN):
    addresses = [t.data_ptr().to_bytes(8, "little") for t in tensors]
    memory = memory_of({f"tensor {i}": t for i, t in enumerate(tensors)})
    return function.run(grid, threads, addresses, memory, schedule)


ROW = """
    S2R R0, SR_TID.X
    IMAD.WIDE R2, R0, 0x10, c[0x0][0x160]
    LDG.E.128 R4, [R2.64]
    {}
    IMAD.WIDE R2, R0, 0x8, c[0x0][0x168]
    STG.E.64 [R2.64], R8
    EXIT
"""


def of_each_lane(lines: str, inputs: torch.Tensor) -> torch.Tensor:
    """inputs [32, 4] int32 in R4 to R7 -> [32, 2], what `lines` left in R8 and R9."""
    out = torch.zeros(32, 2, dtype=torch.int32)
    launch = run(assembled(ROW.format(lines.replace(";", "\n"))), inputs, out)
    assert not launch.reports
    return out
