# SPDX-License-Identifier: Apache-2.0
"""What tensor cores read of float32 tiles, for the Triton kernels of all families."""

import triton
import triton.language as tl

from .backend import interpreting

INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def to_tf32(x, PRECISION: tl.constexpr):
    """A factor of `tl.dot` under "tf32" as the nearest TF32 number, ties away from 0; else as it is.

    Tensor cores cut the last 13 bits off, and Triton lets them: every factor would come out too small, by 3.5e-4 at the
    mean, and no sum averages that out.
    """
    if PRECISION != "tf32" or x.dtype != tl.float32:
        return x
    elif INTERPRETED:  # which runs no PTX
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        return tl.where(tl.abs(x) < float("inf"), bits.to(tl.float32, bitcast=True), x)
    else:
        return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)
