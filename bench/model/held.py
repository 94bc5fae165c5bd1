# SPDX-License-Identifier: Apache-2.0
"""Predicted beside measured: the calls of `python -m bench model` on this GPU, kernel by kernel.

A kernel's time is the median of its launches by the profiler, after a buffer larger than L2 was written, as the model
takes caches to be cold. The predictions are those of the rows given, by default bench/results/model-*.jsonl.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import torch

from .. import machine, measure
from .cases import Case, cases
from .fit import plain

REPS = 9
DEVICE = "cuda"


def run(options) -> int:
    paths = [Path(path) for path in options.rows] or sorted((machine.ROOT / "bench" / "results").glob("model-*.jsonl"))
    predicted = {}
    for row in (json.loads(line) for path in paths for line in path.read_text().splitlines()):
        predicted[row["case"], row["shape"], row["dtype"], row["kernel"]] = row["microseconds"]
    shared, rows, failed = machine.provenance("cuda"), [], []
    for case in cases():
        if case.backend == "nvcc":  # compiled for the model alone
            continue
        try:
            times = measured(case)
        except RuntimeError as error:  # no library, say: the other cases go on
            failed.append(case)
            print(f"{' '.join(case[:3])}: not measured: {error}", file=sys.stderr)
            continue
        rows += [{**shared, "kind": "held", **row} for row in compared(case, predicted, times)]
    for row in rows:
        print(shown(row))
    if options.out:
        with open(options.out, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return int(bool(failed))


def compared(case: Case, predicted: dict, times: dict[str, float]) -> list[dict]:
    """A row for each kernel that is predicted or was seen, but for PyTorch's own."""
    names = {key[3] for key in predicted if key[:3] == case[:3]}
    return [
        {
            **dict(zip(("case", "shape", "dtype"), case[:3], strict=True)),
            "kernel": name,
            "predicted_us": predicted.get((*case[:3], name)),
            "measured_us": times.get(name),
        }
        for name in sorted(names | (case.kernels.keys() & times.keys()))
    ]


def measured(case: Case) -> dict[str, float]:
    """Microseconds of each kernel of a call, by its plain name."""
    flush, seen = measure.flush_buffer(), {}
    with torch.device(DEVICE):
        case.call(None)
        for _ in range(REPS):
            for name, microseconds in launched(case, flush):
                seen.setdefault(plain(name), []).append(microseconds)
    return {name: statistics.median(times) for name, times in seen.items()}


def launched(case: Case, flush) -> list[tuple[str, float]]:
    """Kernels of one call and their times."""
    from torch.profiler import ProfilerActivity, profile

    flush.zero_()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        case.call(None)
        torch.cuda.synchronize()
    events = [e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [(e.name, e.time_range.elapsed_us()) for e in events if not e.name.startswith(("Memcpy", "Memset"))]


def shown(row: dict) -> str:
    predicted, seen = row["predicted_us"], row["measured_us"]
    ratio = f"{seen / predicted:.2f} x" if predicted and seen else ""
    of = f"{row['case']} {row['shape']} {row['dtype']} {row['kernel']}"
    return f"{of:64} {_us(predicted):>9} {_us(seen):>9} {ratio:>8}"


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} us"
