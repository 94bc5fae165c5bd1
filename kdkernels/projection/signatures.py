# SPDX-License-Identifier: Apache-2.0
"""The projection kernels in their default configurations, as ahead-of-time compilation needs them."""

from __future__ import annotations

import triton.language as tl

from ..testing.compiling import compile_case
from .triton_impl import PROJECT, SPREAD
from .triton_kernels import Planes, project, spread

# strides of 1, which a launch turns into constants: positions are neighbours (NCHW), or channels (channels_last)
LAYOUTS = {"planes": ("i32:16", tl.constexpr(1), "i32:16"), "rows": ("i32:16", "i32:16", tl.constexpr(1))}


def compile_cases():
    for dtype in ("float32", "float16", "bfloat16"):
        half = 0 if dtype != "float32" else 1

        def type_of(argument):
            return "float32" if argument.endswith("_ptr") else "i32"

        precision = "tf32x3" if half else "tf32"
        for layout, steps in LAYOUTS.items():
            side = Planes(dtype, *steps)
            for limit, *pair in PROJECT:
                tile = pair[half]
                yield compile_case(
                    f"project-{layout}-k{min(limit, tile.directions)}-{dtype}", project, type_of, ("c", "k"),
                    tile.warps, tile.stages, s=side, t=side, mask_ptr=None, BR=tile.rows, BC=tile.channels,
                    BK=tile.directions, PRECISION=precision,
                )  # fmt: skip
            tile = SPREAD[half]
            yield compile_case(
                f"spread-{layout}-{dtype}", spread, type_of, ("c", "k"), tile.warps, tile.stages, ds=side, dt=None,
                BR=tile.rows, BC=tile.channels, BK=tile.directions, WEIGHTS=False, PRECISION=precision,
            )  # fmt: skip
