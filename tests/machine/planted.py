# SPDX-License-Identifier: Apache-2.0
"""Triton kernels with a fault each, run as machine code; prints a line `name: what was said`. Run by test_machine.py.

What a compiler does not let one write (a missing barrier, a shared word that nobody wrote, a shuffle from a lane that
does not take part) is planted in machine code, in test_machine_core.py.
"""

import sys

import device as machine
import torch
import triton
import triton.language as tl
from emulator import Report
from machine_build import core


@triton.jit
def sum_rows(x, out, n, stride, BLOCK: tl.constexpr, MASKED: tl.constexpr, ADDED: tl.constexpr):
    row, o = tl.program_id(0), tl.arange(0, BLOCK)
    if MASKED:
        v = tl.load(x + row * stride + o, mask=o < n, other=0.0)
    else:
        v = tl.load(x + row * stride + o)
    if ADDED:  # to one word, by every program
        tl.store(out, tl.load(out) + tl.sum(v))
    else:
        tl.store(out + row, tl.sum(v))


@triton.jit
def product(x, y, out, N: tl.constexpr, PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    b_x, b_y = tl.load(x + o), tl.load(y + o)
    tl.store(out + o, tl.dot(b_x, b_y.T if TRANSPOSED else b_y, input_precision=PRECISION))


def said(call) -> str:
    try:
        call()
    except (core().Fault, Report) as error:
        return f"{type(error).__name__}, {error}"
    return "nothing"


def rows(masked: bool, added: bool) -> str:
    x, out = torch.randn(3, 100), torch.zeros(3)
    text = said(lambda: sum_rows[(3,)](x, out, 100, 100, BLOCK=128, MASKED=masked, ADDED=added))
    if text == "nothing":
        torch.testing.assert_close(out, x.sum(1))
    return text


def tf32_error(precision: str) -> str:
    # halves of units in the last place of tf32, and a bit: cut to 1, rounded to 1 + 2^-10
    x, y, out = torch.full((16, 16), 1 + 2**-11 + 2**-20), torch.eye(16), torch.empty(16, 16)
    text = said(lambda: product[(1,)](x, y, out, 16, precision, TRANSPOSED=False))
    return text if text != "nothing" else f"1 + {float(out[0, 0]) - 1:.6e}"


def product_error(device, dtype, transposed: bool) -> str:
    """Of integers, whose sums are exact in any order: nothing. Names the instruction that multiplied."""
    x, y = (torch.randint(-8, 9, (64, 64)).to(dtype) for _ in range(2))
    out = torch.full((64, 64), float("nan"))
    text = said(lambda: product[(1,)](x, y, out, 64, "tf32", transposed))
    if text == "nothing" and not torch.equal(out.double(), x.double() @ (y.double().T if transposed else y.double())):
        text = "wrong"
    used = {line.opcode for launch in device.launches[-1:] for line in launch.function.code} & {"HMMA", "HGMMA"}
    return " ".join([*used, text])


def main():
    for architecture in map(int, sys.argv[1:]):
        device = machine.install(architecture)
        print(f"{architecture} none: {rows(True, False)}")
        print(f"{architecture} missing mask: {rows(False, False)}")
        print(f"{architecture} race between blocks: {rows(True, True)}")
        for precision in ("tf32", "tf32x3", "ieee"):
            print(f"{architecture} {precision}: {tf32_error(precision)}")
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for transposed in (False, True):
                seen = {product_error(device, dtype, transposed) for _ in device.schedules}
                print(f"{architecture} product {dtype} {transposed}: {', '.join(seen)}", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
