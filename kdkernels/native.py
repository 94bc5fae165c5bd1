# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled libraries if they are there, once and only when first asked for, and remembers why not.

Importing this module loads nothing and never raises. KDK_NATIVE=0 in the environment keeps both libraries out.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

CAPABILITY = (8, 0)  # the least compute capability whose instructions the CUDA kernels can do with
_FOLDER = Path(__file__).resolve().parent / "_lib"


class Status(NamedTuple):
    """What is loaded; a reason is empty exactly when its library is loaded."""

    cpu: bool
    cpu_reason: str
    cuda: bool
    cuda_reason: str
    build: dict[str, Any]  # the content of _lib/build.json, empty if nothing was ever built


def has(library: str) -> bool:
    """Whether the compiled "cpu" or "cuda" library is loaded; the first call loads it."""
    if library not in ("cpu", "cuda"):
        raise ValueError(f"library is {library!r}: give 'cpu' or 'cuda'")
    return getattr(status(), library)


def lack(library: str, operators: tuple[str, ...] = ()) -> str | None:
    """Why the library is not there, or which of these operators it does not implement; None if all is well."""
    if not has(library):
        return getattr(status(), f"{library}_reason")
    missing = [name for name in operators if not _implements(library, name)]
    return f"the compiled {library.upper()} library has no {', '.join(missing)}: build it again" if missing else None


def missed(library: str) -> str | None:
    """Why a library that could be here is not, and what to do: a build that chose for itself had a compiler and built
    nothing, which pip does not show, or what was built does not load."""
    unused = os.environ.get("KDK_NATIVE") == "0" or (library == "cuda" and not torch.cuda.is_available())
    if unused or has(library):
        return None
    entry, reason = status().build.get(library), getattr(status(), f"{library}_reason")
    if not isinstance(entry, dict) or not (entry.get("built") or entry.get("could")):
        return None
    found = f" (here {Path(torch.__file__).parent / 'include'})" if "KDK_TORCH_INCLUDE" in reason else ""
    return reason + found


def _implements(library: str, operator: str) -> bool:
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"kdkernels::{operator}", library.upper())
    except RuntimeError:  # no such operator
        return False


def refusal(device: str) -> str | None:
    """Why the loaded CUDA library does not run on `device` ("cuda": the current one), or None: the library is asked."""
    # where there is no device, what is said of its tensors is said of one that serves
    if torch.device(device).type != "cuda" or not has("cuda") or not torch.cuda.is_available():
        return None
    index = torch.device(device).index
    return _refusal(torch.cuda.current_device() if index is None else index)


@functools.cache
def _refusal(index: int) -> str | None:
    with torch.cuda.device(index):
        why = _ask_library()
    if not why:
        return None
    capability = torch.cuda.get_device_capability(index)
    fix = "update the driver, or build the library on this machine (python csrc/build.py cuda)"
    if capability < CAPABILITY:
        fix = "its kernels need a device of compute capability {}.{} or more".format(*CAPABILITY)
    name, capability = torch.cuda.get_device_name(index), "{}.{}".format(*capability)
    held = f"It holds {', '.join(code()) or 'code that no record names'}"
    return f"the compiled CUDA library does not run on {name}, compute capability {capability}: {why}. {held}: {fix}"


def _ask_library() -> str:
    """Why no kernel of the CUDA library runs on the current device, or an empty string: csrc/common/refusal_cuda.cu."""
    try:
        ask = ctypes.CDLL(str(_FOLDER / "libkdkernels_cuda.so")).kdkernels_cuda_refusal
    except AttributeError:
        return "it is of an earlier build"
    ask.restype = ctypes.c_char_p
    return (ask() or b"").decode()


def code() -> list[str]:
    """What the CUDA library holds, as its build recorded it: sm_80 is a device's own code, compute_100 is PTX."""
    entry = status().build.get("cuda")
    return entry.get("code", []) if isinstance(entry, dict) else []


@functools.cache
def status() -> Status:
    """What is loaded and, for what is not, the reason in one line; the first call loads what it can."""
    build = _read_build_record()
    cpu_reason = _load("cpu", build)
    cuda_reason = _load("cuda", build)
    return Status(not cpu_reason, cpu_reason, not cuda_reason, cuda_reason, build)


def _read_build_record() -> dict[str, Any]:
    try:
        record = json.loads((_FOLDER / "build.json").read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _load(library: str, build: dict[str, Any]) -> str:
    """Loads one library; returns why that was not possible, or an empty string."""
    if os.environ.get("KDK_NATIVE") == "0":
        return "switched off by KDK_NATIVE=0"
    name = {"cpu": "CPU", "cuda": "CUDA"}[library]
    path = _FOLDER / f"libkdkernels_{library}.so"
    if not path.exists():
        entry = build.get(library)
        why = entry.get("reason") if isinstance(entry, dict) else None
        return f"compiled {name} library not built: {why or 'no build was run (python csrc/build.py)'}"
    floor = build.get("torch", "0.0")
    if _version(torch.__version__) < _version(floor):
        return f"the compiled libraries need torch >= {floor}, this is {torch.__version__}"
    # without this test the loader would only say that libtorch_cuda.so cannot be opened
    if library == "cuda" and torch.version.cuda is None:
        return f"this torch ({torch.__version__}) has no CUDA: install a CUDA build of torch"
    try:
        torch.ops.load_library(str(path))
    except Exception as error:
        # a broken library must not break the pure-Python backends. torch wraps the loader's OSError and drops its text:
        # the cause has it
        why = str(error.__cause__ or error)
        old = re.search(r"version `(GLIBC|GLIBCXX|CXXABI)_([\d.]+)' not found", why)
        if old:
            part = "glibc" if old[1] == "GLIBC" else f"libstdc++ ({old[1]})"
            fix = "build it here (pip install --no-binary kdkernels kdkernels)"
            why = f"it needs {part} {old[2]}, this system's is older: {fix}"
        return f"compiled {name} library did not load: {why}"
    return ""


def _version(text: str) -> tuple[int, int]:
    major, minor = re.match(r"(\d+)\.(\d+)", text).groups()
    return int(major), int(minor)
