# SPDX-License-Identifier: Apache-2.0
"""The CUDA library of the checkout that the package comes from, over stand-ins for a GPU, with lines of its source."""

from __future__ import annotations

import hashlib
from pathlib import Path

from machine_build import native_build

import kdkernels as kd

from ..machine import ROOT

PACKAGE = Path(kd.__file__).resolve().parent.parent
# before the project: only what the emulator executes. lines do not change the code
SETTINGS = 'set(CMAKE_CUDA_ARCHITECTURES "80-real;90a-real")\nset(CMAKE_CUDA_FLAGS "-lineinfo")\n'


def library(package: Path) -> Path:
    """Built by this checkout's CMakeLists.txt, from a folder of links to that one's sources."""
    tree = ROOT / "build" / "model" / hashlib.sha256(str(package).encode()).hexdigest()[:8]
    tree.mkdir(parents=True, exist_ok=True)
    for name, sources in (("csrc", package / "csrc"), ("tests", ROOT / "tests")):
        if not (tree / name).is_symlink():
            (tree / name).symlink_to(sources)
    text, path = SETTINGS + (ROOT / "CMakeLists.txt").read_text(), tree / "CMakeLists.txt"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    made, _ = native_build().compile_library("cuda", tree / "build", "cuda_on_machine", tree)
    return made / "cuda_on_machine.so"
