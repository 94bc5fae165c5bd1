# SPDX-License-Identifier: Apache-2.0
"""The rows of `python -m bench model`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import contract
import cuda_device
import device
import torch
from machine_build import core

from kdkernels.gram.triton_impl import small

from .. import machine
from . import lines
from .built import PACKAGE, Compiled, library
from .cases import Case, Work, cases, plausible_memory
from .incumbent import NotToBeHad
from .multiprocessor import SHARE, VERSION, occupancy, play
from .rates import H200, Machine

WIDTH = 58  # of the column of names
IDLE = ("pipe", "queue", "scoreboard", "stall", "barrier", "no warp")  # cycles.h's Idle


def run(options) -> int:
    chosen = [case for case in cases() if options.case in " ".join([*case[:3], *case.kernels])]
    if not chosen:
        print(f"no case, type or kernel has {options.case!r} in its name", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    contract.allow_cpu_tensors()
    devices = installed({case.backend for case in chosen}, options.architecture)
    others = {_key(row): row for row in of_checkout(options)} if options.against else {}
    shared = machine.provenance("cpu", PACKAGE)
    print(head(options.architecture))
    for case in chosen:
        try:
            rows = predicted(devices[case.backend], case)
        except NotToBeHad as error:
            print(f"{case.name} {case.shape} {case.dtype}: not modelled: {error}", flush=True)
            continue
        for row in (shared | row for row in rows):
            print(shown(row, options.lines), flush=True)
            pair = [row, others[_key(row)]] if _key(row) in others else [row]
            if len(pair) == 2:
                print(compared(*pair), flush=True)
            if options.out:
                write(options.out, pair)
    return 0


def write(path: str, rows: list[dict]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _key(row: dict) -> tuple:
    return row["case"], row["shape"], row["dtype"], row["kernel"]


# the package of one checkout under the bench and the emulator of another
OTHER = """
import sys
package, bench, *arguments = sys.argv[1:]
sys.path.insert(0, package)
import kdkernels
sys.path.insert(0, bench)
from bench.__main__ import main
sys.exit(main(arguments))
"""


def of_checkout(options) -> list[dict]:
    """The rows of the package in another checkout, on this model; what fails there is said and has no row."""
    package = Path(options.against).resolve()
    if not (package / "kdkernels" / "__init__.py").is_file():
        raise SystemExit(f"--against {options.against}: no folder kdkernels there")
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows"
        rows.touch()
        arguments = ["model", "--case", options.case, "--architecture", str(options.architecture), "--out", str(rows)]
        command = [sys.executable, "-c", OTHER, str(package), str(machine.ROOT), *arguments]
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, env={**os.environ, "KDK_NATIVE": "0"}
        )
        if done.returncode:
            print(f"--against: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return [json.loads(line) for line in rows.read_text().splitlines()]


def installed(backends: set[str], architecture: int) -> dict:
    """What executes each backend's kernels, a share of each launch."""
    devices = {}
    if "triton" in backends:
        small.machine = lambda device: (H200.rates.multiprocessors, H200.shared_bytes - 1024)  # a grid by its size
        devices["triton"] = device.install(architecture)
    if "cuda" in backends:
        devices["cuda"] = cuda_device.install(architecture, library(PACKAGE))
    if "nvcc" in backends:
        devices["nvcc"] = Compiled(architecture)
    for made in devices.values():
        made.schedules = (SHARE,)
    return devices


def predicted(on, case: Case) -> list[dict]:
    """A row for the first launch of each wanted kernel of a case, in their order."""
    on.restart()
    with plausible_memory():
        case.call(on)
    first, count = {}, Counter(map(_name, on.launches))
    for launch in on.launches:
        first.setdefault(_name(launch), launch)
    rows = [
        row_of(launch, case, H200) | {"launches": count[name]} for name, launch in first.items() if name in case.kernels
    ]
    missing = case.kernels.keys() - {row["kernel"] for row in rows}
    if missing:
        raise RuntimeError(f"{case.name} {case.dtype} did not launch {', '.join(sorted(missing))}")
    return rows


def _name(launch) -> str:
    """Without the parameters of a template."""
    return launch.function.name.partition("<")[0]


def row_of(launch, case: Case, model: Machine) -> dict:
    function, trace = launch.function, launch.trace
    played = play(core(), launch, model)
    return {
        "kind": "model",
        "modelled": model.name, "version": VERSION,
        "architecture": function.cubin.architecture,
        "case": case.name, "shape": case.shape, "dtype": case.dtype, "kernel": _name(launch),
        "grid": launch.grid, "blocks": trace.blocks, "warps": trace.warps, "registers": function.cubin.registers,
        "shared": function.shared_bytes, "resident": occupancy(function, trace.warps, model)._asdict(),
        "cycles": played.cycles, "microseconds": played.cycles / model.clock * 1e6,
        **floors(case.kernels[_name(launch)], model),
        "instructions": played.issued, "issue_rate": played.issued / played.cycles,
        "wavefronts": played.wavefronts, "l2_bytes": played.l2_bytes, "dram_bytes": played.dram_bytes,
        "idle": {name: cycles / played.cycles / 4 for name, cycles in zip(IDLE, played.idle, strict=True)},
        "phases": phases(function, played), "function": function.cubin.name,
    }  # fmt: skip


def floors(work: Work, model: Machine) -> dict:
    """Microseconds below which no kernel of this machine can be: of DRAM, and of the pipes."""
    rates = model.rates
    cycles_a_second = rates.multiprocessors * model.clock
    return {
        "memory_floor": work.bytes / (rates.dram_bytes * cycles_a_second) * 1e6,
        "arithmetic_floor": work.operations / (getattr(model, work.rate) * cycles_a_second) * 1e6,
    }


def phases(function, played) -> list[dict]:
    """By the functions of the source that instructions come from, most instructions first."""
    where = lines.of_instructions(function.cubin.binary, function.cubin.name)
    found: dict[str, dict] = {}
    for line, of in zip(function.code, played.instructions, strict=True):
        frames = where.get(line.pc, [])
        name = lines.phase(frames)
        phase = found.setdefault(name, {"phase": name, "instructions": 0, "lanes": 0, "waited": 0, "lines": {}})
        phase["instructions"] += of.executions
        phase["lanes"] += of.lanes
        phase["waited"] += of.waited
        if frames and of.executions:
            at = f"{frames[0].file}:{frames[0].number}"
            phase["lines"][at] = phase["lines"].get(at, 0) + of.executions
    for phase in found.values():
        phase["lanes"] /= max(1, phase["instructions"])  # active ones, of 32
        phase["lines"] = dict(sorted(phase["lines"].items(), key=lambda item: -item[1])[:5])
    return sorted((p for p in found.values() if p["instructions"]), key=lambda p: -p["instructions"])


def head(architecture: int) -> str:
    return (
        f"MODEL {VERSION}, not measured: {H200.name}, code for sm_{architecture}, {machine.now()[:10]}\n"
        f"{'':{WIDTH}}{'us':>7}{'memory':>8}{'arith.':>7}{'x floor':>8}{'cycles':>8}{'/cycle':>7}"
        f"{'instr./block':>13}{'resident':>9}{'regs':>5}  idle"
    )


def shown(row: dict, most: int) -> str:
    """A row as a line, and below it its `most` largest phases."""
    floor = max(row["memory_floor"], row["arithmetic_floor"])
    idle = ", ".join(f"{name} {part:.0%}" for name, part in row["idle"].items() if part >= 0.05)
    resident = f"{row['resident']['blocks']}x{row['warps']}"
    text = (
        f"{' '.join(map(str, _key(row))) + times(row):{WIDTH}}{row['microseconds']:7.1f}{row['memory_floor']:8.1f}"
        f"{row['arithmetic_floor']:7.1f}{row['microseconds'] / floor:8.2f}{row['cycles']:8.0f}{row['issue_rate']:7.2f}"
        f"{row['instructions'] / row['blocks']:13.0f}{resident:>9}{row['registers']:5}  {idle}"
    )
    for phase in row["phases"][:most]:
        part = phase["instructions"] / row["instructions"]
        text += f"\n    {phase['phase']:{WIDTH}}{part:6.0%} of instructions, {phase['lanes']:4.1f} lanes"
    return text


def times(row: dict) -> str:
    """How often the call launches the kernel."""
    return f", {row['launches']} x" if row["launches"] > 1 else ""


def compared(row: dict, other: dict) -> str:
    time, count = (row[key] / other[key] for key in ("microseconds", "instructions"))
    at = f"    at {other['commit'] or 'that checkout'}"
    return f"{at:{WIDTH}}{other['microseconds']:7.1f}  now {time:.2f} x its time, {count:.2f} x its instructions"
