# SPDX-License-Identifier: Apache-2.0
"""Every case of the model launches the kernels that it is to predict. Nothing is compiled or executed: a launch leaves
its name, so a kernel that was renamed, or that a schedule no longer takes at this size, is seen in seconds."""

import json

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
rows.Compiled.launch = lambda self, source, name, *how: launched.add(name)
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
    assert len(cases) == 17 and {name for name, *_ in cases} >= {"kl", "cka", "soft_rank", "spearman", "torch.sort"}
    missing = {" ".join(case): sorted({*wanted} - {*launched}) for *case, wanted, launched in cases}
    assert not any(missing.values()), missing
