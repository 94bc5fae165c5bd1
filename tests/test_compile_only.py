# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel x default configuration compiles for three architectures inside its budget, without a GPU.

Where sizes and strides divide by 16 none spills. Where they do not, loads are narrow and many: each kernel is asked in
its largest configuration for float16 and for float32, and what it spills is held.
`tests/budgets.json` holds registers, spilled bytes and shared memory as last seen with the pinned Triton. After a
deliberate change, or with another Triton: `python tests/test_compile_only.py` compiles everything and writes it anew.
With the oldest Triton that pyproject.toml allows, which `make test` keeps beside the pinned one, each kernel compiles
once per set of argument types, for one architecture: `python tests/test_compile_only.py each` in its process.
"""

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
triton = pytest.importorskip("triton", reason="triton is not installed: there is nothing to compile")

BUDGETS = Path(__file__).with_name("budgets.json")
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}  # bytes a block may use
SLACK = 1.1  # registers and shared memory may grow by a tenth before someone has to look
# the assembler of Triton 3.7 gives up this many bytes a thread, mostly far below 255 registers, to fit one block more
SPILLS_AT_MOST = 64
ROOT = Path(__file__).resolve().parent.parent
FLOOR = re.search(r'"triton>=([\d.]+);', (ROOT / "pyproject.toml").read_text())[1]
OLDEST = Path(sys.prefix) / f"triton-{FLOOR}"

pytestmark = pytest.mark.compile_only


def _cases():
    from kdkernels.registry import OPS

    folder = ROOT / "kdkernels"
    families = sorted({op.family for op in OPS.values() if "triton" in op.backends})
    cases = {}
    for family in families:
        for place in (family, f"{family}.triton_impl"):
            if folder.joinpath(*place.split("."), "signatures.py").is_file():
                module = importlib.import_module(f"kdkernels.{place}.signatures")
                cases |= {case.name: case for case in module.compile_cases()}
    return cases


def _ptxas(architecture: int) -> str:
    """The assembler that Triton itself uses for this architecture."""
    from triton.backends.nvidia.compiler import get_ptxas

    return get_ptxas(architecture).path


def compiled_for(case, architecture: int):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(fn=case.kernel, signature=case.signature, constexprs=case.constants, attrs=case.attributes)
    options = {"num_warps": case.warps, "num_stages": case.stages, "maxnreg": case.registers}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def assembled(ptx: str, architecture: int) -> str:
    """What the assembler says of a kernel, where Triton has it in its cache."""
    suffix = "a" if architecture >= 90 else ""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        how = ["-v", "--regAllocOptLevel=2", f"--gpu-name=sm_{architecture}{suffix}", source.name, "-o", os.devnull]
        done = subprocess.run([_ptxas(architecture), *how], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


def resources(case, architecture: int) -> dict:
    """Registers, spill bytes, shared memory and whether the products use wgmma."""
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = compiled_for(case, architecture)
    report = log.getvalue() or assembled(compiled.asm["ptx"], architecture)
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)]
    assert spills, f"ptxas reported no spill line for {case.name}: {report}"
    return {
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "spills": sum(spills),
        "shared": compiled.metadata.shared,
        "wgmma": "wgmma" in compiled.asm["ptx"],
    }


def largest_unaligned(cases: dict, budgets: dict) -> dict[str, tuple[int, ...]]:
    """Name -> architectures, of those cases that are asked of sizes that do not divide by 16, too."""
    largest = {}
    for name, case in cases.items():
        key = case.kernel.fn.__module__, case.kernel.__name__, "float32" in name
        size = max(numbers["registers"] for numbers in budgets[name].values())
        if case.attributes != case.always and "bfloat16" not in name and 80 in case.architectures:
            largest[key] = max(largest.get(key, (0, "")), (size, name))
    return {name: (80, 90) if cases[name].tensor_cores else (80,) for _, name in largest.values()}


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
        assert seen["spills"] <= allowed["spills"] <= SPILLS_AT_MOST, f"sm_{architecture}: {seen}"
        assert seen["registers"] <= min(255, SLACK * allowed["registers"]), f"sm_{architecture}: {seen}"
        assert seen["shared"] <= min(SHARED_LIMIT[architecture], SLACK * allowed["shared"]), (
            f"sm_{architecture}: {seen}"
        )
        if architecture == 90 and cases[name].tensor_cores:
            assert seen["wgmma"], f"the half-precision products of {name} do not use wgmma on sm_90"


UNALIGNED = sorted(name for name in NAMES if "unaligned sm_80" in json.loads(BUDGETS.read_text())[name])


def test_the_budgets_list_every_kernel_for_sizes_that_do_not_divide(cases):
    budgets = json.loads(BUDGETS.read_text())
    assert sorted(largest_unaligned(cases, budgets)) == UNALIGNED
    divides = {name for name, case in cases.items() if case.attributes == case.always}
    named = {cases[name].kernel.__name__ for name in UNALIGNED}
    assert named == {case.kernel.__name__ for name, case in cases.items() if name not in divides}


@pytest.mark.parametrize("name", UNALIGNED)
def test_the_kernel_spills_no_more_than_it_did_for_sizes_that_do_not_divide(name, cases):
    budgets = json.loads(BUDGETS.read_text())
    for architecture in largest_unaligned(cases, budgets)[name]:
        seen, allowed = resources(cases[name].unaligned(), architecture), budgets[name][f"unaligned sm_{architecture}"]
        assert seen["spills"] <= allowed["spills"] <= SPILLS_AT_MOST, f"sm_{architecture}: {seen}"
        assert seen["shared"] <= min(SHARED_LIMIT[architecture], SLACK * allowed["shared"]), f"sm_{architecture}"


def compile_each() -> None:
    """Each kernel once for each set of argument types, on the newest architecture of its first configuration."""
    first = {}
    for case in _cases().values():
        first.setdefault((case.kernel.__name__, *case.signature.items()), case)
    for case in first.values():
        halves = {"*fp16", "*bf16"} & set(map(str, case.signature.values()))
        # Triton 3.6 does not compile products of halves for sm_100: backend.py does not choose it there
        compiled_for(case, case.architectures[-2 if halves and triton.__version__.startswith("3.6") else -1])
    print(f"{len({name for name, *_ in first})} kernels, {len(first)} sets of types, Triton {triton.__version__}")


def test_the_oldest_triton_compiles_every_kernel(python, cases):
    if not OLDEST.is_dir():
        pytest.skip(f"no Triton {FLOOR} in {OLDEST}: tools/env.sh puts it there where make test makes .venv")
    done = python("tests/test_compile_only.py", "each", PYTHONPATH=f"{OLDEST}{os.pathsep}{ROOT}")
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = {case.kernel.__name__ for case in cases.values()}
    assert done.stdout.startswith(f"{len(kernels)} kernels,") and f"Triton {FLOOR}" in done.stdout, done.stdout


def write_budgets() -> None:
    table = {}
    for case_name, compile_case in sorted(_cases().items()):
        table[case_name] = {f"sm_{a}": resources(compile_case, a) for a in compile_case.architectures}
        print(case_name, table[case_name], flush=True)
    for name, architectures in largest_unaligned(_cases(), table).items():
        table[name] |= {f"unaligned sm_{a}": resources(_cases()[name].unaligned(), a) for a in architectures}
        print(name, table[name], flush=True)
    BUDGETS.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    compile_each() if sys.argv[1:] == ["each"] else write_budgets()
