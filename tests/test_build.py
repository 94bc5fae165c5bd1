# SPDX-License-Identifier: Apache-2.0
"""What was built is loaded, what was not is explained, and make works with and without a compiler or a network."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_by_path

from kdkernels import native

TREE = ("csrc", "tools", "kdkernels", ".ci", "Makefile", "CMakeLists.txt", "setup.py", "pyproject.toml", "MANIFEST.in")
TREE += ("constraints.txt", "LICENSE")


native_build = load_by_path(ROOT / "csrc" / "build.py")
FLOOR = ".".join(map(str, native_build.FLOOR))


@pytest.fixture
def tree(tmp_path):
    """A copy of what an installation reads, so that no test writes into the checkout."""
    folder = tmp_path / "tree"
    folder.mkdir()
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("_lib", "__pycache__"))
        else:
            shutil.copy(source, folder / name)
    (folder / "README.md").write_text("# kdkernels\n")
    return folder


@pytest.fixture
def tools(tmp_path):
    """A PATH with the shell's everyday tools and nothing that compiles."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in "sh env make cat tr cksum find sort xargs dirname ls rm mkdir".split():
        (folder / name).symlink_to(shutil.which(name))
    return folder


def run(command, folder, **environment):
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "KDK_BUILD", "PYTHONPATH", "MAKEFLAGS")}
    return subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env={**inherited, **{k: str(v) for k, v in environment.items()}},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )


class TestLibrary:
    @pytest.mark.native
    def test_where_a_compiler_and_cmake_exist_the_compiled_library_is_loaded(self):
        """Fails rather than skips: a build that silently stopped working must not look like a pure-Python machine."""
        if os.environ.get("KDK_BUILD") == "none" or os.environ.get("KDK_NATIVE") == "0":
            pytest.skip("the compiled library was not asked for: KDK_BUILD=none or KDK_NATIVE=0")
        if native_build.find_compiler() is None or native_build.find_program("cmake") is None:
            pytest.skip("no C++ compiler or no cmake")
        assert native.has("cpu"), native.status().cpu_reason

    @pytest.mark.native
    @pytest.mark.parametrize("library", ["cpu", "cuda"])
    def test_the_binary_names_torch_and_neither_python_nor_the_build_machine(self, library):
        binary = native._FOLDER / f"libkdkernels_{library}.so"
        if not binary.exists():
            pytest.skip(f"the library is not built: {getattr(native.status(), f'{library}_reason')}")
        content = binary.read_bytes()
        # without the name in DT_NEEDED the loader does not look for torch's symbols
        assert f"libtorch_{library}.so\0".encode() in content
        # a CUDA 12 torch brings no libcudart.so.13: the runtime is part of the library
        assert b"libcudart.so" not in content
        assert b"PyObject" not in content and b"libpython" not in content
        assert str(ROOT).encode() not in content
        assert str(Path(torch.__file__).parent).encode() not in content


class TestModes:
    def build(self, mode, tmp_path):
        return native_build.build(mode, tmp_path / "lib", tmp_path / "work")

    def test_none_builds_nothing_and_removes_an_earlier_library(self, tmp_path):
        (tmp_path / "lib").mkdir()
        old = tmp_path / "lib" / "libkdkernels_cpu.so"
        old.write_bytes(b"old")
        record = self.build("none", tmp_path)
        assert not old.exists()
        assert record["cpu"] == {"built": False, "reason": "not asked for: KDK_BUILD=none"}
        assert json.loads((tmp_path / "lib" / "build.json").read_text()) == record

    def test_an_unknown_mode_is_refused_with_the_known_ones(self, tmp_path):
        with pytest.raises(SystemExit, match="KDK_BUILD is 'gpu': give one of auto, cpu, cuda, none"):
            self.build("gpu", tmp_path)

    def failing(self, monkeypatch, tmp_path, case):
        if case == "compiler":
            monkeypatch.setenv("CXX", "no-such-compiler")
            return "CXX is 'no-such-compiler': no-such-compiler is not found"
        if case == "broken compiler":
            compiler = tmp_path / "c++"
            compiler.write_text("#!/bin/sh\nexit 1\n")
            compiler.chmod(0o755)
            monkeypatch.setenv("CXX", str(compiler))
            return "log: "
        if case == "no headers":
            monkeypatch.setenv("KDK_TORCH_INCLUDE", str(tmp_path))
            return f"no torch headers found in KDK_TORCH_INCLUDE={tmp_path}: install torch >= {FLOOR} first and"
        write_headers(tmp_path, "2.9.1")
        monkeypatch.setenv("KDK_TORCH_INCLUDE", str(tmp_path))
        return f"the headers of torch 2.9.1 are too old: torch >= {FLOOR} is needed"

    @pytest.mark.parametrize("case", ["compiler", "broken compiler", "no headers", "old headers"])
    def test_auto_records_a_failure_and_cpu_ends_with_it(self, monkeypatch, tmp_path, case):
        if "compiler" not in case and native_build.find_compiler() is None:
            pytest.skip("no C++ compiler")
        if case != "compiler" and native_build.find_program("cmake") is None:
            pytest.skip("no cmake")
        reason = self.failing(monkeypatch, tmp_path, case)
        record = self.build("auto", tmp_path)
        assert not record["cpu"]["built"] and reason in record["cpu"]["reason"]
        assert record["cpu"]["could"] == (case != "compiler")
        assert "pure Python" in native_build.sentence(record)
        with pytest.raises(SystemExit, match="KDK_BUILD=cpu: cpu library not built"):
            self.build("cpu", tmp_path)

    def test_the_record_and_the_sentence_say_what_the_cuda_library_holds(self, monkeypatch, tmp_path):
        made = tmp_path / "work" / "out"
        made.mkdir(parents=True)
        for name in ("cpu", "cuda"):
            (made / f"libkdkernels_{name}.so").write_bytes(bytes(1_250_000))
        (tmp_path / "work" / "architectures").write_text("80-real;90a-real;89;100-virtual")
        monkeypatch.setattr(native_build, "compile_library", lambda *_: (made, {}))
        record = self.build("cuda", tmp_path)
        code = ["sm_80", "sm_90a", "sm_89", "compute_89", "compute_100"]
        assert (record["cuda"]["code"], record["cuda"]["bytes"]) == (code, 1_250_000)
        told = "kdkernels: compiled CPU library and CUDA library ({}: 1.2 MB) built."
        assert native_build.sentence(record) == told.format(", ".join(code))

    def test_a_library_without_sources_says_so(self, monkeypatch, tmp_path):
        monkeypatch.setattr(native_build, "sources", lambda library: [])
        with pytest.raises(native_build.Unavailable, match=r"^no sources: csrc holds no \*_cuda.cu$"):
            native_build.build_library("cuda", tmp_path, tmp_path)

    def test_without_nvcc_the_cuda_library_is_missing_for_that_reason(self, monkeypatch, tmp_path):
        if native_build.find_compiler() is None:
            pytest.skip("no C++ compiler")
        monkeypatch.setenv("CUDACXX", "no-such-nvcc")
        with pytest.raises(native_build.Unavailable, match=r"^CUDACXX is 'no-such-nvcc': no-such-nvcc is not found$"):
            native_build.build_library("cuda", tmp_path, tmp_path)

    def test_a_place_that_cannot_be_written_is_one_line(self, tmp_path):
        (tmp_path / "lib").write_text("")
        place = tmp_path / "lib" / "deeper"
        with pytest.raises(SystemExit) as error:
            native_build.build("none", place, tmp_path)
        assert str(error.value) == f"kdkernels: nothing was built, {place} cannot be written: Not a directory"


def write_headers(include, version):
    header = include / "torch" / "headeronly" / "version.h"
    header.parent.mkdir(parents=True)
    parts = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    header.write_text("".join(f"#define TORCH_VERSION_{part} {number}\n" for part, number in parts))


class TestHeaders:
    """Where torch's headers are found by a build whose own path has no torch, as an isolated one's has not."""

    @pytest.fixture
    def prefix(self, monkeypatch, tmp_path):
        """A folder that holds an environment with torch 2.99, and nothing that points to it yet."""
        folder = tmp_path / "elsewhere" / ".venv"
        write_headers(folder / "lib" / "python3.12" / "site-packages" / "torch" / "include", "2.99.0")
        (folder / "pyvenv.cfg").write_text("")
        for name in ("VIRTUAL_ENV", "CONDA_PREFIX", "PATH", "PWD", "KDK_TORCH_INCLUDE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [""])
        monkeypatch.setattr(native_build, "ROOT", tmp_path)
        monkeypatch.setattr(native_build.sysconfig, "get_path", lambda name: str(tmp_path / name))
        monkeypatch.setattr(native_build.site, "getusersitepackages", lambda: str(tmp_path / "user"))
        monkeypatch.setattr(native_build.site, "getsitepackages", lambda prefixes: [f"{p}/site" for p in prefixes])
        with pytest.raises(native_build.Unavailable, match="^no torch headers found in this environment: install "):
            native_build.torch_include()
        return folder

    @pytest.mark.parametrize("way", ["target", "VIRTUAL_ENV", "CONDA_PREFIX", "PATH", "PWD", "source", "user", "base"])
    def test_they_are_found(self, monkeypatch, prefix, way):
        packages = prefix / "lib" / "python3.12" / "site-packages"
        if way in ("VIRTUAL_ENV", "CONDA_PREFIX"):
            monkeypatch.setenv(way, str(prefix))
        elif way == "PATH":
            monkeypatch.setenv("PATH", f"/usr/bin{os.pathsep}{prefix / 'bin'}")
        elif way == "PWD":  # uv builds in the sources' folder, and takes the .venv of the caller's or one above
            monkeypatch.setenv("PWD", str(prefix.parent / "project" / "deeper"))
        elif way == "source":
            monkeypatch.setattr(native_build, "ROOT", prefix.parent)
        elif way == "target":
            monkeypatch.setattr(native_build.sysconfig, "get_path", lambda name: str(packages))
        elif way == "user":
            monkeypatch.setattr(native_build.site, "getusersitepackages", lambda: str(packages))
        else:
            monkeypatch.setattr(native_build.site, "getsitepackages", lambda prefixes: [str(packages)])
        assert native_build.torch_include() == (packages / "torch" / "include", "2.99.0")

    def test_older_ones_are_passed_over_and_named_only_where_there_are_no_others(self, monkeypatch, prefix, tmp_path):
        write_headers(tmp_path / "purelib" / "torch" / "include", "2.9.1")
        with pytest.raises(native_build.Unavailable, match="headers of torch 2.9.1 are too old"):
            native_build.torch_include()
        monkeypatch.setenv("VIRTUAL_ENV", str(prefix))
        assert native_build.torch_include()[1] == "2.99.0"


class TestCompilers:
    @pytest.fixture
    def programs(self, monkeypatch, tmp_path):
        for name in ("ccache", "g++", "nvcc"):
            (tmp_path / name).write_text("#!/bin/sh\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXXFLAGS", raising=False)
        return tmp_path

    def test_a_compiler_may_have_launchers_before_it_and_flags_after_it(self, monkeypatch, programs):
        monkeypatch.setenv("CXX", "ccache g++ -m64 -DA='b c'")
        monkeypatch.setenv("CXXFLAGS", "-g")
        found = native_build.find_tool("CXX", "c++")
        assert found == (["ccache"], str(programs / "g++"), ["-m64", "-DA=b c"])
        assert found.options("CXX") == [
            f"-DCMAKE_CXX_COMPILER={programs / 'g++'}",
            "-DCMAKE_CXX_COMPILER_LAUNCHER=ccache",
            "-DCMAKE_CXX_FLAGS=-g -m64 '-DA=b c'",
        ]
        assert native_build.find_compiler() == str(programs / "g++")

    def test_ccache_alone_is_the_compiler_that_it_stands_for(self, monkeypatch, programs):
        monkeypatch.setenv("CUDACXX", "ccache")
        assert native_build.find_nvcc() == str(programs / "ccache")

    @pytest.mark.parametrize(
        ("said", "why"),
        [("icecc g++", "icecc is not found"), ("ccache clang++ -O2", "clang++ is not found"), ("'", "No closing")],
    )
    def test_what_is_missing_is_named(self, monkeypatch, programs, said, why):
        monkeypatch.setenv("CXX", said)
        with pytest.raises(native_build.Unavailable, match=re.escape(f"CXX is {said!r}: {why}")):
            native_build.find_tool("CXX", "c++")
        assert native_build.find_compiler() is None


class TestWheel:
    def wheel(self, tree, mode, **environment):
        pytest.importorskip("setuptools", minversion="77")
        result = run([sys.executable, "setup.py", "-q", "bdist_wheel"], tree, KDK_BUILD=mode, **environment)
        assert result.returncode == 0, result.stderr
        (made,) = (tree / "dist").glob("*.whl")
        return made.name, zipfile.ZipFile(made)

    def test_a_pure_wheel_is_for_any_platform_where_it_was_asked_for_and_holds_every_package(self, tree):
        stale = tree / "build" / "lib" / "kdkernels" / "gone.py"  # of an earlier build
        stale.parent.mkdir(parents=True)
        stale.write_text("")
        name, wheel = self.wheel(tree, "none", GITHUB_SERVER_URL="https://example.org", GITHUB_REPOSITORY="a/b")
        content = set(wheel.namelist())
        assert name.endswith("-py3-none-any.whl")
        assert {"kdkernels/py.typed", "kdkernels/native.py", "kdkernels/_lib/build.json"} <= content
        assert not [entry for entry in content if entry.endswith(".so") or entry.startswith("tests")]
        sources = {str(path.relative_to(tree)) for path in (tree / "kdkernels").rglob("*.py")}
        assert sources == {entry for entry in content if entry.endswith(".py")}
        (metadata,) = (entry for entry in content if entry.endswith("/METADATA"))
        assert "Project-URL: Source, https://example.org/a/b\n" in wheel.read(metadata).decode()

    def test_a_wheel_that_fell_back_to_pure_python_says_so_and_is_for_no_other_machine(self, tree):
        """What an index takes is none of it: linux_x86_64, not any."""
        name, wheel = self.wheel(tree, "auto", CXX="no-such-compiler")
        assert "-py3-none-" in name and not name.endswith("-any.whl") and "manylinux" not in name
        reason = json.loads(wheel.read("kdkernels/_lib/build.json"))["cpu"]["reason"]
        assert reason == "CXX is 'no-such-compiler': no-such-compiler is not found"

    @pytest.mark.native
    @pytest.mark.skipif(not native.has("cpu"), reason="the library cannot be built here")
    def test_a_compiled_wheel_is_for_one_platform_and_every_python(self, tree):
        """With the library that the environment has: how it is compiled is asked by every make."""
        with open(tree / "csrc" / "build.py", "r+") as script:
            head, main = script.read().split("if __name__ ==")
            script.seek(0)
            made = (native._FOLDER, {"compiler": "of the environment"})
            instead = f"compile_library = lambda *_: (Path({str(made[0])!r}), {made[1]})"
            script.write(f"{head}{instead}\n\nif __name__ =={main}")
        name, wheel = self.wheel(tree, "cpu")
        assert "-py3-none-" in name and not name.endswith("-any.whl")
        held = wheel.read("kdkernels/_lib/libkdkernels_cpu.so")
        assert held == (native._FOLDER / "libkdkernels_cpu.so").read_bytes()

    def test_an_unknown_mode_ends_it_with_one_line(self, tree):
        result = run([sys.executable, "setup.py", "-q", "bdist_wheel"], tree, KDK_BUILD="gpu")
        assert result.returncode and result.stderr == "KDK_BUILD is 'gpu': give one of auto, cpu, cuda, none\n"


class TestEnvironment:
    """tools/env.sh with an interpreter that has torch: no network, nothing installed."""

    def env(self, tree, **environment):
        environment = {"KDK_BUILD": "none", "PYTHON": sys.executable, "PIP_NO_INDEX": "1", **environment}
        return run(["sh", "tools/env.sh", "bench"], tree, **environment)

    def test_an_environment_with_torch_is_used_as_it_is(self, tree):
        result = self.env(tree)
        assert (result.returncode, result.stdout.strip()) == (0, sys.executable), result.stderr
        assert not (tree / ".venv").exists()

    def test_the_second_run_builds_nothing_and_another_mode_or_source_builds_again(self, tree):
        record = tree / "kdkernels" / "_lib" / "build.json"
        self.env(tree)
        record.write_text(record.read_text() + " ")
        touched = record.read_text()
        self.env(tree)
        assert record.read_text() == touched
        (tree / "csrc" / "common" / "check.h").write_text("// changed\n")
        self.env(tree)
        assert record.read_text() != touched

    def test_a_build_by_hand_makes_the_stamp_void(self, tree):
        self.env(tree)
        assert (tree / "kdkernels" / "_lib" / "stamp").exists()
        assert run([sys.executable, "csrc/build.py", "none"], tree).returncode == 0
        assert not (tree / "kdkernels" / "_lib" / "stamp").exists()

    def test_without_a_compiler_it_works_and_says_so_in_one_sentence(self, tree, tools):
        # the interpreter's own folder may hold compilers, so the search is told what to look for
        result = self.env(tree, KDK_BUILD="auto", PATH=tools, CXX="no-such-compiler")
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("\n") == 1
        assert "running in pure Python, which is slower on the CPU: CXX is 'no-such-compiler': no-" in result.stderr

    def test_a_python_that_does_not_run_is_refused(self, tree, tmp_path):
        shim = tmp_path / "python3"
        shim.write_text("#!/bin/sh\necho 'not installed' >&2\nexit 127\n")
        shim.chmod(0o755)
        result = self.env(tree, PYTHON=shim)
        assert result.returncode != 0 and "does not run, is older than 3.10, or has no venv" in result.stderr

    def test_without_any_python_it_says_what_to_install(self, tree, tools):
        result = self.env(tree, PYTHON="", PATH=tools)
        assert result.returncode != 0 and "no Python >= 3.10 with venv found" in result.stderr


class TestCommands:
    @pytest.mark.parametrize("target", "help demo docs test test-quick fuzz lint resolve bench gpu wheel clean".split())
    def test_every_target_parses(self, tree, target):
        result = run(["make", "-n", target], tree)
        assert result.returncode == 0 and result.stdout, result.stderr

    @pytest.mark.parametrize(("failing", "called"), [("lint", 1), ("resolve", 2), ("docs", 3), ("test", 4), ("", 4)])
    def test_ci_runs_lint_resolve_docs_and_test_and_passes_a_failure_on(self, tree, tmp_path, failing, called):
        make = tmp_path / "stub" / "make"
        make.parent.mkdir()
        make.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n[ "$1" != "{failing}" ]\n')
        make.chmod(0o755)
        result = run(["bash", ".ci/run"], tree, PATH=f"{make.parent}:{os.environ['PATH']}")
        assert (result.returncode != 0) == bool(failing)
        assert (tmp_path / "called").read_text().split() == ["lint", "resolve", "docs", "test"][:called]

    def test_the_oldest_torch_is_said_in_one_place_which_the_build_and_what_it_builds_read(self, tmp_path):
        """Where a page says it, that is asked; the build and the libraries have it from pyproject.toml."""
        assert f'dependencies = ["torch>={FLOOR}", "numpy"]' in (ROOT / "pyproject.toml").read_text()
        assert native_build.build("none", tmp_path, tmp_path)["torch"] == FLOOR
        pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "howto").glob("*.md")]
        said = [found for page in pages for found in re.findall(r"torch`? \(?>= ?(\d+\.\d+)", page.read_text())]
        assert said and set(said) == {FLOOR}

    def test_torch_is_pinned_in_one_place(self):
        pins = [
            path.name for path in ROOT.iterdir() if path.is_file() and "torch==" in path.read_text(errors="replace")
        ]
        assert pins == ["constraints.txt"]
