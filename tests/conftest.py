# SPDX-License-Identifier: Apache-2.0
"""What every test shares: one thread, fixed seeds, and which backends and devices can run here."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

# before torch reads it: a graph compiled from an older state of these sources would run in place of what is tested
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import pytest
import torch

from kdkernels import native

ROOT = Path(__file__).resolve().parent.parent


def needs_native(*operators: str):
    """Marks: of the compiled CPU library, and skipped where it, or one of these operators, is not there."""
    why = native.lack("cpu", operators)
    return [pytest.mark.native, pytest.mark.skipif(why is not None, reason=why or "loaded")]


# the library's own backends on the CPU; triton runs in a process of its own, under TRITON_INTERPRET=1
BACKENDS = ["reference", "torch", pytest.param("cpp", marks=needs_native())]
FAST = BACKENDS[1:]


def load_by_path(path):
    """A script as a module: what is no part of a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_configure(config):
    if "OMP_NUM_THREADS" not in os.environ:  # the tensors are small: a second thread only waits
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    # files with long tests first: the many short ones at the end keep all workers busy to the last
    long = {item.path for item in items if any(map(item.get_closest_marker, ("slow", "interpret", "demo")))}
    items.sort(key=lambda item: item.path not in long)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch finds no CUDA device"))


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """Sets the number of threads; after the test it is what it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def same_bits(threads):
    """Asserts that a call gives the same bits twice on one thread, and on more."""

    def check(call, *more: int):
        results = []
        for count in (1, 1, 2, 3, *more):
            threads(count)
            results.append(call())
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    return check


@pytest.fixture
def nothing_compiled_before():
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def cuda_library() -> Path:
    """The compiled CUDA library, which no GPU is needed to read; skips where it cannot be, or was not to be, built."""
    library, record = native._FOLDER / "libkdkernels_cuda.so", native._read_build_record()
    if load_by_path(ROOT / "csrc" / "build.py").find_nvcc() is None:
        pytest.skip("nvcc not found: the CUDA library cannot be built here")
    if os.environ.get("KDK_BUILD", record.get("mode")) in ("none", "cpu") and not library.exists():
        pytest.skip("the CUDA library was not asked for: KDK_BUILD=none or cpu")
    # fails rather than skips: a build that silently stopped working must not look like a machine without nvcc
    assert library.exists(), record.get("cuda", "no build was run (python csrc/build.py)")
    return library


@pytest.fixture
def python():
    """Runs Python in the repository root with more environment variables; returns the finished process."""

    def run(*arguments: str, timeout: float = 600, **environment: str) -> subprocess.CompletedProcess:
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)

    return run
