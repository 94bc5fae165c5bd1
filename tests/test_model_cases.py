# SPDX-License-Identifier: Apache-2.0
"""Every case of the model launches the kernels that it is to predict. Nothing is compiled or executed: a launch leaves
its name, so a kernel that was renamed, or that a schedule no longer takes at this size, is seen in seconds."""

import json
import os

import pytest
from conftest import ROOT, load_by_path

pytest.importorskip("triton", reason="triton is not installed: the model's kernels are launched through it")

pytestmark = [
    pytest.mark.machine,
    pytest.mark.compile_only,
    pytest.mark.skipif(load_by_path(ROOT / "tests" / "simt" / "build.py").compiler() is None, reason="no C++ compiler"),
    pytest.mark.usefixtures("cuda_library"),
]

NAMES = """
import json, torch
from triton.runtime.jit import JITFunction
from bench.model import cases, rows
import contract, cuda_device
from emulator import readable

launched = set()
JITFunction.run = lambda self, *arguments, **options: launched.add(self.__name__)
cuda_device.Cuda._launched = lambda self, call: launched.add(readable(call.kernel.decode()).partition("<")[0])
rows.Compiled.launch = lambda self, kernel, *how: launched.add(kernel.name)
cases.compiled = lambda source, architecture: b""
cases.isotonic = lambda on, name, **matrices: launched.add(name)
rows.library = lambda package: cuda_device.cuda_on_machine()
cases._draw = lambda *shape, dtype: torch.empty(shape, dtype=getattr(torch, dtype))
contract.allow_cpu_tensors()
devices = rows.installed({case.backend for case in cases.cases()}, 90)
for case in cases.cases():
    launched.clear()
    case.call(devices[case.backend])
    print(json.dumps([case.name, case.shape, case.dtype, sorted(case.kernels), sorted(launched)]), flush=True)
"""


def test_every_case_launches_the_kernels_that_it_predicts(python):
    done = python("-c", NAMES, KDK_NATIVE="0")
    assert done.returncode == 0, done.stderr[-3000:]
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(cases) == 20 and {name for name, *_ in cases} >= {
        "kl",
        "cka",
        "soft_rank",
        "soft_rank in triton",
        "spearman",
        "torch.sort",
        "torchsort",
    }
    missing = {" ".join(case): sorted({*wanted} - {*launched}) for *case, wanted, launched in cases}
    assert not any(missing.values()), missing


WITHOUT = """
import sys
from pathlib import Path
from bench.__main__ import main
from bench.model import incumbent
incumbent.ROOT = Path(sys.argv[1])
sys.exit(main(["model", "--case", "torchsort"]))
"""


def test_where_another_package_cannot_be_had_that_is_said(python, tmp_path):
    done = python("-c", WITHOUT, str(tmp_path), KDK_NATIVE="0", PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull)
    assert done.returncode == 0, done.stderr[-3000:]
    *_, said = done.stdout.splitlines()
    start = "torchsort 8192x1000 float32: not modelled: the source of torchsort 0.1.10 cannot be had: "
    assert said.startswith(start) and len(said) > len(start) + 10, said
