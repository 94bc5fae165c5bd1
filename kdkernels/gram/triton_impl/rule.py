# SPDX-License-Identifier: Apache-2.0
"""The bandwidth rule "mean" of both sides in two launches, sigma = factor sqrt(2 mean_i |x_i - mean x|^2).

`column_squares`: a program a block of columns, which reads them twice, the second time from cache: sums of squares
about the column's mean. `finish_rule`: a program a side and group adds them in their order. A spread of 0 counts as 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...triton_launch import Launch, Layout, cdiv, layout, on_device_of

BN, BP, WARPS = 64, 64, 4  # rows and columns a step; unmeasured
BLOCK = 256  # sums a step


@triton.jit
def _squares(x_ptr, step_n, step_p, n, p, block, BN: tl.constexpr, BP: tl.constexpr):
    o_p = block * BP + tl.arange(0, BP)
    columns, m_p = x_ptr + o_p.to(tl.int64)[None, :] * step_p, o_p < p
    total = tl.zeros([BP], tl.float32)
    for start in range(0, n, BN):
        o_n = start + tl.arange(0, BN)
        inside = (o_n < n)[:, None] & m_p[None, :]
        total += tl.sum(
            tl.load(columns + o_n.to(tl.int64)[:, None] * step_n, mask=inside, other=0).to(tl.float32), axis=0
        )
    mean, square = total / n, tl.zeros([BP], tl.float32)
    for start in range(0, n, BN):
        o_n = start + tl.arange(0, BN)
        inside = (o_n < n)[:, None] & m_p[None, :]
        b_x = tl.load(columns + o_n.to(tl.int64)[:, None] * step_n, mask=inside, other=0).to(tl.float32)
        b_z = tl.where(inside, b_x - mean[None, :], 0.0)
        square += tl.sum(b_z * b_z, axis=0)
    return tl.sum(square, axis=0)


@triton.jit(do_not_specialize=["n", "p", "q", "G", "blocks"])
def column_squares(
    x_ptr, y_ptr,  # [G, n, p], [G, n, q], any strides
    part_ptr,  # [sides, G, blocks] float32
    n, p, q, G, blocks, x_g, x_n, x_p, y_g, y_n, y_p,
    BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    block, side_g = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    g = (side_g % G).to(tl.int64)
    if side_g < G:
        total = _squares(x_ptr + g * x_g, x_n, x_p, n, p, block, BN, BP)
    else:
        total = _squares(y_ptr + g * y_g, y_n, y_p, n, q, block, BN, BP)
    tl.store(part_ptr + tl.program_id(0), total)


@triton.jit(do_not_specialize=["n", "G", "blocks"])
def finish_rule(part_ptr, sigma_x_ptr, sigma_y_ptr, n, G, blocks, factor, BLOCK: tl.constexpr):
    side_g = tl.program_id(0)
    total = 0.0
    for start in range(0, blocks, BLOCK):
        o = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(part_ptr + side_g * blocks + o, mask=o < blocks, other=0))
    spread = 2 * total / n
    sigma = factor * tl.sqrt(tl.where(spread == 0, 1.0, spread))
    if side_g < G:
        tl.store(sigma_x_ptr + side_g, sigma)
    else:
        tl.store(sigma_y_ptr + side_g - G, sigma)


def rule(sigma: tuple[str, float], x: torch.Tensor, y: torch.Tensor) -> _MeanRule | None:
    """That of both sides of a call without a mask, if launches have it."""
    name, factor = sigma
    return _MeanRule(factor, layout(x), layout(y)) if name == "mean" else None


class _MeanRule:
    """Called with both sides: the bandwidth of each, [G]."""

    def __init__(self, factor: float, x: Layout, y: Layout):
        G = x.shape[0] if len(x.shape) == 3 else 1
        (n, p), q = x.shape[-2:], y.shape[-1]
        blocks = cdiv(max(p, q), BP)
        steps = [side.stride if len(side.shape) == 3 else (0, *side.stride) for side in (x, y)]
        self.size, self.groups, self.device = 2 * G * blocks, (G,), x.device
        self.squares = Launch(column_squares, (self.size,), BN=BN, BP=BP, num_warps=WARPS)
        self.of_squares = (n, p, q, G, blocks, *steps[0], *steps[1])
        self.finish = Launch(finish_rule, (2 * G,), BLOCK=BLOCK, num_warps=1)
        self.of_finish = (n, G, blocks, factor)

    @on_device_of
    def __call__(self, x, y):
        part = torch.empty(self.size, dtype=torch.float32, device=self.device)
        sigma_x = torch.empty(self.groups, dtype=torch.float32, device=self.device)
        sigma_y = torch.empty(self.groups, dtype=torch.float32, device=self.device)
        self.squares(x, y, part, *self.of_squares)
        self.finish(part, sigma_x, sigma_y, *self.of_finish)
        return sigma_x, sigma_y
