# SPDX-License-Identifier: Apache-2.0
"""Every CUDA kernel of the compiled library, on every architecture, stays inside its budget of registers and stack.

`tests/budgets_cuda.json` holds registers and static shared memory as last seen. The stack is always empty: what the
compiler spills lies there. Read from the finished library, so nothing is compiled here and no GPU is needed. After a
deliberate change: `python csrc/build.py && python tests/test_compile_only_cuda.py` writes the file anew.
"""

import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, load_by_path

from kdkernels import native

BUDGETS = Path(__file__).with_name("budgets_cuda.json")
LIBRARY = native._FOLDER / "libkdkernels_cuda.so"
ARCHITECTURES = ("sm_80", "sm_86", "sm_90a", "sm_100", "sm_120")
SLACK = 1.1  # registers may grow by a tenth before someone has to look
# a block has 65,536 registers, given out by eights: more than these do not launch
THREADS = {32: 128}  # rows of one warp share a block of four
STATIC_SHARED = 1024  # what sm_90 and later reserve; the kernels themselves use dynamic shared memory alone

pytestmark = pytest.mark.compile_only


def _build_tools():
    return load_by_path(ROOT / "csrc" / "build.py")


def _cuobjdump() -> str:
    """From the toolkit, or the one that Triton brings."""
    found = _build_tools().find_program("cuobjdump", "/usr/local/cuda/bin/cuobjdump")
    if found:
        return found
    return str(Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def short(symbol: str) -> str | None:
    """rank_rows_kernel<float, 32, 4> of a mangled name; None for what is not ours."""
    match = re.match(r"_ZN9kdkernels\d+([a-z_]+)(?:I(.*?)E)?EvNS_", symbol)
    if not match:
        return None
    arguments = []
    for kind, size, flag in re.findall(r"([fd])(?![a-z])|Li(\d+)E|Lb([01])E", (match[2] or "") + "E"):
        arguments.append({"f": "float", "d": "double"}.get(kind) or size or ("true" if flag == "1" else "false"))
    return f"{match[1]}<{', '.join(arguments)}>"


def resources() -> dict[str, dict[str, dict[str, int]]]:
    """registers, stack and static shared memory, by kernel and architecture."""
    command = [_cuobjdump(), "-res-usage", str(LIBRARY)]
    report = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    found, architecture, name = {}, None, None
    for line in report.splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = short(match[1])
        elif name and (match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line)):
            numbers = dict(zip(("registers", "stack", "shared"), map(int, match.groups()), strict=True))
            assert architecture not in found.setdefault(name, {}), f"{name} is compiled twice for {architecture}"
            found[name][architecture] = numbers
            name = None
    return found


@pytest.fixture(scope="module")
def seen(cuda_library):
    return resources()


NAMES = sorted(json.loads(BUDGETS.read_text())) if BUDGETS.exists() else []


def test_the_budgets_list_every_kernel_of_the_library(seen):
    assert sorted(seen) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_kernel_spills_nothing_and_keeps_its_registers(name, seen):
    budget = json.loads(BUDGETS.read_text())[name]
    assert sorted(seen[name]) == sorted(ARCHITECTURES)
    group = int((re.findall(r"\b\d+\b", name) or ["256"])[0])
    threads = THREADS.get(group, group)
    for architecture, now in seen[name].items():
        what = f"{name} on {architecture}: {now}, budget {budget[architecture]}"
        assert now["stack"] == 0, what
        assert now["registers"] <= SLACK * budget[architecture]["registers"], what
        assert (now["registers"] + 7) // 8 * 8 * threads <= 65536, f"does not launch: {what}"
        assert now["shared"] <= STATIC_SHARED, what


if __name__ == "__main__":
    BUDGETS.write_text(json.dumps(resources(), indent=1, sort_keys=True) + "\n")
    print(BUDGETS.read_text())
