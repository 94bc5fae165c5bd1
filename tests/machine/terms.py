# SPDX-License-Identifier: Apache-2.0
"""float32 products of two TF32 terms each, as compiled: `python tests/machine/terms.py 90`, a line a question."""

import sys

import device
import torch
import triton
import triton.language as tl
from emulator import SCHEDULES

from kdkernels.triton_tf32 import product_of_terms, split_tf32

ROWS, DEPTH = 64, 512
INF, LARGEST = float("inf"), torch.finfo(torch.float32).max


@triton.jit
def multiply(a_ptr, b_ptr, out_ptr, p, BM: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr):
    o, k = tl.arange(0, BM), tl.arange(0, BK)
    acc = tl.zeros([BM, BM], tl.float32)
    for start in range(0, p, BK):
        a = tl.load(a_ptr + o[:, None] * p + start + k[None, :])
        b = tl.load(b_ptr + o[:, None] * p + start + k[None, :])
        if EXACT:
            acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
        else:
            a, a_low = split_tf32(a)
            b, b_low = split_tf32(b)
            acc += product_of_terms(a, a_low, tl.trans(b), tl.trans(b_low))
    tl.store(out_ptr + o[:, None] * BM + o[None, :], acc)


def product(a, b, exact=False):
    out = torch.full((ROWS, ROWS), float("nan"))
    multiply[(1,)](a, b, out, a.shape[1], ROWS, 32, exact, num_warps=4, num_stages=2)
    return out


def error(a, b):
    """The largest, relative to |a_i| |b_j|."""
    true = a.double() @ b.double().T
    return ((product(a, b).double() - true).abs() / (a.double().norm(dim=1)[:, None] * b.double().norm(dim=1))).max()


def edge(value, other=1.0):
    """What a product with one unusual number gives, and what float32 arithmetic gives."""
    a, b = torch.zeros(ROWS, 32), torch.zeros(ROWS, 32)
    a[3, 5], b[:, 5] = value, other
    return [product(a, b, exact)[3, 0].item() for exact in (False, True)]


def main(architecture: int) -> None:
    machine = device.install(architecture)
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(ROWS, DEPTH, generator=generator)  # noqa: E731
    for schedule in SCHEDULES:
        machine.schedules = (schedule,)
        a = draw()
        say = lambda name, *factors: print(f"error of {name}: {error(*factors):.1e}")  # noqa: E731
        say("independent rows", a, draw())
        say("equal signs", draw().abs() + 1, draw().abs())
        say("squares", a, a)
        for size in (1e-15, 1e15):
            say(f"rows of size {size:g}", size * a, size * draw())
    machine.schedules = SCHEDULES[:1]  # exact sums
    for value in (INF, -INF, float("nan"), 3e38, -3e38, 3.4025e38, LARGEST, 1e-30, 0.0):
        print(f"edge {value:.5g}:", *edge(value))
    print("edge of an overflow:", *edge(3e38, 2.0))


if __name__ == "__main__":
    main(int(sys.argv[1]))
