# SPDX-License-Identifier: Apache-2.0
"""The core, built on demand beside the other test module: `core()` is the module machine_core."""

import importlib.util
from functools import cache
from pathlib import Path


def _load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


simt_build = _load("simt_build", Path(__file__).resolve().parent.parent / "simt" / "build.py")


@cache
def core():
    folder = simt_build.build_module("machine-core", ["-DKDK_MACHINE=ON"])
    return _load("machine_core", folder / "machine_core.so")
