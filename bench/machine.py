# SPDX-License-Identifier: Apache-2.0
"""Where a row comes from: sources, machine and versions, with no host name and no path in it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def provenance(device: str, root: Path = ROOT) -> dict:
    """The fields that every row of one run shares; `root` is the checkout that the package comes from."""
    cuda = device == "cuda"
    return {
        "run": now(),
        "commit": _git(root, "rev-parse", "--short=12", "HEAD"),
        # only what can change a number counts: the package, its sources, this driver
        "dirty": bool(_git(root, "status", "--porcelain", "--", "kdkernels", "csrc", "bench/*.py")),
        "device": device,
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if cuda else None,
        "clocks": _smi("clocks.sm,clocks.mem,clocks.max.sm") if cuda else None,
        "driver": _smi("driver_version") if cuda else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cuda": torch.version.cuda,
        "fp_fusion": os.environ.get("TRITON_DEFAULT_FP_FUSION", "default"),
        "matmul_precision": _matmul_precision() if cuda else "ieee",
    }


def load() -> float | None:
    """Processes that wanted a core in the last minute: above `threads`, the machine was shared and times are high."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def cpu_model() -> str:
    """The model as the kernel names it, with the family and model numbers where the name alone says little."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    field = {key: value.strip() for key, value in re.findall(r"^([\w ]+?)\s*:(.*)$", text, re.M)}
    name = re.sub(r"\((R|TM)\)", "", field.get("model name", platform.machine()))
    return f"{' '.join(name.split())} (family {field.get('cpu family', '?')} model {field.get('model', '?')})"


def slug(provenance: dict) -> str:
    """The machine kind as part of a file name: cpu-intel-xeon-processor-6-167, gpu-nvidia-h200."""
    if provenance["device"] == "cuda":
        return "gpu-" + _words(provenance["gpu"])
    return "cpu-" + _words(re.sub(r"\b(family|model)\b", "", provenance["cpu"]))


def _words(text: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _smi(query: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _matmul_precision() -> str:
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return str(setting) if setting is not None else torch.get_float32_matmul_precision()
