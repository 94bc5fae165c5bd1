# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel x default configuration compiles for three architectures inside its budget, without a GPU.

`tests/budgets.json` holds registers and shared memory as last seen; spills are always 0. After a deliberate change:
`python tests/test_compile_only.py` compiles everything and writes the file anew.
"""

import importlib
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
triton = pytest.importorskip("triton", reason="triton is not installed: there is nothing to compile")

BUDGETS = Path(__file__).with_name("budgets.json")
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}  # bytes a block may use
SLACK = 1.1  # registers and shared memory may grow by a tenth before someone has to look

pytestmark = pytest.mark.compile_only


def _cases():
    from kdkernels.registry import OPS

    folder = Path(__file__).resolve().parent.parent / "kdkernels"
    families = sorted({op.family for op in OPS.values() if "triton" in op.backends})
    cases = {}
    for family in families:
        if folder.joinpath(*family.split("."), "signatures.py").is_file():
            module = importlib.import_module(f"kdkernels.{family}.signatures")
            cases |= {case.name: case for case in module.compile_cases()}
    return cases


def _ptxas(architecture: int) -> str:
    """The assembler that Triton itself uses for this architecture."""
    from triton.backends.nvidia.compiler import get_ptxas

    return get_ptxas(architecture).path


def resources(case, architecture: int) -> dict:
    """Registers, spill bytes, shared memory and whether the products use wgmma."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(fn=case.kernel, signature=case.signature, constexprs=case.constants, attrs=case.attributes)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    suffix = "a" if architecture >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        command = [
            _ptxas(architecture),
            "-v",
            "--regAllocOptLevel=2",
            f"--gpu-name=sm_{architecture}{suffix}",
            str(ptx),
            "-o",
            os.devnull,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    report = done.stderr
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)]
    assert spills, f"ptxas reported no spill line for {case.name}: {report}"
    return {
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "spills": sum(spills),
        "shared": compiled.metadata.shared,
        "wgmma": "wgmma" in compiled.asm["ptx"],
    }


@pytest.fixture(scope="session")
def cases(real_triton):
    return _cases()


@pytest.fixture(scope="session")
def real_triton():
    """Kernels imported under the interpreter cannot be compiled; the interpreter leg runs in a process of its own."""
    assert os.environ.get("TRITON_INTERPRET", "0") != "1", "run this leg without TRITON_INTERPRET"


NAMES = sorted(json.loads(BUDGETS.read_text())) if BUDGETS.exists() else []


def test_the_budgets_list_every_kernel_in_every_default_configuration(cases):
    assert sorted(cases) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_kernel_compiles_inside_its_budget(name, cases):
    budget = json.loads(BUDGETS.read_text())[name]
    for architecture in cases[name].architectures:
        seen, allowed = resources(cases[name], architecture), budget[f"sm_{architecture}"]
        assert seen["spills"] == 0, f"sm_{architecture}: {seen}"
        assert seen["registers"] <= min(255, SLACK * allowed["registers"]), f"sm_{architecture}: {seen}"
        assert seen["shared"] <= min(SHARED_LIMIT[architecture], SLACK * allowed["shared"]), (
            f"sm_{architecture}: {seen}"
        )
        if architecture == 90 and cases[name].tensor_cores:
            assert seen["wgmma"], f"the half-precision products of {name} do not use wgmma on sm_90"


if __name__ == "__main__":
    table = {}
    for case_name, compile_case in sorted(_cases().items()):
        table[case_name] = {f"sm_{a}": resources(compile_case, a) for a in compile_case.architectures}
        print(case_name, table[case_name], flush=True)
    BUDGETS.write_text(json.dumps(table, indent=1) + "\n")
