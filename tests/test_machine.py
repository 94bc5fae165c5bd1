# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels as compiled for a GPU, executed on the CPU under changing schedules; planted faults are seen."""

import pytest
from conftest import ROOT, load_by_path

pytest.importorskip("triton", reason="triton is not installed: it compiles the kernels and carries the disassembler")

compiler = load_by_path(ROOT / "tests" / "simt" / "build.py").compiler()
pytestmark = [
    pytest.mark.machine,
    pytest.mark.compile_only,
    pytest.mark.skipif(compiler is None, reason="no C++ compiler"),
]
# the ops with the fewest programs to compile; `make machine` runs all of them
QUICK = ("mixup", "rkd_angle", "distillation_kl", "mixed_distillation")


@pytest.mark.parametrize("op", QUICK)
def test_an_op_keeps_the_contract_in_machine_code(op, python):
    done = python("tests/machine/contract.py", op, "--architectures", "80")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-3000:]
    assert f"{op} on sm_80: " in done.stdout and " 0 failed" in done.stdout


@pytest.mark.parametrize("architecture", [80])
def test_planted_faults_are_seen(architecture, python):
    done = python("tests/machine/planted.py", str(architecture))
    assert done.returncode == 0, done.stderr[-3000:]
    said = dict(line.removeprefix(f"{architecture} ").split(": ", 1) for line in done.stdout.splitlines())
    assert said["none"] == "nothing"
    assert said["missing mask"].startswith("Fault, sum_rows: an access outside of every argument; near ")
    assert "a block reads what another wrote: out" in said["race between blocks"]
    # what Triton's interpreter cannot show: tensor cores cut what they are given
    assert said["tf32"] == "1 + 0.000000e+00"
    assert said["tf32x3"] == said["ieee"] == f"1 + {2**-11 + 2**-20 // 2**-23 * 2**-23:.6e}"
