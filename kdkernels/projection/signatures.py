# SPDX-License-Identifier: Apache-2.0
"""The projection kernels in their default configurations, as ahead-of-time compilation needs them."""

from __future__ import annotations

import triton.language as tl

from ..testing.compiling import compile_case
from .triton_impl import NARROW_PROJECT, NARROW_SPREAD, PROJECT, SPREAD
from .triton_kernels import Planes, project, spread

# strides of 1, which a launch turns into constants: positions are neighbours (NCHW), or channels (channels_last)
LAYOUTS = {"planes": ("i32:16", tl.constexpr(1), "i32:16"), "rows": ("i32:16", "i32:16", tl.constexpr(1))}


def compile_cases():
    for dtype in ("float32", "float16", "bfloat16"):
        half = 0 if dtype != "float32" else 1

        def type_of(argument):
            return "float32" if argument.endswith("_ptr") else "i32"

        for layout, steps in LAYOUTS.items():
            side, shared = Planes(dtype, *steps), {"EVEN": True, "PRECISION": "tf32x3" if half else "tf32"}
            for limit, *pair in PROJECT:
                yield compile_case(
                    f"project-{layout}-k{min(limit, pair[half].directions)}-{dtype}", project, type_of, ("c", "k"),
                    s=side, t=side, mask_ptr=None, **shared, **_tile(pair[half], NARROW_PROJECT),
                )  # fmt: skip
            for limit, *pair in SPREAD:
                one = limit <= pair[half].directions
                yield compile_case(
                    f"spread-{layout}-{'' if one else 'wide-'}{dtype}", spread, type_of, ("c", "k"), ds=side, dt=None,
                    ONE=one, WEIGHTS=False, **shared, **_tile(pair[half], NARROW_SPREAD),
                )  # fmt: skip


def _tile(tile, narrow: dict) -> dict:
    odd = tile._replace(**narrow)
    return {
        "warps": tile.warps, "stages": tile.stages, "BR": tile.rows, "BC": tile.channels, "BK": tile.directions,
        "odd": {"EVEN": False, "BR": odd.rows, "BC": odd.channels},
    }  # fmt: skip
