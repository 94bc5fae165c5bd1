# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel of the family in its default configurations, as ahead-of-time compilation needs it.

Used by the compile-only test leg, which has no GPU: kernel, argument types, compile-time constants and launch options.
"""

from __future__ import annotations

import triton.language as tl

from ...testing.compiling import ALL, CompileCase, compile_case
from . import small_kernels, tile_kernels
from .maps import KINDS, Map
from .small import (
    BACKWARD_FLOAT,
    BACKWARD_HALF,
    FINISH_WARPS,
    FUSED_ROWS,
    FUSED_SUMS,
    PAIRS,
    SPLIT_CONFIGS,
    SPLIT_SUMS,
    SUMS_BLOCK,
    SUMS_COLUMNS,
)
from .small_gradient import pair_rows, weighted_rows
from .small_kernels import split_gram
from .small_sums import finish, row_sums
from .tile_kernels import gradient_rows, tile_sums, weight_panel
from .tiles import FLASH, PANEL, SUMS

DTYPES = ("float32", "float16", "bfloat16")
ALIGNED = ("n", "p", "q", "x_g", "x_n", "y_g", "y_n")
EXACT = {"stats_ptr": "float64", "unit_ptr": "float64", "keep_ptr": "uint8", "ref_ptr": "int64"}
# what training uses: unbiased CKA without a mask, gradient to one side and none to sigma
NO_MASK = {"keep_ptr": None}
SMALL = small_kernels.Asked(small_kernels.CKA, *map(tl.constexpr, (True, True, True, False, True, 4)))
LARGE = tile_kernels.Asked(*map(tl.constexpr, (True, True, False, False, False)))


def _case(name, kernel, dtype, *launch, **given) -> CompileCase:
    def type_of(argument):
        if not argument.endswith("_ptr"):
            return "i32:rounded" if argument in ("per_x", "per_y") else "i32"
        return EXACT.get(argument, dtype if argument in ("x_ptr", "y_ptr", "dx_ptr", "panel_ptr") else "float32")

    return compile_case(f"{name}-{dtype}", kernel, type_of, ALIGNED, *launch, **given)


def _map(kind: str, number: bool) -> Map:
    """number: the bandwidth is one, given by value."""
    degree = tl.constexpr(2 if kind == "polynomial" else 1)
    par = None if number or kind == "linear" else "float32"
    return Map(KINDS[kind], degree, tl.constexpr(1), par, "i32:16", ("fp32",) if number and kind != "linear" else ())


def _small_side(kind: str) -> small_kernels.Side:
    polynomial = kind == "polynomial"
    return small_kernels.Side(_map(kind, number=not polynomial), "float32" if polynomial else None, None)


def _tile_side(kind: str, dtype: str) -> tile_kernels.Side:
    alpha = "float32" if kind == "polynomial" else None
    typical = "float32" if kind in ("rbf", "laplacian") else None
    return tile_kernels.Side(dtype, "i32:rounded", _map(kind, number=False), "float32", "float32", alpha, typical)


def compile_cases():
    for dtype in DTYPES:
        half = dtype != "float32"
        rows = small_kernels.Rows(dtype, "i32:16", "i32:16", tl.constexpr(1), "i32:16", tl.constexpr(True))
        for limit, *pair in SPLIT_CONFIGS:
            c = pair[0 if half else 1]
            on = (90, 100) if c.tile > 64 and not half else ALL
            yield _case(
                f"split_gram-n{limit}", split_gram, dtype, c.warps, c.stages, half, on, BM=c.tile, BK=c.depth,
                SHIFT_X=True, SHIFT_Y=True, PRECISION="tf32x3", x_p=1, y_p=1, ref_ptr=None, **NO_MASK,
            )  # fmt: skip
        BM, BN, BP, warps, stages = BACKWARD_HALF if half else BACKWARD_FLOAT
        yield _case(
            "weighted_rows", weighted_rows, dtype, warps, stages, half, rows=rows, BM=BM, BN=BN, BP=BP,
            PRECISION="tf32x3", ref_ptr=None, **NO_MASK,
        )  # fmt: skip
    for kind in ("linear", "polynomial", "rbf", "laplacian"):
        side, given = _small_side(kind), {"asked": SMALL, **NO_MASK}
        BM, BN, warps = PAIRS
        yield _case(
            f"pair_rows-{kind}", pair_rows, "float32", warps, 3, x=side, y=side, BM=BM, BN=BN, PRECISION="tf32x3",
            sums_ptr=None, dsigma_ptr=None, **given,
        )  # fmt: skip
        if kind != "polynomial":
            given["unit_ptr"] = None
        # what a program holds, what of a row it takes at a time, columns; splits, of which 8 are read at once
        for block, columns, splits in ((SUMS_BLOCK, SUMS_COLUMNS, 4), (64, 64, 8), (FUSED_ROWS, FUSED_ROWS, 1)):
            fused = block != SUMS_BLOCK
            step, warps = FUSED_SUMS if fused else SPLIT_SUMS
            stats = {"stats_ptr": None} if fused else {}
            yield _case(
                f"row_sums-{kind}-{block}", row_sums, "float32", warps, 3, x=side, y=side, BM=block, BN=step,
                COLUMNS=columns, ROWS=block if fused else 512, SPLITS=splits, **given, **stats,
            )  # fmt: skip
    yield _case(
        "finish",
        finish,
        "float32",
        FINISH_WARPS,
        3,
        BLOCK=1024,
        COLUMNS=SUMS_COLUMNS,
        asked=SMALL,
        unit_ptr=None,
        **NO_MASK,
    )
    yield from _tile_cases()


def _tile_cases():
    for dtype in ("float16", "float32"):  # bfloat16 rows are prepared as float16
        half = dtype == "float16"
        picks = ((0, (80, 90)), (2, (100,))) if half else ((1, ALL),)
        for kind in ("linear", "polynomial", "rbf", "laplacian"):
            side = _tile_side(kind, dtype)
            shared = {"x": side, "y": side, "asked": LARGE, "PRECISION": "ieee", **NO_MASK}
            for pick, architectures in picks:
                c = SUMS[pick]
                yield _case(
                    f"tile_sums-{kind}", tile_sums, dtype, c.warps, c.stages, half, architectures, BM=c.rows,
                    BK=c.depth, **shared,
                )  # fmt: skip
                c = PANEL[pick]
                yield _case(
                    f"weight_panel-{kind}", weight_panel, dtype, c.warps, c.stages, half, architectures, BM=c.rows,
                    BN=c.columns, BK=c.depth, OF_SIGMA=False, **shared,
                )  # fmt: skip
            for width, *pair in FLASH:
                c = pair[0 if half else 1]
                yield _case(
                    f"gradient_rows-{kind}-p{width}", gradient_rows, dtype, c.warps, c.stages, half, BM=c.rows,
                    BN=c.columns, BK=c.depth, BP=width, OF_SIGMA=False, **shared,
                )  # fmt: skip
