# SPDX-License-Identifier: Apache-2.0
"""What nvcc compiles: the CUDA library of the checkout that the package comes from, over stand-ins for a GPU, with
lines of its source; kernels of this folder and of others."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from cubin import Cubin
from emulator import Device, Function, memory_of
from machine_build import native_build

import kdkernels as kd

from ..machine import ROOT


class Kernel(NamedTuple):
    name: str
    symbol: str  # in the binary
    binary: bytes


PACKAGE = Path(kd.__file__).resolve().parent.parent
# before the project: only what the emulator executes. lines do not change the code
SETTINGS = 'set(CMAKE_CUDA_ARCHITECTURES "80-real;90a-real")\nset(CMAKE_CUDA_FLAGS "-lineinfo")\n'

LINKED = {"csrc": None, "tests": ROOT, "pyproject.toml": ROOT}  # what CMakeLists.txt reads; None: of that checkout


def library(package: Path) -> Path:
    """Built by this checkout's CMakeLists.txt, from a folder of links to that one's sources."""
    tree = ROOT / "build" / "model" / hashlib.sha256(str(package).encode()).hexdigest()[:8]
    tree.mkdir(parents=True, exist_ok=True)
    for name, root in LINKED.items():
        if not (tree / name).is_symlink():
            (tree / name).symlink_to((root or package) / name)
    text, path = SETTINGS + (ROOT / "CMakeLists.txt").read_text(), tree / "CMakeLists.txt"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    made, _ = native_build().compile_library("cuda", tree / "build", "cuda_on_machine", tree)
    return made / "cuda_on_machine.so"


@cache
def compiled(source: str, architecture: int) -> bytes:
    """A file of this folder."""
    return cubin_of(Path(__file__).with_name(source), architecture)


def cubin_of(source: Path, architecture: int, *how: str) -> bytes:
    nvcc = native_build().find_nvcc()
    if nvcc is None:
        raise RuntimeError(f"nvcc not found: it compiles {source.name}")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernel.cubin"
        command = [nvcc, "-cubin", f"-arch=sm_{architecture}", "-O3", "-lineinfo", *how, "-o", str(out), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            errors = re.findall(r"^.*\berror\b.*$", done.stderr, re.M)
            raise RuntimeError(f"nvcc does not compile {source.name}: {(errors or [done.stderr])[0].strip()}")
        return out.read_bytes()


class Compiled(Device):
    """Runs kernels that are compiled for the model alone."""

    def launch(self, kernel: Kernel, grid: int, threads: int, values: list[bytes], tensors: dict[str, torch.Tensor]):
        function = Function(Cubin(kernel.symbol, kernel.binary), 0)
        function.name = kernel.name
        self.ran(function, (grid, 1, 1), threads, values, memory_of(tensors))
