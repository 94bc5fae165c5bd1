# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the compiled library, executed on the CPU under changing schedules, launched by its own code."""

import re

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


# `make machine`: every op, for sm_80 and sm_90; sm_86 has kernels without float64
@pytest.mark.parametrize("op, architecture", [("soft_rank", 86), ("spearman", 80), ("soft_sort", 90)])
def test_an_op_keeps_the_contract_in_machine_code(op, architecture, python):
    done = python("tests/machine/contract.py", op, "--backends", "cuda", "--architectures", str(architecture))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-3000:]
    assert f"{op} on sm_{architecture}: " in done.stdout and " 0 failed" in done.stdout


def test_every_instruction_of_the_library_is_modelled(python):
    done = python("tests/machine/ranks.py", "opcodes", "--architectures", "80", "86", "90")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-3000:]
    for architecture in (80, 86, 90):
        assert f"not modelled on sm_{architecture}: none" in done.stdout


def test_where_float64_is_slow_and_memory_short_rows_take_hardly_any_and_do_not_share_a_block(python):
    done = python("tests/machine/ranks.py", "float64", "--architectures", "80", "86")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-3000:]
    line = r"float64 instructions a row on sm_(\d+): (\d+), (\d) to a block"
    found = {architecture: (int(count), rows) for architecture, count, rows in re.findall(line, done.stdout)}
    assert found["86"][0] <= 200 < 1000 < found["80"][0], found
    assert (found["80"][1], found["86"][1]) == ("4", "1")  # 7 blocks of a warp fit 100 KB, or one of four


def test_rows_of_every_regime_are_ranked_as_the_oracle_ranks_them_by_warps_blocks_and_workspaces(python):
    done = python("tests/machine/ranks.py", "quick", "--architectures", "80")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-3000:]
    # which kernels: rank_rows<float, threads, keys of each>, and those of rows that go through workspace
    for kernel in ("<fLi32ELi16E>", "<fLi32ELi32E>", "<fLi128ELi8E>", "<dLi512ELi16E>", "SortKernel", "tail_kernel"):
        assert kernel in done.stdout, kernel


def test_a_barrier_that_is_taken_out_is_seen(python):
    done = python("tests/machine/mutate.py", "soft_rank", "--architectures", "80")
    assert done.returncode == 0, done.stderr[-3000:]
    seen = dict(line.rsplit(": ", 1) for line in done.stdout.splitlines())
    assert set(seen.values()) <= {"reported", "wrong result", "harmless", "harmless here"}
    barriers = [outcome for line, outcome in seen.items() if " BAR." in line]
    assert not any(outcome == "harmless here" for line, outcome in seen.items() if "WARPSYNC" not in line)
    assert len(barriers) > 20 and barriers.count("reported") > 2 * barriers.count("harmless")


def test_planted_faults_in_what_is_launched_are_seen(python):
    done = python("tests/machine/planted_cuda.py", "80")
    assert done.returncode == 0, done.stderr[-3000:]
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert said.pop("none") == said.pop("none, through workspace") == "nothing"
    expected = {
        "too little shared memory": "a shared access beyond the end",
        "a row too long": "an access outside of every argument; near ",
        "a result that is an input": "a write to what is only read: input",
        "a launch that is left out": "is read before it is written",
    }
    assert said.keys() == expected.keys()
    for name, words in expected.items():
        assert words in said[name], said[name]


ASK = """
import ctypes, sys, torch
sys.path.insert(0, "tests/machine")
from machine_build import cuda_on_machine
library = ctypes.CDLL(str(cuda_on_machine()))
library.kdkernels_cuda_refusal.restype = ctypes.c_char_p
for architecture in 80, 75:
    library.machine_set_device(None, architecture, ctypes.c_size_t(0))
    print(library.kdkernels_cuda_refusal())
"""


def test_the_library_says_on_which_devices_it_does_not_run(python):
    done = python("-c", ASK, KDK_NATIVE="0")
    assert done.returncode == 0, done.stderr[-3000:]
    runs, refused = done.stdout.splitlines()
    assert runs == "None" and refused.startswith("b'no kernel image (its runtime is CUDA 1"), done.stdout
