# SPDX-License-Identifier: Apache-2.0
"""The projection kernels in their default configurations, as ahead-of-time compilation needs them."""

from __future__ import annotations

from ..testing.compiling import compile_case
from .triton_impl import PROJECT, SPREAD
from .triton_kernels import project, spread

# strides of 1, which a launch turns into constants: positions are neighbours (NCHW), or channels (channels_last)
LAYOUTS = {"planes": {"s_p": 1, "t_p": 1}, "rows": {"s_c": 1, "t_c": 1}}
ALIGNED = ("c", "k", "s_b", "s_p", "s_c", "t_b", "t_p", "t_c")


def compile_cases():
    for dtype in ("float32", "float16", "bfloat16"):
        half = 0 if dtype != "float32" else 1

        def type_of(argument, dtype=dtype):
            if argument in ("s_ptr", "t_ptr", "ds_ptr", "dt_ptr"):
                return dtype
            if argument == "mask_ptr":
                return "uint8"
            return "float32" if argument.endswith("_ptr") else "i32"

        precision = "tf32x3" if half else "tf32"
        for layout, strides in LAYOUTS.items():
            for limit, *pair in PROJECT:
                tile = pair[half]
                yield compile_case(
                    f"project-{layout}-k{min(limit, tile.directions)}-{dtype}", project, type_of, ALIGNED, tile.warps,
                    tile.stages, BR=tile.rows, BC=tile.channels, BK=tile.directions, MASK=False, KEEP=True,
                    PRECISION=precision, **strides,
                )  # fmt: skip
            tile = SPREAD[half]
            yield compile_case(
                f"spread-{layout}-{dtype}", spread, type_of, ALIGNED, tile.warps, tile.stages, BR=tile.rows,
                BC=tile.channels, BK=tile.directions, WEIGHTS=False, STUDENT=True, TEACHER=False, PRECISION=precision,
                **strides,
            )  # fmt: skip
