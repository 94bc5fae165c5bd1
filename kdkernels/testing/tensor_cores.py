# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter with the TF32 of tensor cores, which it multiplies as float32."""

from __future__ import annotations

import contextlib


@contextlib.contextmanager
def truncated_tf32():
    """Inside, interpreted products under "tf32" read 10 bits of each float32 mantissa, as the hardware does."""
    import numpy as np
    from triton._C.libtriton import ir
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    exact = InterpreterBuilder.create_dot

    def read(factor):
        if factor.data.dtype != np.float32:
            return factor
        return TensorHandle((factor.data.view(np.int32) & -(1 << 13)).view(np.float32), factor.dtype)

    def create_dot(self, a, b, d, precision, most):
        if precision == ir.INPUT_PRECISION.TF32:
            a, b = read(a), read(b)
        return exact(self, a, b, d, precision, most)

    InterpreterBuilder.create_dot = create_dot
    try:
        yield
    finally:
        InterpreterBuilder.create_dot = exact
