# SPDX-License-Identifier: Apache-2.0
"""Certifies and measures an NVIDIA machine without a network, in stages that each end inside ten minutes.

    PYTHON=python3 make gpu OUT=dir STAGE=build|test|sanitize|bench|losses|all

build     compiles csrc/ with CMake into kdkernels/_lib; without cmake the pure-Python and Triton backends are used
test      the tests marked gpu, then the contract of every op on the device
sanitize  compute-sanitizer memcheck and racecheck over a short contract run of the Gram ops, and over every schedule of
          the ranking kernels
bench     the benchmark of the Gram and the ranking family, and the report
losses    the benchmark of Nystrom features, projections, KDA, logits and heads, the kernels that the model predicts
          beside its times, and the report of all rows so far

OUT gets at most ten files: <stage>.json (status, commit, machine, steps), gpu.log, bench.jsonl, ranking.jsonl,
losses.jsonl and report.md. A step that passed is not run again while the sources are the same; --force (FORCE=1) runs
it again.
Exit code: 0 all passed, 1 something failed, 2 no CUDA device.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("build", "test", "sanitize", "bench", "losses")
# (name of the step and of its rows, families, seconds) of the stages that measure
MEASURED = {
    "bench": (("bench", ("gram",), 270), ("ranking", ("rank",), 200)),
    "losses": (("losses", ("nystrom", "projection", "logits", "heads", "losses"), 420),),
}
GRAM = ("cka", "hsic", "mmd", "gram_mse")
STAGE_SECONDS = 570  # a stage ends inside ten minutes
TAIL_LINES = 30


class Step(NamedTuple):
    name: str
    command: list[str]
    share: float = 1.0  # of the stage's seconds, at most
    output: str | None = None  # a file in OUT that gets the standard output
    environment: tuple[tuple[str, str], ...] = ()


def steps(stage: str, out: Path) -> list[Step]:
    python = sys.executable
    validate = [python, "-m", "kdkernels", "validate", "--device", "cuda"]
    if stage == "build":
        return [
            Step("compile", [python, "csrc/build.py", os.environ.get("KDK_BUILD") or "auto"]),
            Step("info", [python, "-m", "kdkernels", "info"]),
        ]
    if stage == "test":
        return [
            Step("pytest", [python, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"], 0.6),
            Step("contract", validate),
        ]
    if stage == "sanitize":
        tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        # memcheck sees an out-of-bounds access only where each tensor is an allocation of its own
        uncached = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
        gram = [*validate, "--quick", *(word for op in GRAM for word in ("--op", op))]
        ranking = [python, "-m", "bench.rank_schedules"]
        # what a thread shares with another is the same in a shorter row, and racecheck is the slower of the two
        checks = [
            ("memcheck", "memcheck", gram, 0.3, uncached),
            ("memcheck ranking", "memcheck", ranking, 0.2, uncached),
            ("racecheck ranking", "racecheck", [*ranking, "--longest", "21841"], 0.25, ()),
            ("racecheck", "racecheck", gram, 1.0, ()),
        ]
        return [
            Step(name, [tool, "--tool", check, "--error-exitcode", "66", *command], share, None, environment)
            for name, check, command, share, environment in checks
        ]
    measure = [python, "-m", "bench", "run", "--device", "cuda"]
    runs = [
        Step(name, [*measure, "--family", *families, "--seconds", str(seconds), "--out", str(out / f"{name}.jsonl")],
             (seconds + 20) / STAGE_SECONDS)
        for name, families, seconds in MEASURED[stage]
    ]  # fmt: skip
    own = {name for name, *_ in MEASURED[stage]}
    rows = [out / f"{name}.jsonl" for parts in MEASURED.values() for name, *_ in parts]
    rows = [str(path) for path in rows if path.stem in own or path.exists()]
    if stage == "losses":  # the calls that the model predicts, among the last rows
        held = [python, "-m", "bench", "held", "--out", str(out / "losses.jsonl")]
        runs.append(Step("predicted", held, 60 / STAGE_SECONDS))
    return [*runs, Step("report", [python, "-m", "bench", "report", *rows], 1.0, "report.md")]


def cuda_device() -> dict | None:
    """The machine in words, or None without a CUDA device."""
    try:
        import torch
    except ImportError:
        print(f"{sys.executable} has no torch: pass PYTHON=<a Python that has it>", file=sys.stderr)
        return None
    if not torch.cuda.is_available():
        return None
    machine = {"device": torch.cuda.get_device_name(0), "torch": torch.__version__, "cuda": torch.version.cuda}
    machine["capability"] = ".".join(map(str, torch.cuda.get_device_capability(0)))
    try:
        import triton

        machine["triton"] = triton.__version__
    except ImportError:
        machine["triton"] = None
    machine["python"] = sys.version.split()[0]
    return machine


def provenance() -> dict:
    """The commit, and a hash of the sources: a copied tree may have no git, an edited one is not its commit."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(ROOT), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    digest = hashlib.sha256()
    for folder in ("kdkernels", "csrc", "tests", "bench"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h") and path.is_file():
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    status = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(status), "sources": digest.hexdigest()[:16]}


def run_step(step: Step, out: Path, seconds: float) -> dict:
    """Runs one command in a process group of its own; everything it prints goes to gpu.log."""
    environment = {**os.environ, **dict(step.environment)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    started = time.monotonic()
    with open(out / "gpu.log", "a+b") as log:
        log.write(f"\n$ {' '.join(step.command)}\n".encode())
        log.flush()
        begin = log.tell()
        target = open(out / step.output, "wb") if step.output else log
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=target,
                stderr=log,
                start_new_session=True,
            )
        except OSError as error:
            return {"status": "failed", "rc": None, "seconds": 0.0, "tail": [f"{step.command[0]}: {error.strerror}"]}
        finally:
            if step.output:
                target.close()
        try:
            rc = process.wait(timeout=max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            rc = None
        log.seek(begin)
        tail = log.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
    status = "timed out" if rc is None else "passed" if rc == 0 else "failed"
    return {"status": status, "rc": rc, "seconds": round(time.monotonic() - started, 1), "tail": tail}


def run_stage(stage: str, out: Path, machine: dict, source: dict, force: bool) -> bool:
    """Runs the steps that have not passed yet on these sources and this device; writes OUT/<stage>.json after each."""
    path = out / f"{stage}.json"
    done: dict = {}
    if path.exists() and not force:
        old = json.loads(path.read_text())
        if old.get("sources") == source["sources"] and old.get("device") == machine["device"]:
            done = {name: step for name, step in old["steps"].items() if step["status"] == "passed"}
    record = {"stage": stage, "status": "running", **source, **machine, "steps": done}
    record["utc"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    ends = time.monotonic() + STAGE_SECONDS
    for step in steps(stage, out):
        if step.name in done:
            print(f"{stage}: {step.name} passed before on these sources, not run again")
            continue
        left = ends - time.monotonic()
        result = run_step(step, out, min(left, STAGE_SECONDS * step.share))
        record["steps"][step.name] = result
        path.write_text(json.dumps(record, indent=2) + "\n")
        print(f"{stage}: {step.name} {result['status']} in {result['seconds']} s", flush=True)
        if result["status"] != "passed":
            print("\n".join(f"  {line}" for line in result["tail"]))
    passed = all(step["status"] == "passed" for step in record["steps"].values())
    record["status"] = "passed" if passed else "failed"
    if stage == "build":
        built = ROOT / "kdkernels" / "_lib" / "build.json"
        record["libraries"] = json.loads(built.read_text()) if built.exists() else {}
        for name in ("cpu", "cuda"):
            entry = record["libraries"].get(name, {"built": False, "reason": "no build was run"})
            print(f"build: {name} library {'built' if entry['built'] else 'not built: ' + entry['reason']}")
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"{stage}: {record['status']}")
    return passed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--force", action="store_true", help="run again what passed before")
    options = parser.parse_args(arguments)
    chosen = STAGES if options.stage == "all" else (options.stage,)
    machine = cuda_device()
    if machine is None:
        for stage in chosen:
            print(f"{stage}: no CUDA device", file=sys.stderr)
        return 2
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    source = provenance()
    passed = [run_stage(stage, out, machine, source, options.force) for stage in chosen]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    raise SystemExit(main())
