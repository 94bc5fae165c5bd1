# SPDX-License-Identifier: Apache-2.0
"""The core, built on demand beside the other test module: `core()` is the module machine_core."""

import fcntl
import importlib.util
from functools import cache
from pathlib import Path


def _load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ROOT = Path(__file__).resolve().parents[2]
simt_build = _load("simt_build", ROOT / "tests" / "simt" / "build.py")


def native_build():
    return _load("native_build", ROOT / "csrc" / "build.py")


@cache
def cuda_on_machine() -> Path:
    """The CUDA library over stand-ins, from the objects that make up the package's own."""
    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build" / "cuda.lock", "w") as lock:  # test workers share the folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        made, _ = native_build().compile_library("cuda", ROOT / "build", "cuda_on_machine")
    return made / "cuda_on_machine.so"


@cache
def core():
    folder = simt_build.build_module("machine-core", ["-DKDK_MACHINE=ON"])
    return _load("machine_core", folder / "machine_core.so")
