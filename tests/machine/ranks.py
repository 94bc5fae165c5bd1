# SPDX-License-Identifier: Apache-2.0
"""Rows of every regime through every ranking kernel of the CUDA library, executed as machine code, against the float64
oracle of tests/simt:

    python tests/machine/ranks.py quick|long --architectures 80 90
    python tests/machine/ranks.py opcodes           only whether every instruction of the library is modelled
    python tests/machine/ranks.py float64           only how many instructions of float64 a row takes

Prints what each case launched. Returns 1 where a comparison fails or, after all cases, a kernel was never run.
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

os.environ["KDK_NATIVE"] = "0"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "simt"))

import cuda_device
import drive
import numpy as np
import torch
from cubin import listing, sections
from emulator import ARCHITECTURES, MOST_BLOCKS, SHARED_LIMIT, readable
from machine_build import core

FLOAT64 = ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


class Batch(NamedTuple):
    """How many rows a call has, the given ones over and over; which of them are looked at; what is executed."""

    rows: int
    first: int = 0
    all_blocks: bool = True
    shared_limit: int | None = None  # bytes: a device of fewer takes other kernels


def batch_of(schedule: str, R: int) -> Batch:
    if schedule == "auto":
        return Batch(R)
    if schedule == "warp":  # of so many rows, a warp takes each of up to 1,024
        return Batch(4096, all_blocks=False)
    if schedule == "warp again":  # those that warps take after their first ones: csrc's kGrid blocks of four
        return Batch((4 << 20) + R, 4 << 20, all_blocks=False)
    # rows go through workspace; "long again": blocks take three each, in the backward pass two (kOutsideGrid)
    return Batch(*{"long": (R, 0), "long again": (296 + R, 296)}[schedule], shared_limit=16)


class Module:
    """What tests/simt/module.cpp offers, by the operators of the package."""

    def __init__(self, device: cuda_device.Cuda):
        self.device, self.ops = device, torch.ops.kdkernels

    def reverse_blocks(self, on: bool):
        pass  # the machine's schedules do

    def _call(self, operator, arguments, out, schedule):
        """Fills the arrays `out`, [R, n] or [R], or None where nothing is wanted."""
        R, device = len(out[0]), self.device
        batch = batch_of(schedule, R)
        device.shared_limit = batch.shared_limit or SHARED_LIMIT[device.architecture]
        device.first_blocks = MOST_BLOCKS if batch.all_blocks else R
        if batch.rows > R:
            row = (torch.arange(batch.rows) - batch.first) % R
            arguments = [a[row] if isinstance(a, torch.Tensor) and len(a) == R else a for a in arguments]
        found = operator(*arguments)
        for array, tensor in zip(out, found if isinstance(found, tuple) else (found,), strict=True):
            if array is not None:
                bits = tensor.view(torch.int16) if array.dtype == np.uint16 else tensor
                array[...] = bits[batch.first : batch.first + R].numpy().view(array.dtype)

    def rank_rows(
        self, x, dtype, factors, strength, relative, kl, descending, out, blocks, eps, schedule, shared
    ):  # fmt: skip
        how = (_factors(factors), strength, relative, kl, descending, blocks is not None)
        self._call(self.ops.rank_rows, [_tensor(x, dtype), *how], (out, blocks, eps), schedule)

    def rank_rows_backward(self, grad, ranks, blocks, eps, kl, descending, dx, dtype, schedule, shared):
        tensors = [_tensor(grad), torch.zeros(grad.shape, dtype=DTYPES[dtype]), *map(_tensor, (ranks, blocks, eps))]
        self._call(self.ops.rank_rows_backward, [*tensors, kl, descending], (dx,), schedule)

    def sort_rows(self, s, dtype, factors, strength, relative, kl, value, start, eps, schedule, shared):
        how = (_factors(factors), strength, relative, kl)
        self._call(self.ops.sort_rows, [_tensor(s, dtype), *how], (value, start, eps), schedule)

    def sort_rows_backward(self, grad, s, start, kl, ds, dtype, schedule, shared):
        self._call(self.ops.sort_rows_backward, [_tensor(grad), _tensor(s, dtype), _tensor(start), kl], (ds,), schedule)

    def spearman_rows(self, x, y, dtype, strength, relative, kl, hard, value, dx, dy, schedule, shared):
        how = (strength, relative, kl, hard, dx is not None, dy is not None)
        self._call(self.ops.spearman_rows, [_tensor(x, dtype), _tensor(y, dtype), *how], (value, dx, dy), schedule)


def _tensor(array, dtype: str | None = None) -> torch.Tensor:
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(DTYPES[dtype])
    return torch.from_numpy(array)


def _factors(factors):
    return None if factors is None else torch.from_numpy(factors)


# schedule, n, ops (ranks, sorts, Spearman), settings, few rows, first setting: each continues where the last one
# stopped, so that strengths and dtypes come up with every kernel
QUICK = [
    ("auto", 1, "rsp", 2, False, 0),
    ("auto", 33, "rsp", 3, False, 2),
    ("warp", 130, "rs", 1, True, 5),
    ("warp", 1000, "rs", 1, True, 8),
    ("auto", 1000, "rsp", 1, True, 9),
    ("auto", 1030, "p", 1, True, 6),
    ("long", 67, "rsp", 2, True, 4),
]
LONG = [
    *((schedule, n, "rsp", 11, False, n) for schedule, n in (("auto", 2), ("auto", 32), ("auto", 128), ("auto", 129))),
    *(("warp", n, "rs", 4, True, n) for n in (129, 512, 513, 1024)),
    *(("auto", n, "rsp", 4, True, n) for n in (1000, 1024, 1025)),
    *(("auto", n, "rs", 4, True, n) for n in (4096, 4097)),
    *(("long", n, "rsp", 4, True, n) for n in (1, 129, 1025)),
    ("long", 65, "rs", 1, True, 34),  # kl in float64
    ("warp again", 2, "rs", 1, True, 0),
    ("long again", 9, "rs", 1, True, 0),
    ("auto", 12289, "rs", 2, True, 0),
    ("auto", 21841, "r", 1, True, 3),
    ("auto", 23552, "r", 1, True, 0),  # the longest of a block, in three rounds of leaves
    ("auto", 24577, "r", 4, True, 0),
]


def compared(device: cuda_device.Cuda, cases, names: set[str]):
    for case in cases:
        start = time.monotonic()
        device.launches.clear()
        drive.sweep(Module(device), *case)
        ran = {launch.function.cubin.name for launch in device.launches}
        names -= ran
        steps = sum(launch.steps for launch in device.launches)
        print(
            f"{case[0]} {case[1]} {case[2]} on sm_{device.architecture}: {len(device.launches)} launches of"
            f" {', '.join(sorted(map(readable, ran)))}; {steps} instructions; {time.monotonic() - start:.0f} s",
            flush=True,
        )


def kernels(device: cuda_device.Cuda) -> set[str]:
    """All of the library, but for the one with which cub asks what it was compiled for."""
    found = {name.removeprefix(".nv.info.") for file in device.files for name in sections(file) if ".nv.info._" in name}
    return {name for name in found if "EmptyKernel" not in name}


def unknown(device: cuda_device.Cuda) -> list[str]:
    """What is said of the instructions of the library that are not in the machine's table."""
    said = set()
    for file in device.files:
        for name in set(re.findall(r"^\s+/\*[0-9a-f]{4,6}\*/\s+(?:@\S+ )?\s*([\w.]+)", listing(file), re.MULTILINE)):
            opcode, *modifiers = name.split(".")
            try:
                core().Program().add(0, name, opcode, modifiers, None, [], 0)
            except core().Fault as fault:
                said.add(str(fault))
    return sorted(said)


def float64_of_a_row(device: cuda_device.Cuda, n: int = 1000) -> str:
    """Instructions that compute or convert float64, of a warp that ranks a row at strength "auto" and goes back; rows
    that share a block of the ranks."""
    device.first_blocks, rows = 8, 4096
    device.launches.clear()
    x = torch.randn((rows, n), generator=torch.Generator().manual_seed(0))
    ranks, blocks, eps = torch.ops.kdkernels.rank_rows(x, None, 1.0, True, False, False, True)
    device.first_blocks = 2  # of four rows, which have ranks
    torch.ops.kdkernels.rank_rows_backward(x, x, ranks, blocks, eps, False, False)
    found = 0.0
    for launch, first_blocks in zip(device.launches, (8, 2), strict=True):
        executed = first_blocks * rows / launch.grid[0]
        for line, count in zip(launch.function.code, launch.counts, strict=True):
            found += count / executed * (line.opcode in FLOAT64 or "F64" in line.modifiers)
    return f"{found:.0f}, {rows // device.launches[0].grid[0]} to a block"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("which", choices=("opcodes", "float64", "quick", "long"))
    parser.add_argument("--architectures", nargs="+", type=int, default=ARCHITECTURES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = True
    for architecture in options.architectures:
        device = cuda_device.install(architecture)
        left, lacking = kernels(device), unknown(device)
        print(f"not modelled on sm_{architecture}: {'; '.join(lacking) or 'none'}", flush=True)
        if options.which == "float64":
            print(f"float64 instructions a row on sm_{architecture}: {float64_of_a_row(device)}", flush=True)
        compared(device, {"quick": QUICK, "long": QUICK + LONG}.get(options.which, []), left)
        if options.which in ("quick", "long"):
            print(f"never run on sm_{architecture}: {', '.join(sorted(map(readable, left))) or 'none'}")
        kept &= not lacking and (options.which != "long" or not left)
    return int(not kept)


if __name__ == "__main__":
    sys.exit(main())
