# SPDX-License-Identifier: Apache-2.0
"""The package's own contract of an op's Triton or CUDA kernels, executed as machine code:

    python tests/machine/contract.py mixup soft_rank --architectures 80 90 --checks accuracy,twice
    python tests/machine/contract.py              every op that has such kernels, for every architecture

The launches take the schedules in turn. Prints what failed, and per op how much ran; returns 1 where anything failed.
"""

import argparse
import os
import sys
import time

os.environ["KDK_NATIVE"] = "0"  # the operators of the CUDA library take the place of the CPU library's

import cuda_device
import device as triton_device
import torch
from emulator import ARCHITECTURES, SCHEDULES, Device

from kdkernels import backend, testing
from kdkernels.registry import OPS


def allow_cpu_tensors():
    """The backend "triton" takes CPU tensors, as under Triton's interpreter, and bfloat16 too."""

    def obstacle(device: str, dtypes):
        return "the Triton kernels compute in float32 and the input is float64" if torch.float64 in dtypes else None

    backend._triton_obstacle = obstacle


def kinds_of(op: str, asked=("cuda", "triton")) -> list[str]:
    """The backends whose kernels are executed."""
    return [kind for kind in asked if kind in OPS[op].backends]


def install(kind: str, architecture: int) -> Device:
    return (cuda_device if kind == "cuda" else triton_device).install(architecture)


def ran(device: Device, kind: str, op: str, checks: list[str], quick: bool) -> bool:
    start, done, failed = time.monotonic(), 0, []
    device.launches.clear()
    for result in testing.measure(op, kind, "cpu", quick=quick, checks=checks):
        done += 1
        if not result.ok:
            failed.append(result)
            print(f"FAILED {result.check}: {result.case}: {result.error:.2e} > {result.budget:.2e} {result.note}")
    names = sorted({launch.function.name for launch in device.launches})
    steps = sum(launch.steps for launch in device.launches)
    print(
        f"{op} on sm_{device.architecture}: {kind}, {done} measurements, {len(failed)} failed;"
        f" {len(device.launches)} launches of {', '.join(names)}; {steps} instructions;"
        f" {time.monotonic() - start:.0f} s",
        flush=True,
    )
    return bool(done and device.launches and not failed)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "ops", nargs="*", default=[op.name for op in OPS.values() if {"triton", "cuda"} & {*op.backends}]
    )
    parser.add_argument("--architectures", nargs="+", type=int, default=ARCHITECTURES)
    parser.add_argument("--checks", default="accuracy")
    parser.add_argument("--backends", nargs="+", default=["cuda", "triton"], choices=["cuda", "triton"])
    parser.add_argument("--all", action="store_true", help="every combination of options, not the quick ones")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    checks = options.checks.split(",")
    allow_cpu_tensors()
    kept = True
    for architecture in options.architectures:
        kinds = {op: kinds_of(op, options.backends) for op in options.ops}
        devices = {kind: install(kind, architecture) for kind in sorted(set(sum(kinds.values(), [])))}
        for device in devices.values():
            if checks != ["accuracy"]:  # they compare two calls: the rounding of products must not change between them
                device.schedules = tuple(s for s in SCHEDULES if not s.truncated_sums)
        for op in options.ops:
            for kind in kinds[op]:
                kept &= ran(devices[kind], kind, op, checks, not options.all)
    return int(not kept)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
