# SPDX-License-Identifier: Apache-2.0
"""What a release calls exists and is given what it takes; the sdist holds what a wheel is built of."""

import re
import sys
import tarfile

import pytest
from conftest import ROOT, load_by_path
from test_build import run, tree  # noqa: F401

wheel = load_by_path(ROOT / "tools" / "wheel.py")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TEXT = "\n".join(path.read_text() for path in WORKFLOWS)


def test_the_workflows_call_wheel_py_as_it_is_called(monkeypatch, capsys):
    called = []
    monkeypatch.setattr(wheel, "build", lambda headers, plat: called.append((headers, plat)))
    monkeypatch.setattr(wheel, "check", lambda torch, quick: called.append((torch, quick)))
    lines = re.findall(r"tools/wheel\.py ([^|\n]+)", TEXT) + re.findall(r"make wheel ARGS=\"(.*)\"", TEXT)
    for line in lines:
        for torch in ("oldest", "newest"):
            words = line.replace("${{ matrix.torch }}", torch).replace("${{ matrix.machine }}", "x86_64").split()
            wheel.main(words if words[0] in ("needs", "check") else ["build", *words])
    assert {("oldest", False), ("newest", False), ("oldest", "manylinux_2_28_x86_64")} == set(called)
    assert capsys.readouterr().out.split()[:2] == ["build", "auditwheel>=6"]


def test_the_workflows_run_what_the_repository_has_and_publish_with_no_password():
    for target in re.findall(r"make (\w+)", TEXT):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text()
    for script in re.findall(r"(?:\.ci|tools)/[\w.]+", TEXT):
        assert (ROOT / script).is_file(), script
    assert "id-token: write" in TEXT and "secrets." not in TEXT
    for path in WORKFLOWS:
        assert "\npermissions:\n  contents: read\n" in path.read_text(), path


def test_the_sdist_holds_what_the_build_reads_and_nothing_that_was_built(tree):  # noqa: F811
    pytest.importorskip("setuptools", minversion="77")
    (tree / "kdkernels" / "_lib").mkdir()
    (tree / "kdkernels" / "_lib" / "libkdkernels_cpu.so").write_bytes(b"stale")
    result = run([sys.executable, "setup.py", "-q", "sdist"], tree)
    assert result.returncode == 0, result.stderr
    with tarfile.open(next((tree / "dist").glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    read = {str(path.relative_to(tree)) for path in (tree / "csrc").rglob("*.*") if "__pycache__" not in str(path)}
    assert read | {"CMakeLists.txt", "pyproject.toml", "setup.py"} <= held
    assert not [name for name in held if name.endswith(".so") or "_lib" in name]
