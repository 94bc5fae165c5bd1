# SPDX-License-Identifier: Apache-2.0
"""n x n matrices between kernels: rows start where accesses can be wide, whatever n is."""

import triton
import triton.language as tl

from ...triton_launch import cdiv

ALIGNED = tl.constexpr(16)


def width_of(n: int) -> int:
    """From one row to the next, of what is allocated."""
    return cdiv(n, ALIGNED.value) * ALIGNED.value


@triton.jit
def row_step(n):
    """The same in a kernel."""
    return tl.cdiv(n, ALIGNED) * ALIGNED
