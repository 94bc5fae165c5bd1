# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel of the family at its widest rows, as ahead-of-time compilation needs it.

Used by the compile-only test leg, which has no GPU: kernel, argument types, compile-time constants and launch options.
"""

from __future__ import annotations

from ..testing.compiling import compile_case
from .triton_impl import constants, warps
from .triton_kernels import fit_rows, spread_rows

TYPES = dict.fromkeys(("n", "each", "relative", "hard", "descending", "need"), "i32")
TYPES |= {"order_ptr": "int64", "blocks_ptr": "int32"}
TYPES |= {"strength_ptr": "float64", "eps_ptr": "float64"}
# (type of rows, of ranks, positions, kl): float64 ranks are those of `spearman`
ROWS = (
    ("float32", "float32", 1024, False),
    ("float32", "float64", 1024, False),
    ("bfloat16", "float32", 256, True),
    ("float16", "float32", 512, False),
    ("float32", "float32", 2048, True),
)


def compile_cases():
    for dtype, rank, N, kl in ROWS:
        name = f"{'kl' if kl else 'l2'}-{N}-{dtype}{'-exact' * (rank == 'float64')}"
        types = TYPES | {"sums_ptr": "float64", "s_ptr": dtype, "rank_ptr": rank, "grad_ptr": rank, "out_ptr": dtype}
        yield compile_case(f"fit_rows-{name}", fit_rows, types.get, (), warps(N), 3, **constants(N, kl, dtype))
        types["sums_ptr"] = "int64"
        yield compile_case(f"spread_rows-{name}", spread_rows, types.get, (), warps(N), 3, N=N, KL=kl)
