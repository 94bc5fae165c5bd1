# SPDX-License-Identifier: Apache-2.0
"""A thin driver around csrc/build.py, which calls CMake: KDK_BUILD=auto|cpu|cuda|none says what to compile.

The libraries go to kdkernels/_lib, in the source tree when the install is editable. They hold no Python symbols, so the
wheel's tag is py3-none-<platform>; any only where KDK_BUILD=none asked for a wheel without them.
"""

import importlib.util
import os
import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODE = os.environ.get("KDK_BUILD") or "auto"

_spec = importlib.util.spec_from_file_location("kdkernels_native_build", ROOT / "csrc" / "build.py")
native_build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(native_build)
native_build.check_mode(MODE)


class Build(build):
    def run(self):
        # what an earlier build left there, from sources that may be gone, would get into the wheel
        shutil.rmtree(Path(self.build_lib) / "kdkernels", ignore_errors=True)
        super().run()


class BuildNative(build_ext):
    """Writes kdkernels/_lib/*.so and build.json instead of compiling an extension module."""

    def _folder(self) -> Path:
        base = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        return base / "kdkernels" / "_lib"

    def run(self):
        print(native_build.sentence(native_build.build(MODE, self._folder(), ROOT / "build")))

    def get_outputs(self):
        folder = self._folder()
        return [str(path) for path in sorted(folder.glob("*")) if path.suffix in (".so", ".json")]

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return []


class WheelTag(bdist_wheel):
    def get_tag(self):
        return "py3", "none", "any" if MODE == "none" else super().get_tag()[2]


def addresses() -> dict[str, str]:
    """Of the repository that releases this, as its workflow knows it."""
    server, name = (os.environ.get(f"GITHUB_{what}", "") for what in ("SERVER_URL", "REPOSITORY"))
    pages = {"Source": "", "Issues": "/issues", "Changelog": "/blob/main/CHANGELOG.md"}
    return {page: f"{server}/{name}{path}" for page, path in pages.items()} if server and name else {}


setup(
    project_urls=addresses(),
    ext_modules=[Extension("kdkernels._native", [])],
    cmdclass={"build": Build, "build_ext": BuildNative, "bdist_wheel": WheelTag},
)
