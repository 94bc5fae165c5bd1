# SPDX-License-Identifier: Apache-2.0
"""What the contract and the benchmark need to know of the projection family: cases, caps, bytes, flops.

The value is judged relative to itself: the difference is taken first, so nothing cancels as the student nears the
teacher. Half inputs are computed in float32; Triton projects them in tf32, 11 bits of each factor.
"""

from __future__ import annotations

from functools import partial

import torch

from ..testing import REGIMES, Case, pair
from ..testing.shared import DOUBLE, HALF, SINGLE, cases_of, grid, product_caps, small_blocks
from . import op as ops
from . import torch_impl

# s, t, basis: one dtype, or one each
EVERY_DTYPE = (SINGLE, *HALF, DOUBLE, (SINGLE, torch.bfloat16, SINGLE), (torch.float16, SINGLE, SINGLE))
EVERY_DTYPE += ((torch.bfloat16, torch.bfloat16, SINGLE),)

# name -> (channel_dim, from rows [B, p, c] to the layout, and the inner shape of p = 12 positions)
LAYOUTS = {
    "nchw": (1, lambda x: x.mT.unflatten(2, (3, -1)).contiguous()),
    "channels last": (1, lambda x: x.mT.unflatten(2, (3, -1)).contiguous(memory_format=torch.channels_last)),
    "tokens": (-1, lambda x: x.contiguous()),
    "sequence": (1, lambda x: x.mT.contiguous()),
    "volume": (2, lambda x: x.unflatten(1, (3, -1)).permute(0, 1, 3, 2).contiguous()),
    "turned": (1, lambda x: x.mT.unflatten(2, (3, -1)).transpose(2, 3)),
}
# the same as views of rows
VIEWS = {
    "nchw": lambda x: x.mT.unflatten(2, (3, -1)),
    "channels last": lambda x: x.mT.unflatten(2, (2, 2, -1)).flatten(2, 3),
    "tokens": lambda x: x,
    "sequence": lambda x: x.mT,
}
REDUCTIONS = ("mean", "sum", "none")
# B, p, c, k: more and fewer rows than channels, odd and prime, k = 1 and k = c
SHAPES = ((3, 12, 7, 2), (5, 6, 17, 5), (2, 15, 8, 8), (4, 3, 33, 1))
# around the tiles of 16, 32 and 64 rows, channels and directions
SIZES = (1, 2, 15, 16, 17, 31, 33, 63, 64, 65)
MORE_SIZES = (127, 128, 129, 257)
# a few positions of one sample a block, as a large feature map has them
SMALL = partial(small_blocks, torch_impl.BLOCK, 40)


def _cases(op, backend, quick, generator):
    for count, regime, layout, reduction in grid(quick, 3, REGIMES, LAYOUTS, REDUCTIONS):
        inputs = _inputs(regime, SHAPES[count % len(SHAPES)], layout, count % 4 == 1, generator)
        dtypes = EVERY_DTYPE if count % 2 else (SINGLE, HALF[count // 2 % 2])
        yield _case(backend, layout, reduction, regime, inputs, dtypes=dtypes)
    for n in SIZES if quick else (*SIZES, *MORE_SIZES):
        for which, shape in (("rows", (n, 1, 5, 2)), ("channels", (3, 3, n, min(n, 3))), ("positions", (2, n, 4, 3)),
                             ("directions", (2, 3, n, n))):  # fmt: skip
            for layout in ("sequence", "tokens"):
                inputs = _inputs("edge", shape, layout, False, generator)
                yield _case(backend, layout, "mean", f"{which} {n}", inputs)
    for layout in LAYOUTS:
        for reduction in REDUCTIONS:
            inputs = _inputs("offset3", (3, 12, 7, 2), layout, reduction == "none", generator)
            yield _case(backend, layout, reduction, "blocks", inputs, context=SMALL)
    yield from _degenerate(backend, generator)
    for layout, reduction, masked in (
        ("nchw", "mean", True), ("channels last", "none", True), ("tokens", "sum", False), ("sequence", "mean", True),
    ):  # fmt: skip
        yield _probe(backend, layout, reduction, masked, generator)


def _probe(backend, layout, reduction, masked, generator):
    """The structural checks change strides and rows of s and t [B, p, c]: views of them are the input, never copies."""
    B, p, c, k = 5, 12, 9, 3
    s, t = pair("offset3", (B, p, c), (B, p, c), generator)
    # positive, so that channels made equal by a stride of 0 do not cancel: two layouts add in two orders
    inputs = {"s": s, "t": t, "basis": torch.rand(c, k, generator=generator).double()}
    if masked:
        inputs["mask"] = _mask((B, p), generator)
    return _case(backend, layout, reduction, "probe", inputs, probe=True, masks={"mask": ("s", "t")} if masked else {},
                 turn=VIEWS[layout])  # fmt: skip


def _mask(shape, generator):
    keep = torch.rand(shape, generator=generator) > 0.3
    keep[0, 0], keep[-1, -1] = True, False
    return keep


def _inputs(regime, shape, layout, masked, generator):
    """s, t in the layout, P [c, k] with orthonormal columns."""
    B, p, c, k = shape
    s, t = pair(regime, (B, p, c), (B, p, c), generator)
    turn = LAYOUTS[layout][1] if p % 3 == 0 else LAYOUTS["tokens" if layout == "tokens" else "sequence"][1]
    basis = torch.linalg.qr(torch.randn(c, k, generator=generator, dtype=torch.float64)).Q
    inputs = {"s": turn(s), "t": turn(t), "basis": basis}
    if masked:
        keep = _mask((B, p), generator)
        if B > 2:
            keep[1] = False  # a sample of which nothing counts
        where = [n for i, n in enumerate(inputs["s"].shape) if i not in (0, LAYOUTS[layout][0] % inputs["s"].dim())]
        inputs["mask"] = keep.reshape(B, *where)
    return inputs


def _case(backend, layout, reduction, label, inputs, turn=None, **fields):
    dim = LAYOUTS[layout][0]
    same = turn or (lambda x: x)

    def call(t, backend):
        # positions move with their mask
        mask = None if "mask" not in t else same(t["mask"][..., None].expand(t["s"].shape)) if turn else t["mask"]
        if turn and mask is not None:
            mask = mask.select(dim, 0)
        how = {"channel_dim": dim, "reduction": reduction, "mask": mask}
        return ops.projected_mse(same(t["s"]), same(t["t"]), t["basis"], backend=backend, **how)

    def scale(t):
        return call(t, "reference").nan_to_num().abs().max()

    name = f"{layout} {reduction} {label} {'x'.join(map(str, inputs['s'].shape))}" + " masked" * ("mask" in inputs)
    return Case(name, inputs, call, product_caps(backend), scale, **fields)


def _degenerate(backend, generator):
    """Equal sides give 0 with zero gradient; a NaN in a position that counts gives NaN, in its own sample only."""
    for layout in ("nchw", "tokens"):
        inputs = _inputs("bland", (3, 12, 7, 2), layout, False, generator)
        yield _case(backend, layout, "mean", "equal", inputs | {"t": inputs["s"].clone()}, dtypes=(SINGLE, *HALF))
        inputs = _inputs("bland", (3, 12, 7, 2), layout, False, generator)
        inputs["t"][1].flatten()[5] = float("nan")
        yield _case(backend, layout, "none", "nan", inputs, gradient=False)
    for size in (1e-3, 300.0):
        inputs = _inputs("bland", (3, 12, 7, 2), "nchw", False, generator)
        inputs |= {name: size * inputs[name] for name in "st"}
        yield _case(backend, "nchw", "mean", f"size {size:g}", inputs, dtypes=(SINGLE, *HALF))
    yield _case(backend, "sequence", "mean", "own blocks", _inputs("peaky", (2, 41, 5, 2), "sequence", True, generator),
                context=SMALL)  # fmt: skip


def bytes_moved(rows: int, c: int, k: int, item_s: int, item_t: int, backward: bool = False) -> int:
    """The least traffic of a call: both sides are read once; a step writes and reads Q in float32 and writes ds."""
    forward = rows * c * (item_s + item_t)
    return forward + rows * (8 * k + c * item_s) if backward else forward


def flops(rows: int, c: int, k: int, backward: bool = False) -> int:
    """One product for both sides, one more for the gradient of s."""
    return 2 * rows * c * k * (2 if backward else 1)


cases = cases_of(projected_mse=_cases)
