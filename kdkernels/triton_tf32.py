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


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b; under "tf32x3" as `three_products`."""
    if PRECISION == "tf32x3":
        return acc + three_products(a, b)
    else:
        return tl.dot(to_tf32(a, PRECISION), to_tf32(b, PRECISION), acc, input_precision=PRECISION)


@triton.jit
def three_products(a, b):
    """a b of float32 factors split at 11 bits, smallest first; to be added up in float32, which rounds to nearest.

    Not as `tl.dot` splits, which costs twice the instructions to keep an infinite sum from becoming NaN: here a factor
    that is not finite makes its sums NaN.
    """
    high_a, high_b = _eleven_bits(a), _eleven_bits(b)
    return product_of_terms(high_a, a - high_a, high_b, b - high_b)


@triton.jit
def _eleven_bits(x):
    """As `to_tf32`, but of NaN anything: x minus that is NaN."""
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def split_tf32(x):
    """float32 as high + low: the nearest TF32 number, and what is left, of which tensor cores keep the next 11 bits.

    What would be rounded to infinity stays in high as it is, and so do infinity and NaN.
    """
    high = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    high = tl.where(tl.abs(x) < 3.40240e38, high, x)
    return high, x - high


@triton.jit
def product_of_terms(a, a_low, b, b_low, acc=None):
    """acc + (a + a_low) (b + b_low) without the product of what is left: relative to |a| |b|, an error of 2^-22 a term.

    Without acc summed from zero, and the smaller terms first, as tensor cores cut what they add: 32 terms at a time
    4e-7 at most with cut sums, where float32 products ("ieee") of hundreds lose more. An infinite factor, or a sum that
    overflows, may give NaN; factors below 1e-34 have 11 bits.
    """
    part = tl.dot(a_low, b, acc, input_precision="tf32")
    part = tl.dot(a, b_low, part, input_precision="tf32")
    return tl.dot(a, b, part, input_precision="tf32")
