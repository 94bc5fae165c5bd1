# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel of the family in its default configurations, as ahead-of-time compilation needs it.

Used by the compile-only test leg, which has no GPU: kernel, argument types, compile-time constants and launch options.
"""

from __future__ import annotations

from ..testing.compiling import compile_case
from .triton_impl import TILE
from .triton_kernels import triangles

TYPES = {"n": "i32", "step": "i64"}


def compile_cases():
    for name, weight in (("weight", True), ("value", False)):
        for aligned in (("n",), ()):
            yield compile_case(
                f"triangles-{name}-{'aligned' if aligned else 'odd'}",
                triangles,
                lambda argument: TYPES.get(argument, "float32"),
                aligned,
                TILE.warps,
                3,
                BB=TILE.rows,
                BC=TILE.columns,
                WEIGHT=weight,
            )
