# SPDX-License-Identifier: Apache-2.0
"""The Nystrom kernels in their default configurations, as ahead-of-time compilation needs them."""

from __future__ import annotations

from ..gram.triton_impl.maps import KINDS
from ..testing.compiling import compile_case
from .triton_impl import FEATURES, PULL, ROOTS
from .triton_kernels import PANEL, ROOT, TRIANGLE, feature_rows, pull_rows, root_rows

MODES = {"panel": PANEL.value, "triangle": TRIANGLE.value, "root": ROOT.value}


def _type(argument: str) -> str:
    if argument.endswith("_ptr"):
        return "float32"
    return "fp32" if argument in ("scale", "coef0") else "i32"


def _case(name, kernel, config, kind, **constants):
    return compile_case(
        f"{name}-{kind}", kernel, _type, ("m", "d"), config.warps, config.stages, BM=config.rows, BN=config.columns,
        BK=config.depth, KIND=KINDS[kind], DEGREE=2 if kind == "polynomial" else 1, S=1, PRECISION="ieee", **constants,
    )  # fmt: skip


def compile_cases():
    for kind in ("linear", "polynomial", "rbf", "laplacian"):
        for mode, number in MODES.items():
            if mode != "root":
                yield _case(f"feature_rows-{mode}", feature_rows, FEATURES, kind, MODE=number)
            sigma = kind == "rbf" and mode == "triangle"
            yield _case(f"pull_rows-{mode}", pull_rows, PULL, kind, MODE=number, SIGMA=sigma)
        for width, config in ROOTS:
            yield _case(f"root_rows-m{width}", root_rows, config, kind, MP=width)
    yield _case("pull_rows-triangle-sigma", pull_rows, PULL, "laplacian", MODE=TRIANGLE.value, SIGMA=True)
