# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the compiled library, executed on the CPU under changing schedules, launched by its own code."""

import pytest
from conftest import ROOT, load_by_path

pytest.importorskip("triton", reason="triton is not installed: it carries the disassembler")

compiler = load_by_path(ROOT / "tests" / "simt" / "build.py").compiler()
pytestmark = [
    pytest.mark.machine,
    pytest.mark.compile_only,
    pytest.mark.skipif(compiler is None, reason="no C++ compiler"),
    pytest.mark.usefixtures("cuda_library"),
]


# `make machine`: every op, for both architectures
@pytest.mark.parametrize("op, architecture", [("soft_rank", 80), ("spearman", 80), ("soft_sort", 90)])
def test_an_op_keeps_the_contract_in_machine_code(op, architecture, python):
    done = python("tests/machine/contract.py", op, "--architectures", str(architecture))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-3000:]
    assert f"{op} on sm_{architecture}: " in done.stdout and " 0 failed" in done.stdout
