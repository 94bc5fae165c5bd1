# SPDX-License-Identifier: Apache-2.0
"""Where instructions come from: the line of a kernel's source, by the table that compilers leave in a file."""

from __future__ import annotations

import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import cubin


class Frame(NamedTuple):
    file: str  # without its folder
    function: str  # that the line stands in
    number: int


def of_instructions(binary: bytes, name: str) -> dict[int, list[Frame]]:
    """Address -> its line and those that it was inlined at, of one function; empty where the file has no table."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        done = subprocess.run([cubin.tool("nvdisasm"), "-gi", str(path)], capture_output=True, text=True)
    return parsed(done.stdout, name)


def parsed(listing: str, name: str) -> dict[int, list[Frame]]:
    out, frames, inside, fresh = {}, [], False, True
    for text in listing.splitlines():
        if text.startswith("//-----"):
            inside, frames = f".text.{name} " in text, []
        elif not inside:
            continue
        elif found := re.match(r'\s*//## File "([^"]+)", line (\d+)', text):
            frames = [*([] if fresh else frames), frame(found[1], int(found[2]))]
            fresh = False
        elif found := re.match(r"\s+/\*([0-9a-f]{4,6})\*/", text):
            fresh, out[int(found[1], 16)] = True, frames
    return out


def phase(frames: list[Frame]) -> str:
    """What a kernel calls, and what that calls; its own lines, and those of Triton, whose calls are not known."""
    calls = [f.function for f in reversed(frames[:-1])] or [f.function or f.file for f in frames] or ["unknown"]
    distinct = [name for name, before in zip(calls, ["", *calls], strict=False) if name and name != before]
    return " > ".join(distinct[:3]) or frames[-1].file


@cache
def frame(path: str, number: int) -> Frame:
    return Frame(Path(path).name, function_at(path, number), number)


# a function that begins on this line; a lambda or a loop within it does not count
PYTHON = re.compile(r"\s*def (\w+)\(")
C = re.compile(r"\s*(?:[\w:<>,&*]+\s+)+[&*]*(?!if|for|while|switch|return)(\w+)\([^;]*(?:\)[\w\s]*\{|,)$")


def function_at(path: str, number: int) -> str:
    """The last function that begins at or above a line; none where the file is not here."""
    try:
        above = Path(path).read_text(encoding="utf-8").splitlines()[:number]
    except OSError:
        return ""
    begins = PYTHON if path.endswith(".py") else C
    found = (begins.match(re.sub(r"__launch_bounds__\([^)]*\)", "", text)) for text in reversed(above))
    return next((match[1] for match in found if match), "")
