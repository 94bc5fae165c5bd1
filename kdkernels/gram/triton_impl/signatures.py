# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel of the family in its default configurations, as ahead-of-time compilation needs it.

Used by the compile-only test leg, which has no GPU: kernel, argument types, compile-time constants and launch options.
"""

from __future__ import annotations

from ...testing.compiling import ALL, CompileCase, compile_case
from .maps import KINDS
from .small import BACKWARD_FLOAT, BACKWARD_HALF, FUSED_ROWS, FUSED_SUMS, SPLIT_CONFIGS, SPLIT_SUMS, SUMS_BLOCK
from .small_kernels import finish, row_sums, split_gram, weighted_rows
from .tile_kernels import gradient_rows, tile_sums, weight_panel
from .tiles import FLASH, PANEL, SUMS

DTYPES = ("float32", "float16", "bfloat16")
ALIGNED = ("n", "p", "q", "x_g", "x_n", "y_g", "y_n", "per_x", "per_y")
_FLOAT32 = ("part", "square", "kept", "value", "rows", "alpha", "par", "typical", "rho", "row", "column", "weights")
_FLOAT32 += ("dz", "extra", "u_x", "u_y", "grad", "sums", "dsigma")


def _type(argument: str, dtype: str) -> str:
    """The dtype of what a pointer points to, else the Triton type, by the argument's name."""
    stem = argument.removesuffix("_ptr")
    if stem == argument:
        return "fp32" if argument.startswith("sigma") else "i32"
    if stem in ("stats", "unit"):
        return "float64"
    if stem in ("mask", "keep"):
        return "uint8"
    if stem == "ref":
        return "int64"
    return "float32" if stem.startswith(_FLOAT32) else dtype


def _case(name, kernel, dtype, *launch, **constants) -> CompileCase:
    return compile_case(f"{name}-{dtype}", kernel, lambda a: _type(a, dtype), ALIGNED, *launch, **constants)


def _sides(kind: str) -> dict:
    out = {}
    for name in "XY":
        out |= {f"KIND_{name}": KINDS[kind], f"DEGREE_{name}": 2 if kind == "polynomial" else 1, f"S_{name}": 1}
    return out


def compile_cases():
    """Default configurations with the options that training uses: unbiased CKA, gradient to one side."""
    flags = {"STABLE": True, "UNBIASED": True, "MASK": False, "ROW_NORM": False}
    for dtype in DTYPES:
        half = dtype != "float32"
        pick = 0 if half else 1
        for limit, *pair in SPLIT_CONFIGS:
            c = pair[pick]
            yield _case(
                f"split_gram-n{limit}", split_gram, dtype, c.warps, c.stages, half, BM=c.tile, BK=c.depth, SHIFT_X=True,
                SHIFT_Y=True, MASK=False, HALVE_X=dtype == "float16", HALVE_Y=dtype == "float16", PRECISION="ieee",
                x_p=1, y_p=1,
            )  # fmt: skip
        BM, BN, BP, warps, stages = BACKWARD_HALF if half else BACKWARD_FLOAT
        for kind in ("linear", "rbf"):
            yield _case(
                f"weighted_rows-{kind}", weighted_rows, dtype, warps, stages, half, BM=BM, BN=BN, BP=BP, **_sides(kind),
                HAS_PAR_X=False, HAS_PAR_Y=False, **flags, ROWWISE=False, PREPARED=False, SHIFT=True,
                HALVE=dtype == "float16", SIGMA=False, PRECISION="ieee", x_p=1,
            )  # fmt: skip
    for kind in KINDS:
        if kind == "cosine":
            continue
        for rows, fused in ((SUMS_BLOCK, False), (64, True), (FUSED_ROWS, True)):
            step, warps = FUSED_SUMS if fused else SPLIT_SUMS
            yield _case(
                f"row_sums-{kind}-{rows}", row_sums, "float32", warps, 3, BM=rows, BN=step, **_sides(kind),
                HAS_PAR_X=kind == "polynomial", HAS_PAR_Y=kind == "polynomial",
                STAT=0, CENTER=True, MEAN=True, PREPARED=kind == "polynomial", KEEP=True, FUSED=fused, MINIMUM=4,
                **flags,
            )  # fmt: skip
    yield _case(
        "finish", finish, "float32", 4, 3, BLOCK=1024, STAT=0, CENTER=True, MEAN=True, PREPARED=False, KEEP=True,
        MINIMUM=4, **flags,
    )  # fmt: skip
    yield from _tile_cases(flags)


def _tile_cases(flags):
    for dtype in ("float16", "float32"):  # bfloat16 rows are prepared as float16
        half = dtype == "float16"
        picks = ((0, (80, 90)), (2, (100,))) if half else ((1, ALL),)
        for kind in ("linear", "polynomial", "rbf", "laplacian"):
            shared = {**_sides(kind), **flags, "ROWWISE": False, "PRECISION": "ieee"}
            sums = {key: value for key, value in shared.items() if key != "ROW_NORM"}
            for pick, architectures in picks:
                c = SUMS[pick]
                yield _case(
                    f"tile_sums-{kind}", tile_sums, dtype, c.warps, c.stages, half, architectures, BM=c.rows,
                    BK=c.depth, MSE=False, **sums,
                )  # fmt: skip
                c = PANEL[pick]
                yield _case(
                    f"weight_panel-{kind}", weight_panel, dtype, c.warps, c.stages, half, architectures, BM=c.rows,
                    BN=c.columns, BK=c.depth, SIGMA=False, **shared,
                )  # fmt: skip
            for width, *pair in FLASH:
                c = pair[0 if half else 1]
                yield _case(
                    f"gradient_rows-{kind}-p{width}", gradient_rows, dtype, c.warps, c.stages, half, BM=c.rows,
                    BN=c.columns, BK=c.depth, BP=width, SIGMA=False, **shared,
                )  # fmt: skip
