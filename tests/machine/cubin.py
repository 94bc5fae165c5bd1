# SPDX-License-Identifier: Apache-2.0
"""What a compiled kernel is made of: its disassembly, where its parameters go, and its banks of constants."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

KEPT = Path(__file__).resolve().parents[2] / "build" / "machine"  # ignored by git


class MachineError(RuntimeError):
    """Why compiled code cannot be executed here."""


def tool(name: str) -> str:
    """cuobjdump or nvdisasm: of the triton package, or of a CUDA toolkit on the PATH."""
    spec = importlib.util.find_spec("triton")
    inside = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name if spec else None
    if inside and os.access(inside, os.X_OK):
        return str(inside)
    if found := shutil.which(name):
        return found
    raise MachineError(f"{name} is neither in the triton package nor on the PATH: pip install triton")


def _cuobjdump(*arguments: str, **how) -> subprocess.CompletedProcess:
    command = tool("cuobjdump")
    # it starts nvdisasm, which stands beside it
    paths = os.pathsep.join([str(Path(command).parent), os.environ.get("PATH", "")])
    return subprocess.run(
        [command, *arguments], capture_output=True, text=True, env={**os.environ, "PATH": paths}, **how
    )


def listing(cubin: bytes, *options: str) -> str:
    """The disassembly, of every function unless an option names one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = _cuobjdump("-sass", *options, str(path))
    if done.returncode or "Function : " not in done.stdout:
        raise MachineError(f"cuobjdump cannot read this kernel: {(done.stderr or done.stdout).strip()[:500]}")
    return done.stdout


def disassembly(cubin: bytes, name: str) -> str:
    """Of one function, as text; kept by content."""
    kept = KEPT / "sass" / f"{hashlib.sha256(cubin + name.encode()).hexdigest()[:24]}.sass"
    if kept.is_file():
        return kept.read_text()
    text = listing(cubin, "-fun", name)
    kept.parent.mkdir(parents=True, exist_ok=True)
    written = kept.with_suffix(f".{os.getpid()}")
    written.write_text(text)
    written.replace(kept)
    return text


class Section(NamedTuple):
    content: bytes
    info: int  # of code: its symbol, below bit 24


def of_library(library: Path, architecture: int) -> list[bytes]:
    """The compiled files for one architecture in a library that nvcc made."""
    with tempfile.TemporaryDirectory() as folder:
        done = _cuobjdump("-xelf", "all", str(library.resolve()), cwd=folder)
        found = sorted(Path(folder).glob(f"*.sm_{architecture}*.cubin"))
        if done.returncode or not found:
            raise MachineError(f"{library} holds nothing for sm_{architecture}: {(done.stderr or done.stdout)[:500]}")
        return [path.read_bytes() for path in found]


@lru_cache(maxsize=8)
def sections(cubin: bytes) -> dict[str, Section]:
    """Name -> section of an ELF64 file; zeros for what the file does not hold."""
    if cubin[:5] != b"\x7fELF\x02":
        raise MachineError("this is no compiled kernel: it does not begin like a 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<3H", cubin, 58)
    heads = [struct.unpack_from("<IIQQQQII", cubin, table + i * size) for i in range(count)]
    strings = cubin[heads[names][4] :]
    out = {}
    for name, kind, _, _, offset, length, _, info in heads:
        text = strings[name : strings.index(b"\0", name)].decode()
        content = bytes(length) if kind == 8 else cubin[offset : offset + length]  # 8: nothing in the file
        out[text] = Section(content, info)
    return out


KPARAM_INFO, PARAM_CBANK, REGCOUNT = 0x17, 0x0A, 0x2F


def _attributes(info: bytes):
    """(attribute, payload) of a .nv.info section: format, attribute, then two bytes, or as many as two bytes say."""
    at = 0
    while at < len(info):
        form, attribute, value = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == 4:
            yield attribute, info[at : at + value]
            at += value


class Layout:
    """Of a kernel's parameters in constant bank 0: (offset, size) of each, in the order declared."""

    def __init__(self, info: bytes):
        found = {}
        for attribute, payload in _attributes(info):
            if attribute == PARAM_CBANK:
                _, self.start, self.size = struct.unpack("<IHH", payload)
            elif attribute == KPARAM_INFO:
                _, ordinal, offset, packed = struct.unpack("<IHHI", payload)
                found[ordinal] = offset, packed >> 18
        self.parameters = [found[ordinal] for ordinal in sorted(found)]


class Cubin:
    """One function of a compiled file."""

    def __init__(self, name: str, binary: bytes):
        parts = sections(binary)
        if f".nv.info.{name}" not in parts:
            raise MachineError(f"the compiled file has no kernel {name}")
        self.name, self.binary = name, binary
        self.layout = Layout(parts[f".nv.info.{name}"].content)
        counted = dict(
            struct.unpack("<2I", payload) for a, payload in _attributes(parts[".nv.info"].content) if a == REGCOUNT
        )
        self.registers = counted[parts[f".text.{name}"].info & 0xFFFFFF]  # of a lane
        nothing = Section(b"", 0)
        self.shared_bytes = len(parts.get(f".nv.shared.{name}", nothing).content)  # declared in the kernel
        self.listing = disassembly(binary, name)
        (arch,) = set(re.findall(r"code for sm_(\d+)", self.listing)) or {""}
        self.architecture = int(arch or 0)
        banks = {section: re.fullmatch(r"\.nv\.constant([1-9]\d*)(?:\.(.*))?", section) for section in parts}
        self.constants = {
            int(m[1]): parts[section].content
            for section, m in banks.items()
            # addresses of global variables are not known
            if m
            and m[2] in (None, name)
            and not any(parts.get(f"{kind}{section}", nothing).content for kind in (".rel", ".rela"))
        }
