# SPDX-License-Identifier: Apache-2.0
"""The landmark similarity kernels in their default configurations, as ahead-of-time compilation needs them."""

from __future__ import annotations

from ...testing.compiling import compile_case
from .triton_centers import COLUMNS, ROWS, class_sums
from .triton_impl import FINISH_BLOCK, GRADIENT, SUMS, precision
from .triton_kernels import similarity_finish, similarity_gradient, similarity_sums

ALIGNED = ("d", "e")
EXACT = {"labels_ptr": "int64", "counts_ptr": "int64", "counted_ptr": "uint8", "s_sums_ptr": "float64"}
EXACT |= {"t_sums_ptr": "float64"}


def compile_cases():
    for dtype in ("float32", "float16", "bfloat16"):
        half = dtype != "float32"

        def type_of(argument, dtype=dtype):
            if argument in ("s_ptr", "t_ptr", "ds_ptr"):
                return dtype
            if argument in EXACT:
                return EXACT[argument]
            return "float32" if argument.endswith("_ptr") else "i32"

        tile = SUMS[0 if half else 1]
        yield compile_case(
            f"similarity_sums-{dtype}", similarity_sums, type_of, ALIGNED, tile.warps, tile.stages, BM=tile.rows,
            BN=tile.landmarks, BD=tile.depth, PRECISION=precision(half),
        )  # fmt: skip
        tile = GRADIENT[0 if half else 1]
        yield compile_case(
            f"similarity_gradient-{dtype}", similarity_gradient, type_of, ALIGNED, tile.warps, tile.stages,
            odd={"BD": tile.depth // 2}, BM=tile.rows, BN=tile.landmarks, BD=tile.depth, BW=tile.width,
            PRECISION=precision(half),
        )  # fmt: skip
        yield compile_case(f"class_sums-{dtype}", class_sums, type_of, ALIGNED, 4, 3, BR=ROWS, BC=COLUMNS)
    yield compile_case("similarity_finish", similarity_finish, type_of, (), 4, 3, BLOCK=FINISH_BLOCK)
