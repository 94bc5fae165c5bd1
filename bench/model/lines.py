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


class Line(NamedTuple):
    file: str  # without its folder
    function: str  # that it stands in
    number: int


def of_instructions(binary: bytes, name: str) -> dict[int, Line]:
    """Address -> innermost line, of one function; empty where the file has no table."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        done = subprocess.run([cubin.tool("nvdisasm"), "-gi", str(path)], capture_output=True, text=True)
    return parsed(done.stdout, name)


def parsed(listing: str, name: str) -> dict[int, Line]:
    out, here, inside, fresh = {}, None, False, True
    for text in listing.splitlines():
        if text.startswith("//-----"):
            inside, here = f".text.{name} " in text, None
        elif not inside:
            continue
        elif found := re.match(r'\s*//## File "([^"]+)", line (\d+)', text):
            if fresh:  # those below it are where it was inlined
                here, fresh = line(found[1], int(found[2])), False
        elif found := re.match(r"\s+/\*([0-9a-f]{4,6})\*/", text):
            fresh = True
            if here:
                out[int(found[1], 16)] = here
    return out


@cache
def line(path: str, number: int) -> Line:
    return Line(Path(path).name, function_at(path, number), number)


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
    return next((found[1] for found in map(begins.match, reversed(above)) if found), "")
