# SPDX-License-Identifier: Apache-2.0
"""The CUDA library on devices that it does not run on: asked once, told once, and the next backend in line runs."""

import contextlib
import json
import warnings

import pytest
import torch
from torch._subclasses import FakeTensorMode

import kdkernels as kd
from kdkernels import __main__ as command
from kdkernels import backend, native
from kdkernels.registry import LONGEST_ROW, OPS

NO_IMAGE = "no kernel image is available (its runtime is CUDA 13.0, the driver serves 12.4)"
FLOAT = (torch.float32,)
OLD = "the compiled CUDA library does not run on Old, compute capability 7.5: "


class Machine:
    """A loaded CUDA library beside device 0, on which it does not run, and device 1, on which it does."""

    names, capabilities = ("Old", "New"), [(7, 5), (9, 0)]

    def __init__(self):
        self.current, self.asked, self.answers = 0, [], {0: NO_IMAGE}

    @contextlib.contextmanager
    def device(self, index):
        before, self.current = self.current, index
        yield
        self.current = before

    def ask(self):
        self.asked.append(self.current)
        return self.answers.get(self.current, "")


@pytest.fixture
def machine(monkeypatch):
    made = Machine()
    record = {"cuda": {"built": True, "code": ["sm_80", "sm_90a", "compute_90"]}}
    status = native.status()._replace(cuda=True, cuda_reason="", build=record)
    implements = native._implements
    monkeypatch.setattr(native, "status", lambda: status)
    monkeypatch.setattr(native, "_implements", lambda at, name: at == "cuda" or implements(at, name))
    monkeypatch.setattr(native, "_ask_library", made.ask)
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: made.current,
        "device": made.device,
        "get_device_capability": lambda index: made.capabilities[index],
        "get_device_name": lambda index: made.names[index],
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    caches = (native._refusal, backend._choose_cached, backend._warn)
    for cached in caches:
        cached.cache_clear()
    yield made
    for cached in caches:
        cached.cache_clear()


def resolved(*devices, op="soft_sort"):
    """The backends that run, and what was warned of on the way."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = [backend.resolve(op, "auto", device, FLOAT) for device in devices]
    return found, [str(warning.message) for warning in seen]


def test_a_device_is_asked_once_and_the_one_warning_says_what_where_and_the_remedy(machine):
    found, seen = resolved("cuda:0", "cuda:1", "cuda:0")
    assert found == ["torch", "cuda", "torch"]
    assert seen == [
        f"{OLD}{NO_IMAGE}. It holds sm_80, sm_90a, compute_90: its kernels need a device of compute capability 8.0 or "
        "more. The next backend in line runs instead: kdkernels.explain names it"
    ]
    assert resolved("cuda:0", op="spearman_corr") == (["torch"], [])
    assert sorted(machine.asked) == [0, 1]


def test_a_driver_that_is_too_old_is_to_be_updated(machine):
    machine.answers = {1: "CUDA driver version is insufficient"}
    (seen,) = resolved("cuda:1")[1]
    assert "does not run on New, compute capability 9.0: CUDA driver version is insufficient. It holds " in seen
    assert ": update the driver, or build the library on this machine (python csrc/build.py cuda). " in seen


def test_a_request_raises_with_the_reason_or_runs_and_nothing_is_warned_of(machine):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="cannot run soft_sort here: " + OLD):
            backend.resolve("soft_sort", "cuda", "cuda:0", FLOAT)
        assert backend.resolve("soft_sort", "cuda", "cuda:1", FLOAT) == "cuda"
        assert backend.resolve("soft_sort", "torch", "cuda:0", FLOAT) == "torch"


def test_explain_and_info_give_the_reason_without_a_warning(machine):
    with warnings.catch_warnings(), FakeTensorMode():
        warnings.simplefilter("error")
        here, there = (torch.empty(2, 3, device=f"cuda:{k}") for k in range(2))
        assert str(kd.explain("soft_sort", here)).startswith(f"soft_sort runs on torch: not cuda: {OLD}{NO_IMAGE}. ")
        assert str(kd.explain("soft_sort", there)) == "soft_sort runs on cuda: the first choice"
        assert kd.available_backends("cuda")["cuda"].startswith(OLD)  # the current device
        told = " ".join(command.info().split())
    assert f"cuda loaded, sm_80, sm_90a, compute_90 cuda:0: {OLD}" in told and "cuda:1: " not in told


def test_without_the_library_rows_that_a_program_holds_are_ranked_in_triton_and_explain_says_why_not_longer_ones(
    machine, monkeypatch
):
    monkeypatch.setattr(backend, "_triton_found", lambda: True)
    with FakeTensorMode():
        rows, long = (torch.empty(2, n, device="cuda:0") for n in (LONGEST_ROW, LONGEST_ROW + 1))
        assert str(kd.explain("soft_rank", rows)).startswith(f"soft_rank runs on triton: not cuda: {OLD}{NO_IMAGE}. ")
        said = str(kd.explain("soft_rank", long))
    assert said.startswith("soft_rank runs on torch: not cuda: ")
    assert "; not triton: the rows have more than the 2,048 entries that a Triton program holds; " in said
    with pytest.raises(RuntimeError, match="cannot run soft_rank here: the rows have more than the 2,048 entries"):
        backend.resolve("soft_rank", "triton", "cuda:0", FLOAT, True)


@pytest.mark.parametrize("op", [op.name for op in OPS.values() if "cuda" in op.backends])
def test_every_op_of_the_library_asks_the_device_of_its_tensors(op, machine, monkeypatch):
    monkeypatch.setattr(backend, "obstacle", lambda name, device, *rest: seen.add(device))
    monkeypatch.setattr(native, "refusal", lambda device: None)
    for k in range(2):
        seen = set()
        with FakeTensorMode(), contextlib.suppress(Exception):  # nothing runs on a device that is not there
            rows = torch.empty(2, 3, device=f"cuda:{k}")
            getattr(kd, op)(*[rows] * (2 if "spearman" in op else 1))
        assert seen == {f"cuda:{k}"}


def test_a_compiled_step_takes_the_answer_as_a_constant(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the compiler asks, too
    monkeypatch.setattr(native, "refusal", lambda device: OLD)

    def step(x):
        return x * len(backend.resolve("soft_sort", "auto", "cuda:0", (x.dtype,)))

    with pytest.warns(UserWarning, match=OLD):
        assert torch.compile(step, fullgraph=True, backend="eager")(torch.ones(2)).tolist() == [5.0, 5.0]


@pytest.mark.parametrize("missing", ["device", "library"])
def test_where_there_is_nothing_to_ask_nothing_is_asked(machine, missing, monkeypatch):
    if missing == "device":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    else:
        monkeypatch.setattr(native, "has", lambda library: False)
    assert native.refusal("cuda") is None and native.refusal("cpu") is None and not machine.asked


@pytest.mark.parametrize("record", [{}, {"cuda": 3}, {"cuda": {"built": True}}], ids=json.dumps)
def test_a_build_that_recorded_nothing_is_asked_all_the_same(machine, record, monkeypatch):
    status = native.status()._replace(build=record)
    monkeypatch.setattr(native, "status", lambda: status)
    assert f"{OLD}{NO_IMAGE}. It holds code that no record names: " in native.refusal("cuda:0")


def test_a_library_that_cannot_be_asked_is_of_an_earlier_build(monkeypatch, tmp_path):
    (tmp_path / "libkdkernels_cuda.so").symlink_to(native._FOLDER / "libkdkernels_cpu.so")
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    assert native._ask_library() == "it is of an earlier build"
