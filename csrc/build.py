#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Calls CMake once per native library and writes down what was built, what was not, and why.

    python csrc/build.py [auto|cpu|cuda|none]     builds into kdkernels/_lib

Needs only the standard library: setup.py calls it, and so does any environment that has torch but no setuptools.
auto builds each library on its own and records a failure; cpu and cuda end with an error; none builds nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("cpu", "cuda")
MODES = ("auto", "cpu", "cuda", "none")
# the torch whose stable ABI the sources use is the oldest that the package takes
FLOOR = tuple(map(int, re.search(r'"torch>=(\d+)\.(\d+)', (ROOT / "pyproject.toml").read_text()).groups()))


LAUNCHERS = ("ccache", "sccache", "distcc", "icecc", "buildcache")  # may stand before a compiler


class Unavailable(Exception):
    """Why a library cannot be built here."""


class Tool(NamedTuple):
    """A compiler as its variable names it: CXX="ccache g++ -m64"."""

    launchers: list[str]
    program: str
    flags: list[str]

    def options(self, language: str) -> list[str]:
        """CMake's, of which a compiler is one program and the rest has variables of its own."""
        said = [f"-DCMAKE_{language}_COMPILER={self.program}"]
        if self.launchers:
            said.append(f"-DCMAKE_{language}_COMPILER_LAUNCHER={';'.join(self.launchers)}")
        if self.flags:
            # what CMake would take from CXXFLAGS or CUDAFLAGS where it is told nothing
            own = os.environ.get(f"{language}FLAGS", "").split()
            said.append(f"-DCMAKE_{language}_FLAGS={' '.join([*own, *map(shlex.quote, self.flags)])}")
        return said


def find_program(name: str, *more: str) -> str | None:
    """A program beside this interpreter (a virtual environment's bin need not be on the PATH), or on the PATH."""
    scripts = sysconfig.get_path("scripts")
    for candidate in (name, *more):
        found = shutil.which(candidate, path=scripts) or shutil.which(candidate)
        if found:
            return found
    return None


def find_tool(variable: str, *names: str) -> Tool | None:
    """The compiler that an environment variable names, with what stands before and after it, or the first found."""
    said = os.environ.get(variable, "")
    try:
        words = shlex.split(said)
    except ValueError as error:
        raise Unavailable(f"{variable} is {said!r}: {error}") from None
    if not words:
        program = find_program(*names)
        return program and Tool([], program, [])
    ahead = 0
    while ahead < len(words) - 1 and Path(words[ahead]).name in LAUNCHERS:
        ahead += 1
    missing = [word for word in words[: ahead + 1] if shutil.which(word) is None]
    if missing:
        raise Unavailable(f"{variable} is {said!r}: {missing[0]} is not found")
    return Tool(words[:ahead], shutil.which(words[ahead]), words[ahead + 1 :])


def find_compiler() -> str | None:
    return _program("CXX", "c++", "g++", "clang++")


def find_nvcc() -> str | None:
    return _program("CUDACXX", "nvcc", "/usr/local/cuda/bin/nvcc")


def _program(variable: str, *names: str) -> str | None:
    try:
        tool = find_tool(variable, *names)
    except Unavailable:
        return None
    return tool and tool.program


def site_folders() -> Iterator[Path]:
    """Where a torch may lie, nearest first. A build that pip or uv isolates has another path than the environment it is
    for, and any headers from `FLOOR` on will do, as what is built does not depend on which."""
    yield from (Path(entry) for entry in sys.path if entry)
    yield Path(sysconfig.get_path("purelib"))  # under pip's isolation: the environment that gets the package
    # under uv's that is a temporary one: the activated environment, that of a program on the PATH, the folder's .venv
    activated = [Path(os.environ[name]) for name in ("VIRTUAL_ENV", "CONDA_PREFIX") if os.environ.get(name)]
    programs = [Path(entry).parent for entry in os.environ.get("PATH", "").split(os.pathsep) if entry]
    here = Path(os.environ.get("PWD") or os.getcwd())
    beside = [folder / ".venv" for folder in (here, *here.parents, ROOT)]
    for prefix in [*activated, *(p for p in [*programs, *beside] if (p / "pyvenv.cfg").is_file())]:
        yield from sorted(prefix.glob("lib/python3.*/site-packages"))
    yield Path(site.getusersitepackages())
    yield from map(Path, site.getsitepackages([sys.prefix, sys.base_prefix]))


def torch_include() -> tuple[Path, str]:
    """The folder of torch's headers and their version, without importing torch."""
    explicit = os.environ.get("KDK_TORCH_INCLUDE")
    old = None
    for folder in [Path(explicit)] if explicit else (folder / "torch" / "include" for folder in site_folders()):
        version = headers_version(folder)
        if version[:2] >= FLOOR:
            return folder, ".".join(map(str, version))
        old = old or version
    floor = f"torch >= {'.'.join(map(str, FLOOR))}"
    if old:
        raise Unavailable(f"the headers of torch {'.'.join(map(str, old))} are too old: {floor} is needed")
    where = f"KDK_TORCH_INCLUDE={explicit}" if explicit else "this environment"
    raise Unavailable(
        f"no torch headers found in {where}: install {floor} first and kdkernels with pip's --no-build-isolation, "
        "or set KDK_TORCH_INCLUDE to torch/include"
    )


def headers_version(folder: Path) -> tuple[int, ...]:
    """(2, 13, 0), or nothing where there are none."""
    for header in ("torch/headeronly/version.h", "torch/csrc/api/include/torch/version.h"):
        try:
            found = dict(re.findall(r"#define TORCH_VERSION_(MAJOR|MINOR|PATCH) (\d+)", (folder / header).read_text()))
        except OSError:
            continue
        return tuple(int(found.get(part, 0)) for part in ("MAJOR", "MINOR", "PATCH"))
    return ()


def sources(library: str) -> list[Path]:
    return sorted((ROOT / "csrc").rglob("*_cpu.cpp" if library == "cpu" else "*_cuda.cu"))


def compile_library(library: str, work: Path, target: str = "all", source: Path = ROOT) -> tuple[Path, dict]:
    """The folder with what was built and what with; raises Unavailable with a reason of one line."""
    if not sources(library):
        raise Unavailable(f"no sources: csrc holds no {'*_cuda.cu' if library == 'cuda' else '*_cpu.cpp'}")
    if sys.platform == "win32":
        raise Unavailable("the native libraries are not built on Windows yet")
    compiler, cmake = find_tool("CXX", "c++", "g++", "clang++"), find_program("cmake")
    if compiler is None:
        raise Unavailable("no C++ compiler found (looked for $CXX, c++, g++, clang++)")
    options = compiler.options("CXX")
    if library == "cuda":
        nvcc = find_tool("CUDACXX", "nvcc", "/usr/local/cuda/bin/nvcc")
        if nvcc is None:
            raise Unavailable("nvcc not found (looked for $CUDACXX and nvcc)")
        # nvcc calls the host's compiler with the flags that are said for it
        hosts = nvcc._replace(flags=[*nvcc.flags, *(f"-Xcompiler={flag}" for flag in compiler.flags)])
        options += [*hosts.options("CUDA"), f"-DCMAKE_CUDA_HOST_COMPILER={compiler.program}"]
    if cmake is None:
        raise Unavailable("cmake not found: pip install cmake ninja")
    ninja = find_program("ninja")
    if ninja:
        options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    include, torch_version = torch_include()
    options += [f"-DKDK_TORCH_INCLUDE={include}"]
    options += [f"-DKDK_{name.upper()}={'ON' if name == library else 'OFF'}" for name in LIBRARIES]

    # CMake's cache remembers its tools and paths, so another set of them gets another folder
    key = hashlib.sha256("\n".join([cmake, str(source), *options]).encode()).hexdigest()[:8]
    folder = work / f"{library}-{key}"
    log = work / f"{library}.log"
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / "out"
    commands = (
        [cmake, "-S", str(source), "-B", str(folder), f"-DKDK_OUTPUT={made}", *options],
        [cmake, "--build", str(folder), "--target", target, "--parallel", str(os.cpu_count() or 1)],
    )
    with open(log, "w") as stream:
        for command in commands:
            print("$", *command, file=stream, flush=True)
            if subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL).returncode:
                stream.flush()
                raise Unavailable(f"{first_error(log.read_text(errors='replace'))} (log: {log})")
    return made, {"torch_headers": torch_version, "compiler": compiler.program}


def build_library(library: str, work: Path, output: Path) -> dict:
    """Builds one library into `output`; raises Unavailable with a reason of one line."""
    made, tools = compile_library(library, work)
    name = f"libkdkernels_{library}.so"
    output.mkdir(parents=True, exist_ok=True)
    # a new file takes the name: a process that has the old one mapped keeps it
    staged = output / f".{name}.{os.getpid()}"
    shutil.copy2(made / name, staged)
    os.replace(staged, output / name)
    record = {"built": True, "reason": "", "library": name, "bytes": (output / name).stat().st_size, **tools}
    if library == "cuda":
        record["code"] = code_of((made.parent / "architectures").read_text())
    return record


def code_of(architectures: str) -> list[str]:
    """CMake's list by what it compiles: 90a-real is code for sm_90a, 100-virtual PTX for compute_100, 80 is both."""
    names = []
    for number, _, kind in (entry.partition("-") for entry in architectures.split(";")):
        names += [f"{name}_{number}" for name, other in (("sm", "virtual"), ("compute", "real")) if kind != other]
    return names


def first_error(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if not line.startswith("$")]
    for pattern in (r"\berror\b.*:|CMake Error", r"FAILED|Error"):
        for line in lines:
            if re.search(pattern, line):
                return line[:200]
    return lines[-1][:200] if lines else "no output"


def build(mode: str, output: Path, work: Path) -> dict:
    """Builds what `mode` asks for, writes output/build.json and returns its content."""
    check_mode(mode)
    try:
        return _build(mode, Path(output), Path(work))
    except OSError as error:
        place = error.filename or output
        raise SystemExit(f"kdkernels: nothing was built, {place} cannot be written: {error.strerror}") from None


def check_mode(mode: str):
    if mode not in MODES:
        raise SystemExit(f"KDK_BUILD is {mode!r}: give one of {', '.join(MODES)}")


def _build(mode: str, output: Path, work: Path) -> dict:
    wanted = {"auto": ("cpu", "cuda"), "cpu": ("cpu",), "cuda": ("cpu", "cuda"), "none": ()}[mode]
    output.mkdir(parents=True, exist_ok=True)
    # whatever set-up was recorded here (tools/env.sh) described the libraries that are replaced now
    (output / "stamp").unlink(missing_ok=True)
    record: dict = {"mode": mode, "torch": ".".join(map(str, FLOOR))}  # the oldest that loads what is built
    for library in LIBRARIES:
        if library not in wanted:
            record[library] = {"built": False, "reason": f"not asked for: KDK_BUILD={mode}"}
        else:
            try:
                record[library] = build_library(library, work, output)
            except Unavailable as error:
                # with a compiler it could have been: the package says so when it is first used (kdkernels/native.py)
                could = find_compiler() is not None and (library == "cpu" or find_nvcc() is not None)
                record[library] = {"built": False, "reason": str(error), "could": could}
        if not record[library]["built"]:
            # a library of an earlier build must not pass for one of this build
            (output / f"libkdkernels_{library}.so").unlink(missing_ok=True)
    (output / "build.json").write_text(json.dumps(record, indent=2) + "\n")
    failed = [f"{name} library not built: {record[name]['reason']}" for name in wanted if not record[name]["built"]]
    if failed and mode != "auto":
        raise SystemExit(f"KDK_BUILD={mode}: " + "; ".join(failed))
    return record


def sentence(record: dict) -> str:
    """One sentence for a person who has just built or installed."""
    if record["cpu"]["built"]:
        built = "compiled CPU library"
        if record["cuda"]["built"]:
            code, size = record["cuda"]["code"], record["cuda"]["bytes"]
            built += f" and CUDA library ({', '.join(code)}: {size / 1e6:.1f} MB)"
        return f"kdkernels: {built} built."
    return f"kdkernels: running in pure Python, which is slower on the CPU: {record['cpu']['reason']}."


def main(arguments: list[str]) -> int:
    mode = arguments[0] if arguments else os.environ.get("KDK_BUILD") or "auto"
    record = build(mode, ROOT / "kdkernels" / "_lib", ROOT / "build")
    print(sentence(record))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
