# SPDX-License-Identifier: Apache-2.0
"""Peak extra memory of one step on the CPU: a fresh process a contender, and what the system saw it use.

The child builds the inputs, runs the step once on 64 rows (libraries loaded, thread pools up), resets the kernel's
high-water mark of its resident memory (Linux, /proc/self/clear_refs), runs one step and reads the mark. The difference
counts everything: tensors, buffers of the BLAS, std::vectors of compiled code, what the allocator holds back; the
gradient too, on every side. Counting tensors alone (torch.profiler) would miss whatever compiled code allocates by
itself; a live-bytes dispatch mode does not see inside a custom operator at all.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from .machine import ROOT

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def supported() -> bool:
    return STATUS.exists() and CLEAR.exists()


def cpu_peak(case_index: int, quick: bool, contender: str, backend: str | None, threads: int, limit: float):
    """Bytes above the inputs at the peak of one step, in a process of its own; None where it cannot be read."""
    if not supported():
        return None
    arguments = [str(case_index), str(int(quick)), contender, backend or "", str(threads)]
    command = [sys.executable, "-m", "bench.memory", *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=True)
    except subprocess.TimeoutExpired:
        return None
    return json.loads(done.stdout.splitlines()[-1])


def resident(field: str) -> int:
    return int(re.search(rf"^{field}:\s*(\d+) kB", STATUS.read_text(), re.M).group(1)) * 1024


def _child(case_index: str, quick: str, contender: str, backend: str, threads: str) -> None:
    import torch

    from .drive import build, draw, listed
    from .measure import leaves, step

    torch.set_num_threads(int(threads))
    case = listed("cpu", bool(int(quick)))[int(case_index)]
    inputs, sigma = draw(case, "cpu", seed=0)
    function = build(case, sigma, contender, backend or None).function
    x, y = leaves([inputs])[0]
    del inputs
    few = getattr(case, "few", lambda t: t[..., :64, :])
    step(function, *leaves([(few(x), few(y))])[0])
    CLEAR.write_text("5")
    before = resident("VmRSS")
    step(function, x, y)
    print(json.dumps(max(0, resident("VmHWM") - before)))


if __name__ == "__main__":
    _child(*sys.argv[1:])
