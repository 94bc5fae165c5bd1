# SPDX-License-Identifier: Apache-2.0
"""Peak extra memory of one step on the CPU: a fresh process a contender, and what the system saw it use.

The child (peak.py) builds the inputs, runs the step once on 64 rows (libraries loaded, thread pools up), resets the
kernel's high-water mark of its resident memory (Linux, /proc/self/clear_refs), runs one step and reads the mark. The
difference
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
    command = [sys.executable, "-m", "bench.peak", *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=True)
    except subprocess.TimeoutExpired:
        return None
    return json.loads(done.stdout.splitlines()[-1])


def resident(field: str) -> int:
    return int(re.search(rf"^{field}:\s*(\d+) kB", STATUS.read_text(), re.M).group(1)) * 1024


def above(call) -> int:
    """Bytes resident at the peak of the call, above those before it."""
    CLEAR.write_text("5")
    before = resident("VmRSS")
    call()
    return max(0, resident("VmHWM") - before)
