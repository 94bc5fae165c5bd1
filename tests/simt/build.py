# SPDX-License-Identifier: Apache-2.0
"""Builds the simt module on demand: the CUDA kernels compiled for the host, plain or with a sanitizer.

python tests/simt/build.py [plain|address|thread]     prints the folder that holds simt_kernels.so
"""

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SANITIZERS = {"plain": "", "address": "address,undefined", "thread": "thread"}
RUNTIMES = {"plain": (), "address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}


def _native_build():
    spec = importlib.util.spec_from_file_location("native_build", ROOT / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiler() -> str | None:
    return _native_build().find_compiler()


def runtimes(variant: str) -> list[str]:
    """The sanitizer's runtimes, to be preloaded: Python itself is not built with them."""
    found = []
    for name in RUNTIMES[variant]:
        command = [compiler(), f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if os.path.isabs(path):
            found.append(path)
    return found


def build(variant: str) -> Path:
    """The folder with the finished module; raises RuntimeError with the compiler's words."""
    return build_module(f"simt-{variant}", ["-DKDK_SIMT=ON", f"-DKDK_SIMT_SANITIZE={SANITIZERS[variant]}"])


def build_module(name: str, options: list[str]) -> Path:
    """A Python module of CMakeLists.txt, in a folder of its own under build/."""
    import numpy
    import pybind11

    tools = _native_build()
    cmake, ninja = tools.find_program("cmake"), tools.find_program("ninja")
    if cmake is None:
        raise RuntimeError("cmake not found: pip install cmake ninja")
    includes = [sysconfig.get_path("include"), pybind11.get_include(), numpy.get_include()]
    options = ["-DKDK_CPU=OFF", "-DKDK_CUDA=OFF", *options, f"-DCMAKE_CXX_COMPILER={tools.find_compiler()}"]
    options += [f"-DKDK_PYTHON_INCLUDE={';'.join(includes)}"]
    if ninja:
        options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    # CMake's cache remembers its tools and paths, so another set of them gets another folder
    key = hashlib.sha256("\n".join([cmake, str(ROOT), *options]).encode()).hexdigest()[:8]
    folder = ROOT / "build" / f"{name}-{key}"
    made = folder / "out"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # test workers share the folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            [cmake, "-S", str(ROOT), "-B", str(folder), f"-DKDK_OUTPUT={made}", *options],
            [cmake, "--build", str(folder)],
        ):
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600)
            if done.returncode:
                raise RuntimeError(f"{name} does not build:\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}")
    return made


if __name__ == "__main__":
    print(build(sys.argv[1] if len(sys.argv) > 1 else "plain"))
