# SPDX-License-Identifier: Apache-2.0
"""torchsort's CUDA kernels, compiled from its source distribution, where an index has it. A thread solves a row, in
blocks of 1,024 rows; it sorts with torch.sort before, which is a case of its own. Only the compiled file is kept."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

import torch
from cubin import sections
from machine_build import native_build

from ..machine import ROOT
from .built import Compiled, Kernel, cubin_of

VERSION = "0.1.10"
THREADS = 1024
# as torch compiles extensions; its headers for CUDA include one file that its CPU build leaves out
FLAGS = ["-std=c++20", "--expt-relaxed-constexpr", "-DTORCH_EXTENSION_NAME=isotonic_cuda"]
FLAGS += [f"-D__CUDA_NO_{what}__" for what in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS")]
FLAGS += ["-D__CUDA_NO_HALF2_OPERATORS__"]
LEFT_OUT = Path("c10", "cuda", "impl", "cuda_cmake_macros.h")


class NotToBeHad(RuntimeError):
    """Why another package's kernels cannot be modelled here."""


def binary(architecture: int) -> bytes:
    kept = ROOT / "build" / "model" / f"torchsort-{VERSION}-torch-{torch.__version__}-sm_{architecture}.cubin"
    if not kept.is_file():
        with tempfile.TemporaryDirectory() as folder:
            made = _compiled(_source(Path(folder)), Path(folder), architecture)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(made)
    return kept.read_bytes()


def _source(folder: Path) -> Path:
    wanted = [f"torchsort=={VERSION}", "--no-deps", "--no-binary", "torchsort", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "download", *wanted, "--dest", str(folder)]
    # pip asks its setup.py for metadata, which wants torch's CUDA build where nvcc is on the PATH
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": os.defpath})
    archives = list(folder.glob("torchsort-*.tar.gz"))
    if not archives:
        said = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
        reason = (said or done.stderr.splitlines() or ["pip said nothing"])[-1]
        raise NotToBeHad(f"the source of torchsort {VERSION} cannot be had: {reason}")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"torchsort-{VERSION}" / "torchsort" / "isotonic_cuda.cu"


def _compiled(source: Path, folder: Path, architecture: int) -> bytes:
    headers, _ = native_build().torch_include()
    if not (headers / LEFT_OUT).is_file():
        (folder / LEFT_OUT).parent.mkdir(parents=True)
        (folder / LEFT_OUT).touch()
    include = [folder, headers, headers / "torch" / "csrc" / "api" / "include", sysconfig.get_path("include")]
    try:
        return cubin_of(source, architecture, *FLAGS, *(f"-I{path}" for path in include))
    except RuntimeError as error:
        raise NotToBeHad(str(error)) from None


def isotonic(on: Compiled, name: str, **matrices: torch.Tensor):
    """Launches isotonic_l2_kernel or its backward pass as torchsort does: each matrix is a parameter, [rows, n]."""
    compiled = binary(on.architecture)
    prefix = f"_Z{len(name)}{name}If"
    symbol = next(s for s in (s.removeprefix(".nv.info.") for s in sections(compiled)) if s.startswith(prefix))
    rows, n = next(iter(matrices.values())).shape
    # PackedTensorAccessor32: address, sizes, strides
    values = [struct.pack("<Q4i", t.data_ptr(), *t.shape, *t.stride()) for t in matrices.values()]
    values += [struct.pack("<i", number) for number in (n, rows)]
    on.launch(Kernel(name, symbol, compiled), -(-rows // THREADS), THREADS, values, matrices)
