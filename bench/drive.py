# SPDX-License-Identifier: Apache-2.0
"""`python -m bench run`: the gate, the ceilings, then case after case; a row is on disk as soon as it is known.

An op whose quick contract fails on this machine gets a `refused` row instead of times. Where a contender cannot run
(memory, capture) its row says so. When the seconds are used up the remaining cases get a row that says so too.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import torch

import kdkernels as kd

from . import (
    analysis_rows,
    data,
    distributed_rows,
    head_rows,
    logit_rows,
    loss_rows,
    machine,
    measure,
    memory,
    nystrom_rows,
    projecting,
    ranking,
    roof,
)
from . import cases as catalogue
from . import contenders as others
from .cases import Case
from .measure import Contender

BACKENDS = {"cpu": ("torch", "cpp"), "cuda": ("triton", "cuda", "torch")}
# families whose cases have a module of their own: draw, ours, contender, names
MODULES = {
    "rank": ranking,
    "nystrom": nystrom_rows,
    "projection": projecting,
    "logits": logit_rows,
    "heads": head_rows,
    "analysis": analysis_rows,
    "losses": loss_rows,
}
SEEDS = 4  # draws of the inputs that the calls rotate over


def listed(device: str, quick: bool) -> list:
    """The cases of a device; `quick`: a few of them at a quarter of the size, to try the driver."""
    cases = catalogue.cases(device)
    return [c.smaller() for c in cases if c.quick] if quick else cases


def asked(family: str, options) -> bool:
    return not options.family or family in options.family


def draw(case: Case, device: str, seed: int):
    """((x, y), sigma): inputs in the case's dtype, and the bandwidth of each side as numbers where the case has one."""
    if case.family in MODULES:
        return MODULES[case.family].draw(case, device, seed), None
    pair = data.features(case.n, case.p, case.q, case.regime, seed, device, case.groups)
    x, y = (t.to(getattr(torch, case.dtype)) for t in pair)
    if case.kernel not in ("rbf", "laplacian") or case.sigma == "rule":
        return (x, y), None
    if case.op == "mmd":
        return (x, y), data.median_sigma(torch.cat([x, y], -2))
    return (x, y), (data.median_sigma(x), data.median_sigma(y))


def build(case: Case, sigma, name: str, backend: str | None) -> Contender:
    if case.family in MODULES:
        module = MODULES[case.family]
        return Contender(name, backend, module.ours(case, backend) if backend else module.contender(case, name))
    if name == "kdkernels":
        return Contender(name, backend, others.ours(case, sigma, backend))
    return Contender(name, None, getattr(others, name)(case, sigma))


class Writer:
    """Rows to a file, flushed one by one, each with the provenance of the run."""

    def __init__(self, path: Path, shared: dict):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.shared, self.rows = open(path, "w", encoding="utf-8"), shared, []

    def __call__(self, row: dict) -> None:
        row = {**self.shared, "utc": machine.now(), "load": machine.load(), **row}
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()


def usable_backends(op: str, device: str, wanted) -> list[str]:
    """The backends of `op` that can run here, of those asked for; a loss without an op is plain PyTorch."""
    if not op:
        return ["torch"]
    return [b for b in wanted if b in kd.registry.OPS[op].backends and kd.backend.obstacle(b, device, (), op) is None]


def gate(op: str, backend: str, device: str) -> str | None:
    """Why the op may not be reported on this machine: the first failure of its quick contract, or None."""
    from kdkernels import testing

    if not op:
        return None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its cases are tiny: more threads only wait for each other
    try:
        failed = [result for result in testing.contract(op, backend, device, quick=True) if not result.ok]
    finally:
        torch.set_num_threads(threads)
    if not failed:
        return None
    first = failed[0]
    return f"{len(failed)} checks of the quick contract failed, first: {first.check} of {first.case}: {first.note}"


def run(options) -> int:
    device = options.device
    if options.threads:
        torch.set_num_threads(options.threads)
    shared = {**machine.provenance(device), "clock": options.clock if device == "cpu" else "events"}
    path = Path(options.out) if options.out else default_path(shared, "rows")
    write = Writer(path, shared)
    begin = time.monotonic()
    chosen = [
        (k, c)
        for k, c in enumerate(listed(device, options.quick))
        if asked(c.family, options) and (not options.case or options.case in c.name)
    ]
    if not chosen:
        print(f"no case has {options.case!r} in its name: python -m bench list", file=sys.stderr)
        return 2
    ceilings = roof.measure(device, options.quick, options.clock)
    for row in ceilings:
        write(row)
    refused: dict[tuple[str, str], str | None] = {}
    for place, (index, case) in enumerate(chosen):
        left = options.seconds - (time.monotonic() - begin)
        if left <= 0:
            write(_outcome(case, "not run", f"the {options.seconds:.0f} s of the run were used up"))
            continue
        if case.family == "distributed":
            _measure_ranks(case, write)
            print(f"[{place + 1}/{len(chosen)}] {case.name}", file=sys.stderr, flush=True)
            continue
        backends = []
        for backend in usable_backends(case.op, device, options.backends or BACKENDS[device]):
            if (case.op, backend) not in refused:
                refused[case.op, backend] = gate(case.op, backend, device)
            if refused[case.op, backend] is None:
                backends.append(backend)
            else:
                write({**_outcome(case, "refused", refused[case.op, backend]), "backend": backend})
        if backends:
            share = min(options.case_seconds, left / (len(chosen) - place) * 2)
            _measure_case(index, case, backends, share, ceilings, write, options)
        print(f"[{place + 1}/{len(chosen)}] {case.name}", file=sys.stderr, flush=True)
    if asked("gram", options) and (not options.case or options.case in "overhead"):
        from . import overhead

        for backend in usable_backends("cka", device, options.backends or BACKENDS[device]):
            if refused.get(("cka", backend), "") is None:
                write(overhead.measure(backend, device, 40 if options.quick else 2000))
    print(path)
    return 1 if any(refused.values()) else 0


def default_path(shared: dict, what: str) -> Path:
    """Files of rows are called MACHINE[-WHAT]-THREADS-thread-KIND: WHAT where not every family is in it."""
    return machine.ROOT / "bench" / "results" / f"{machine.slug(shared)}-{shared['threads']}-thread-{what}.jsonl"


def _outcome(case: Case, status: str, note: str | None = None) -> dict:
    return {
        "kind": "time",
        "status": status,
        "note": note,
        "op": case.op,
        "case": case.name,
        "kernel": case.kernel,
        "options": {k: v for k, v in case.options.items()},
        "shape": case.shape,
        "dtype": case.dtype,
        "regime": case.regime,
        "sigma": case.sigma if case.kernel in ("rbf", "laplacian") else None,
        "gradient": "x",
    }


def names_of(case, device: str, options) -> list[str]:
    if case.family == "rank":
        return ranking.names(case, device)
    compiled = bool(options.compiled or (device == "cuda" and options.compiled is None))
    if case.family in MODULES:
        return MODULES[case.family].names(case, device, compiled)
    return ["eager", "algebra", *(["compiled"] if compiled else [])]


def _measure_case(index, case, backends, seconds, ceilings, write, options) -> None:
    device = options.device
    inputs, sigma = draw(case, device, 0)
    copies = SEEDS if sum(t.nbytes for t in inputs) < 2**28 else 1
    draws = [inputs] + [draw(case, device, seed)[0] for seed in range(1, copies)]
    flush = measure.flush_buffer() if device == "cuda" else None
    wanted = [(name, None) for name in names_of(case, device, options)] + [("kdkernels", b) for b in backends]
    methods = ("eager", "graph") if device == "cuda" else ("eager",)
    extras = {}
    for method in methods:
        runners = []
        for name, backend in wanted:
            try:
                runner = _runner(build(case, sigma, name, backend), method, draws, flush, options.clock)
                runner.call(0)
                if method == "eager":
                    extras[name, backend] = _extras(index, case, runner.contender, inputs, options)
                runners.append(runner)
            except Exception as error:  # out of memory, not capturable, not compilable: a row says so
                note = _note(error)
                write({**_outcome(case, "failed", note), "contender": name, "backend": backend, "method": method})
                if device == "cuda":
                    torch.cuda.empty_cache()
        if runners:
            results = measure.interleave(runners, seconds / len(methods), most=options.reps)
            _write_times(case, runners, results, extras, ceilings, write, device)


def _measure_ranks(case, write) -> None:
    """Bytes and memory by each way, where every other family has times."""
    try:
        for row in distributed_rows.rows(case):
            write({**_outcome(case, "ok"), "kind": "traffic", "contender": "kdkernels", "backend": "torch", **row})
    except RuntimeError as error:
        write({**_outcome(case, "failed", _note(error)), "contender": "kdkernels", "backend": "torch"})


def _note(error: Exception) -> str:
    """The first line, without the folders of this machine."""
    line = (str(error).splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: " + re.sub(r"(?:/[\w.+-]+)+/", "", line)


def _runner(contender: Contender, method: str, draws, flush, clock: str):
    if flush is None:
        return measure.cpu_runner(contender, draws, clock)
    return (measure.graph_runner if method == "graph" else measure.cuda_runner)(contender, draws, flush)


def _extras(index, case, contender, inputs, options) -> dict:
    """Launches and peak memory of one step; the CPU's peak in a process of its own, where it is large enough to see."""
    if options.device == "cuda":
        x, y = measure.leaves([inputs])[0]
        return {
            "launches": measure.launches(contender.function, x, y),
            "launches_forward": measure.launches(contender.function, x, y, forward=True),
            "peak_bytes": measure.cuda_peak(contender.function, x, y),
        }
    peak = None
    wanted = any(target.figure == "memory" for target in case.targets)
    if contender.name != "compiled" and (case.rows >= 2048 or wanted or options.memory):
        threads = torch.get_num_threads()
        peak = memory.cpu_peak(index, options.quick, contender.name, contender.backend, threads, limit=300)
    return {"launches": None, "launches_forward": None, "peak_bytes": peak}


def _write_times(case, runners, results, extras, ceilings, write, device) -> None:
    # the others by name, ours by backend
    known = {
        runner.contender.backend or runner.contender.name: result
        for runner, result in zip(runners, results, strict=True)
    }
    for runner, result in zip(runners, results, strict=True):
        contender = runner.contender
        for phase, times in result.items():
            p20, p50, p80 = measure.percentiles(times)
            moved, flops = case.work(phase)
            limit, which = roof.bound(ceilings, case.dtype, flops, moved)
            against = {
                name: measure.pair_ratios(result[phase], times)
                for name, result in known.items()
                if contender.name == "kdkernels" and name != contender.backend
            }
            write(
                {
                    **_outcome(case, "ok"),
                    "contender": contender.name,
                    "backend": contender.backend,
                    "method": runner.method,
                    "phase": phase,
                    "l2": "cold" if device == "cuda" else "hot",
                    "reps": len(times),
                    "ms_p20": p20,
                    "ms_p50": p50,
                    "ms_p80": p80,
                    "ratios": against,
                    **extras[contender.name, contender.backend],
                    "minimum_bytes": moved,
                    "flops": flops,
                    "roof": which,
                    "roof_percent": None if limit is None else 100 * limit / p50,
                    "targets": _targets(case, runner, phase, p50, against, extras, ceilings, limit),
                }
            )


def _targets(case, runner, phase, ms, against, extras, ceilings, limit) -> list[dict]:
    """The case's figures for this row: what was asked, what came out, whether it holds."""
    found, contender = [], runner.contender
    for target in case.targets if contender.name == "kdkernels" else ():
        if target.phase != phase or target.backend not in (None, contender.backend):
            continue
        value, own = None, extras[contender.name, contender.backend]
        if target.figure == "speed" and target.against in against:
            value = against[target.against][1]
        elif target.figure == "memory":
            theirs = extras.get((target.against, None), {}).get("peak_bytes")
            value = own["peak_bytes"] / theirs if own["peak_bytes"] is not None and theirs else None
        elif target.figure == "launches":
            value = own["launches_forward" if phase == "fwd" else "launches"]
        elif target.figure == "bytes":
            value = own["peak_bytes"]
        elif target.figure == "ms":
            value = ms
        elif target.figure == "roof" and limit is not None:
            value = 100 * limit / ms
        elif target.figure == "microseconds" and runner.method == "graph":
            value = ms * 1e3
        elif target.figure == "graph" and runner.method == "graph":
            value = ms / next(row["ms_p50"] for row in ceilings if row["case"] == "graph")
        if value is not None:
            found.append({**target._asdict(), "value": value, "holds": target.holds(value)})
    return found
