# SPDX-License-Identifier: Apache-2.0
"""The Nystrom kernels in their default configurations, as ahead-of-time compilation needs them."""

from __future__ import annotations

import triton.language as tl

from ..gram.triton_impl.maps import KINDS, Map
from ..testing.compiling import compile_case
from .triton_impl import FEATURES, PULL, ROOTS
from .triton_kernels import PANEL, ROOT, TRIANGLE, Operands, feature_rows, pull_rows, root_rows

MODES = {"panel": PANEL.value, "triangle": TRIANGLE.value, "root": ROOT.value}


def _case(name, kernel, config, kind, **constants):
    """Pointers that a mode does not read are given all the same."""
    polynomial = kind == "polynomial"
    par, numbers = (
        (None, ("fp32", "fp32") if polynomial else ()) if kind in ("linear", "polynomial") else ("float32", ())
    )
    one = tl.constexpr(1)
    of = Map(KINDS[kind], tl.constexpr(2) if polynomial else one, one, par, "i32:16", numbers)
    return compile_case(
        f"{name}-{kind}", kernel, lambda _: "float32", (), config.warps, config.stages, BM=config.rows,
        BN=config.columns, BK=config.depth, PRECISION="ieee",
        of=Operands("float32", "float32", "float32", "float32", "i32", "i32:16", "i32:16", of), **constants,
    )  # fmt: skip


def compile_cases():
    for kind in ("linear", "polynomial", "rbf", "laplacian"):
        for mode, number in MODES.items():
            if mode != "root":
                yield _case(f"feature_rows-{mode}", feature_rows, FEATURES, kind, MODE=number)
            sigma = {} if kind == "rbf" and mode == "triangle" else {"dsigma_ptr": None}
            yield _case(f"pull_rows-{mode}", pull_rows, PULL, kind, MODE=number, **sigma)
        for width, config in ROOTS:
            yield _case(f"root_rows-m{width}", root_rows, config, kind, MP=width)
    yield _case("pull_rows-triangle-sigma", pull_rows, PULL, "laplacian", MODE=TRIANGLE.value)
