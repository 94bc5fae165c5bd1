# SPDX-License-Identifier: Apache-2.0
"""The compiled CPU library: its sums are float64's, its refusals say why, and without it the package still works."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import ROOT, needs_native

import kdkernels as kd
from kdkernels import backend, native
from kdkernels.backend import implementation
from kdkernels.registry import OPS
from kdkernels.testing.case import evaluate, rounded

NOTHING = -(2**31)  # a diagonal outside every panel: nothing is left out
needs_library = needs_native()
EPSILON = torch.finfo(torch.float64).eps


def native_moments(k, l, diagonal=NOTHING, symmetric=True):
    return torch.ops.kdkernels.panel_moments(k, l, diagonal, symmetric)


def terms(k, l, diagonal=NOTHING):
    """[5, r, c] in float64: k, l, k^2, k l, l^2 with the left-out entries at zero."""
    r, c = k.shape
    left_out = torch.arange(c) == torch.arange(r)[:, None] + diagonal
    k, l = (panel.double().masked_fill(left_out, 0.0) for panel in (k, l))
    return torch.stack([k, l, k * k, k * l, l * l])


def assert_sums(found, term, dim):
    """Within the rounding of a float64 sum: a few eps of the sum of absolute values, times a short chain of lanes."""
    expected, scale = term.sum(dim), term.abs().sum(dim)
    chain = 2 + term.shape[dim] / 8
    assert found.shape == expected.shape and found.dtype == torch.float64
    assert ((found - expected).abs() <= chain * EPSILON * scale).all()


@pytest.fixture
def panels():
    generator = torch.Generator().manual_seed(0)

    def make(r, c, dtype=torch.float32):
        return torch.randn(2, r, c, generator=generator, dtype=torch.float64).add(0.3).to(dtype)

    return make


class TestMoments:
    pytestmark = needs_library

    # 0, 1, 2, 7: empty, single, below one lane; 64 and 512 are the tile, 65 and 513 one past it, 4 rows make a group
    @pytest.mark.parametrize(
        "shape", [(0, 5), (5, 0), (1, 1), (2, 7), (7, 2), (64, 512), (67, 513), (130, 1030)], ids=str
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("diagonal", [NOTHING, -3, 0, 5, 2**63 - 1])
    def test_rows_and_columns_are_the_float64_sums(self, panels, shape, dtype, diagonal):
        k, l = panels(*shape, dtype)
        rows, columns = native_moments(k, l, diagonal)
        assert_sums(rows, terms(k, l, diagonal), 2)
        assert_sums(columns, terms(k, l, diagonal), 1)

    # the diagonal enters at a corner, runs out at the other, and touches nothing: every way it can cut a lane or a tile
    @pytest.mark.parametrize("diagonal", [-40, -39, -9, -1, 1, 7, 8, 511, 512, 519, 520])
    def test_a_diagonal_is_left_out_wherever_it_lies(self, panels, diagonal):
        k, l = panels(40, 520)
        rows, columns = native_moments(k, l, diagonal)
        assert_sums(rows, terms(k, l, diagonal), 2)
        assert_sums(columns, terms(k, l, diagonal), 1)

    def test_without_symmetric_there_are_no_columns_and_the_rows_are_the_same(self, panels):
        k, l = panels(33, 77)
        rows, columns = native_moments(k, l, 2, False)
        assert columns.shape == (5, 0)
        assert torch.equal(rows, native_moments(k, l, 2, True)[0])

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_what_is_left_out_may_hold_anything(self, panels, bad):
        k, l = panels(70, 530)
        i = torch.arange(70)
        clean = native_moments(k, l, 3)
        k[i, i + 3] = bad
        l[i, i + 3] = bad
        assert all(torch.equal(a, b) for a, b in zip(native_moments(k, l, 3), clean, strict=True))

    def test_a_nan_reaches_its_own_row_and_column_and_no_other(self, panels):
        k, l = panels(20, 30)
        k[4, 9] = float("nan")
        rows, columns = native_moments(k, l)
        assert rows[[0, 2, 3]].isnan().nonzero()[:, 1].unique().tolist() == [4]
        assert columns[[0, 2, 3]].isnan().nonzero()[:, 1].unique().tolist() == [9]
        assert rows[[1, 4]].isfinite().all() and columns[[1, 4]].isfinite().all()

    def test_rows_may_lie_apart_and_the_gap_is_never_read(self, panels):
        k, l = panels(13, 21)
        wide = torch.full((13, 50), float("nan"))
        wide[:, 5:26] = k
        found = native_moments(wide[:, 5:26], l[:1].expand(13, 21))
        expected = terms(k, l[:1].expand(13, 21))
        assert_sums(found[0], expected, 2)
        assert_sums(found[1], expected, 1)

    def test_a_single_column_of_any_stride_is_dense(self, panels):
        k, l = panels(9, 4)
        rows, _ = native_moments(k[:, 1:2], l[:, 2:3])
        assert_sums(rows, terms(k[:, 1:2], l[:, 2:3]), 2)

    def test_the_bits_do_not_depend_on_the_run_or_the_number_of_threads(self, panels, same_bits):
        k, l = panels(300, 1100)
        same_bits(lambda: native_moments(k, l, 7))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda k, l: (k.int(), l.int()), "k is Int: pass float32 or float64"),
            (lambda k, l: (k, l.half()), "l is Half: pass float32 or float64"),
            (lambda k, l: (k, l.double()), "k is Float and l is Double: cast them to one dtype"),
            (lambda k, l: (k, l[:5]), r"k is \[6, 7\] and l is \[5, 7\]"),
            (lambda k, l: (k[0], l[0]), r"k has 1 dimensions: pass a panel \[r, c\]"),
            (lambda k, l: (k, l.t().contiguous().t()), r"l has column stride 6: pass l.contiguous\(\)"),
        ],
    )
    def test_a_wrong_argument_is_named_with_its_fix(self, panels, change, message):
        with pytest.raises(ValueError, match=message):
            native_moments(*change(*panels(6, 7)))


# what the cases of an op leave out: shorter ways that only a caller of its own takes
SHORTER = {
    "cka": lambda x, y: kd.losses.RCKALoss(backend="cpp")(x, y).backward(),
    "distillation_kl": lambda x, y: kd.distillation_kl(x, y, backend="cpp").backward(),
}


class Seen:
    """`torch.ops.kdkernels` that remembers the operators it was asked for, each with one call of every kind."""

    def __init__(self, operators):
        self.operators, self.calls = operators, {}

    def __getattr__(self, name):
        operator, calls = getattr(self.operators, name), self.calls.setdefault(name, {})

        def run(*arguments):
            kept = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in arguments]
            calls.setdefault(tuple(a is None for a in arguments), kept)
            return operator(*arguments)

        run.default = run
        return run


class TestRegistry:
    pytestmark = needs_library

    @pytest.mark.parametrize("op", [op for op in OPS.values() if "cpp" in op.backends], ids=lambda op: op.name)
    def test_an_op_calls_the_operators_that_it_names_and_they_hold_what_they_declare(self, op, monkeypatch):
        """A library that lacks one says so, and is left out, before a call fails in it; and schemas are right."""
        compiled = set()
        for path in (ROOT / "csrc").rglob("*_cpu.cpp"):
            compiled.update(re.findall(r'm\.impl\("(\w+)"', path.read_text()))
        implementation(f"kdkernels.{op.family}", "cpp")  # what it registers as it is imported is no call
        seen = Seen(torch.ops.kdkernels)
        monkeypatch.setattr(torch.ops, "kdkernels", seen)
        for case in importlib.import_module(f"kdkernels.{op.family}.spec").cases(op.name, "cpp", quick=True):
            evaluate(case, rounded(case, case.dtypes[0], "cpu"), "cpp", torch.ones_like)
        if op.name in SHORTER:
            SHORTER[op.name](torch.randn(9, 5, requires_grad=True), torch.randn(9, 5))
        assert seen.calls.keys() & compiled == set(op.operators("cpu"))
        assert native.lack("cpu", op.operators("cpu")) is None
        monkeypatch.undo()
        for name in op.operators("cpu"):
            for arguments in seen.calls[name].values():
                operator = getattr(torch.ops.kdkernels, name).default
                torch.library.opcheck(operator, arguments, test_utils="test_schema")

    def test_a_library_of_another_state_is_left_out_and_says_what_it_lacks(self, monkeypatch):
        implements = native._implements
        monkeypatch.setattr(native, "_implements", lambda at, name: name != "centre_rows" and implements(at, name))
        x = torch.randn(8, 4)
        with pytest.raises(RuntimeError, match="gram_mse here: the compiled CPU library has no centre_rows: build it"):
            kd.explain("gram_mse", x, x, backend="cpp")
        assert kd.explain("mmd", x, x).backend == "torch"


class TestLoader:
    """Each reason is kept, in words that name the remedy; `_load` and `status.__wrapped__` skip the cache."""

    def test_has_refuses_an_unknown_library(self):
        with pytest.raises(ValueError, match="give 'cpu' or 'cuda'"):
            native.has("rocm")

    def test_a_reason_is_empty_exactly_when_the_library_is_loaded(self):
        status = native.status()
        assert status.cpu == (not status.cpu_reason) == native.has("cpu")
        assert status.cuda == (not status.cuda_reason) == native.has("cuda")

    def test_without_a_build_it_says_how_to_run_one(self, monkeypatch, tmp_path):
        monkeypatch.setattr(native, "_FOLDER", tmp_path)
        status = native.status.__wrapped__()
        assert (status.cpu, status.cuda, status.build) == (False, False, {})
        assert "no build was run (python csrc/build.py)" in status.cpu_reason

    def test_the_reason_of_the_build_is_repeated(self, monkeypatch, tmp_path):
        (tmp_path / "build.json").write_text('{"cpu": {"built": false, "reason": "no C++ compiler found"}}')
        monkeypatch.setattr(native, "_FOLDER", tmp_path)
        assert native.status.__wrapped__().cpu_reason == "compiled CPU library not built: no C++ compiler found"

    @pytest.mark.parametrize("text", ["", "not json", "[]", '{"cpu": 3}'])
    def test_a_damaged_build_record_does_no_harm(self, monkeypatch, tmp_path, text):
        (tmp_path / "build.json").write_text(text)
        monkeypatch.setattr(native, "_FOLDER", tmp_path)
        assert "not built" in native.status.__wrapped__().cpu_reason

    def test_a_library_that_does_not_load_keeps_the_loaders_own_words(self, monkeypatch, tmp_path):
        (tmp_path / "libkdkernels_cpu.so").write_bytes(b"not a library")
        monkeypatch.setattr(native, "_FOLDER", tmp_path)
        reason = native._load("cpu", {})
        assert reason.startswith("compiled CPU library did not load: ")
        assert "libkdkernels_cpu.so" in reason and "Could not load this library" not in reason

    def test_an_older_torch_is_named(self, monkeypatch, tmp_path):
        (tmp_path / "libkdkernels_cpu.so").write_bytes(b"")
        monkeypatch.setattr(native, "_FOLDER", tmp_path)
        monkeypatch.setattr(native.torch, "__version__", "2.9.1+cpu")
        found = native._load("cpu", {"torch": "2.10"})
        assert found == "the compiled libraries need torch >= 2.10, this is 2.9.1+cpu"

    @pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to make a library with")
    def test_a_system_that_is_older_than_the_one_it_was_built_on_is_named_with_the_remedy(self, monkeypatch, tmp_path):
        (tmp_path / "later").mkdir()
        (tmp_path / "map").write_text("GLIBC_9.9 { global: of_later; };")
        make = ["gcc", "-shared", "-fPIC", "-x", "c", "-"]
        later = tmp_path / "later" / "libc.so.6"
        options = [f"-Wl,--version-script={tmp_path / 'map'}", "-Wl,-soname,libc.so.6", "-o", str(later)]
        subprocess.run([*make, "-nostdlib", *options], input=b"void of_later(void) {}", check=True)
        calls = b"void of_later(void); void calls(void) { of_later(); }"
        made = [str(later), "-o", str(tmp_path / "libkdkernels_cpu.so")]
        subprocess.run([*make, "-x", "none", *made], input=calls, check=True)
        monkeypatch.setattr(native, "_FOLDER", tmp_path)
        assert native._load("cpu", {}) == (
            "compiled CPU library did not load: it needs glibc 9.9, this system's is older: build it here "
            "(pip install --no-binary kdkernels kdkernels)"
        )

    def test_a_cpu_torch_does_not_try_the_cuda_library(self, monkeypatch, tmp_path):
        (tmp_path / "libkdkernels_cuda.so").write_bytes(b"")
        monkeypatch.setattr(native, "_FOLDER", tmp_path)
        monkeypatch.setattr(native.torch.version, "cuda", None)
        assert "has no CUDA: install a CUDA build of torch" in native._load("cuda", {})

    @pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
    @pytest.mark.skipif(not (native._FOLDER / "libkdkernels_cuda.so").exists(), reason="the CUDA library is not built")
    def test_beside_a_cpu_torch_the_cuda_library_is_there_and_says_why_it_is_not_loaded(self):
        status = native.status()
        assert status.build["cuda"]["built"] and not status.cuda
        assert status.cuda_reason == f"this torch ({torch.__version__}) has no CUDA: install a CUDA build of torch"

    def test_importing_loads_nothing_and_the_environment_can_switch_it_off(self):
        code = (
            "import torch; from kdkernels import native; "
            "assert native.status.cache_info().currsize == 0; "
            "assert not hasattr(torch.ops.kdkernels, 'panel_moments'); "
            "assert not native.has('cpu') and native.status().cpu_reason == 'switched off by KDK_NATIVE=0'"
        )
        environment = {**os.environ, "KDK_NATIVE": "0"}
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, result.stderr


class TestMissed:
    """A build that fell back says so when the package is first used: pip shows nothing of what a build prints."""

    REASON = "no torch headers found in this environment: ... or set KDK_TORCH_INCLUDE to torch/include"

    def warned(self, monkeypatch, entry, op="cka"):
        build = {"mode": "auto", "cpu": entry}
        reason = f"compiled CPU library not built: {entry['reason']}"
        status = native.Status(False, reason, False, "", build)
        monkeypatch.setattr(native, "status", lambda: status)
        caches = (backend._choose_cached, backend._warn)
        for cached in caches:
            cached.cache_clear()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(2):
                assert backend.resolve(op, "auto", "cpu", (torch.float32,)) == "torch"
                assert backend.resolve(op, "torch", "cpu", (torch.float32,)) == "torch"
        for cached in caches:
            cached.cache_clear()
        return [str(warning.message) for warning in seen]

    def test_where_there_is_a_compiler_one_warning_says_why_and_what_to_do(self, monkeypatch):
        monkeypatch.delenv("KDK_NATIVE", raising=False)
        (seen,) = self.warned(monkeypatch, {"built": False, "reason": self.REASON, "could": True})
        assert seen == (
            f"compiled CPU library not built: {self.REASON} (here {Path(torch.__file__).parent / 'include'}). "
            "The next backend in line runs instead: kdkernels.explain names it"
        )

    def test_where_nothing_can_compile_or_it_was_not_asked_for_or_switched_off_none_does(self, monkeypatch):
        could = {"built": False, "reason": self.REASON, "could": True}
        assert not self.warned(monkeypatch, could | {"could": False})
        assert not self.warned(monkeypatch, {"built": False, "reason": "not asked for: KDK_BUILD=none"})
        assert not self.warned(monkeypatch, could, op="nystrom_cka")  # has no compiled code on the CPU
        monkeypatch.setenv("KDK_NATIVE", "0")
        assert not self.warned(monkeypatch, could)
