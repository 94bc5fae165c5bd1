# SPDX-License-Identifier: Apache-2.0
"""A thin driver around csrc/build.py, which calls CMake: KDK_BUILD=auto|cpu|cuda|none says what to compile.

The libraries go to kdkernels/_lib, in the source tree when the install is editable. They hold no Python symbols, so the
wheel's tag is py3-none-<platform>, or any where nothing was built.
"""

import importlib.util
import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

_spec = importlib.util.spec_from_file_location("kdkernels_native_build", ROOT / "csrc" / "build.py")
native_build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(native_build)


class BuildNative(build_ext):
    """Writes kdkernels/_lib/*.so and build.json instead of compiling an extension module."""

    def _folder(self) -> Path:
        base = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        return base / "kdkernels" / "_lib"

    def run(self):
        mode = os.environ.get("KDK_BUILD") or "auto"
        print(native_build.sentence(native_build.build(mode, self._folder(), ROOT / "build")))

    def get_outputs(self):
        folder = self._folder()
        return [str(path) for path in sorted(folder.glob("*")) if path.suffix in (".so", ".json")]

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return []


class WheelTag(bdist_wheel):
    def get_tag(self):
        _, _, platform = super().get_tag()
        built = any((Path(self.get_finalized_command("build_ext").build_lib) / "kdkernels" / "_lib").glob("*.so"))
        return "py3", "none", platform if built or self.get_finalized_command("build_ext").inplace else "any"


setup(
    ext_modules=[Extension("kdkernels._native", [])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": WheelTag},
)
