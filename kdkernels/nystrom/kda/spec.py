# SPDX-License-Identifier: Apache-2.0
"""What the contract and the benchmark need to know of the landmark similarity loss: cases, caps, bytes, flops.

S - T cancels where the student is near the teacher, and the clamp passes its error on: value and gradient are judged by
what the rounding of the products' terms can make of them. Triton rounds half inputs' landmarks to 11 bits (tf32).
"""

from __future__ import annotations

from functools import partial

import torch

from ...testing import REGIMES, Case, pair, sample
from ...testing.shared import DOUBLE, HALF, SINGLE, cases_of, one_in, product_caps, small_blocks
from . import op as ops
from . import torch_impl

# s, t, s_centers, t_centers: one dtype, or one each; landmarks are float32 where a ClassCenters holds them
EVERY_DTYPE = (SINGLE, *HALF, DOUBLE, (torch.bfloat16, torch.bfloat16, SINGLE, SINGLE))
EVERY_DTYPE += ((SINGLE, torch.bfloat16, SINGLE, SINGLE), (torch.float16, SINGLE, SINGLE, SINGLE))

# B, C, d, e: more and fewer samples than landmarks, equal and other widths, odd and prime
SHAPES = ((13, 7, 5, 9), (5, 17, 8, 8), (33, 3, 19, 2), (6, 10, 4, 40))
SIZES = (1, 2, 15, 16, 17, 31, 32, 33, 63, 65)
MORE_SIZES = (127, 128, 129, 257)
# one or two rows a block, as for thousands of landmarks
SMALL = partial(small_blocks, torch_impl.BLOCK, 20)


def _cases(op, backend, quick, generator):
    for count, regime, shape, how in one_in(quick, 2, REGIMES, SHAPES, ("far", "near", "class means")):
        dtypes = EVERY_DTYPE if count % 4 else (SINGLE, HALF[count // 4 % 2])
        yield _case(backend, f"{regime} {how}", _inputs(regime, shape, how, generator), dtypes=dtypes)
    for n in SIZES if quick else (*SIZES, *MORE_SIZES):
        for shape in ((n, 5, 3, 4), (4, n, 3, 4), (4, 5, n, 3), (4, 5, 3, n)):
            yield _case(backend, "size", _inputs("edge", shape, "far", generator))
    for shape in SHAPES:
        yield _case(backend, "blocks", _inputs("bland", shape, "class means", generator), context=SMALL)
    yield from _degenerate(backend, generator)
    for shape, how in (((13, 7, 5, 9), "class means"), ((9, 6, 8, 8), "near")):
        yield _case(backend, "probe", _inputs("offset3", shape, how, generator), probe=True)


def _inputs(regime, shape, how, generator):
    """far: unrelated landmarks; near: both sides almost alike, S - T within [-1, 1]; class means: of the rows."""
    B, C, d, e = shape
    s, t = pair(regime, (B, d), (B, e), generator)
    if how == "near" and d == e:
        t = s + 1e-3 * t
        centers = sample(regime, (C, d), generator)
        noise = torch.randn(C, d, generator=generator, dtype=torch.float64)
        return {"s": s, "t": t, "s_centers": centers, "t_centers": centers + 1e-3 * noise}
    if how == "class means":
        one_hot = torch.eye(C, dtype=torch.float64)[:, torch.arange(B) % C]
        means = [one_hot @ x / one_hot.sum(1, keepdim=True).clamp(min=1) for x in (s, t)]
        return {"s": s, "t": t, "s_centers": means[0], "t_centers": means[1]}
    centers = {"s_centers": sample(regime, (C, d), generator), "t_centers": sample(regime, (C, e), generator)}
    return {"s": s, "t": t} | centers


def _parts(t):
    """(V, |T|_F, the size of the terms of S - T), without gradient."""
    s, t, s_centers, t_centers = (t[name].detach() for name in ("s", "t", "s_centers", "t_centers"))
    T = t @ t_centers.mT
    V = (s @ s_centers.mT - T).clamp(-1, 1)
    terms = s.abs() @ s_centers.abs().mT + t.abs() @ t_centers.abs().mT
    return V, T.norm().clamp(min=1e-300), terms


def _case(backend, label, inputs, **fields):
    def call(t, backend):
        return ops.landmark_similarity_loss(t["s"], t["t"], t["s_centers"], t["t_centers"], backend=backend)

    def scale(t):
        V, norm, terms = _parts(t)
        return ((V.abs() * terms).sum() / norm).nan_to_num().clamp(min=1e-30)

    def terms(t):
        """Its gradient is what the clamp makes of the error of S - T, or 1 where it saturates."""
        V, norm, size = _parts(t)
        error = torch.where(V.abs() < 1, size, 1.0)
        return (t["s"] * ((error @ t["s_centers"].abs()) / norm)).sum()

    name = f"{label} " + "x".join(str(n) for n in (*inputs["s"].shape, *inputs["t_centers"].shape))
    constants = ("t", "s_centers", "t_centers")
    return Case(name, inputs, call, product_caps(backend), scale, terms, constants=constants, **fields)


def _degenerate(backend, generator):
    """A teacher of zeros gives 0 with zero gradient, centres of zeros too; NaN gives NaN."""
    inputs = _inputs("bland", (13, 7, 5, 9), "far", generator)
    for name in ("t", "t_centers"):
        yield _case(backend, f"zero {name}", inputs | {name: torch.zeros_like(inputs[name])}, dtypes=(SINGLE, *HALF))
    yield _case(backend, "zero student", inputs | {"s": torch.zeros_like(inputs["s"])}, dtypes=(SINGLE, *HALF))
    absent = {name: inputs[name].index_fill(0, torch.tensor([2]), 0.0) for name in ("s_centers", "t_centers")}
    yield _case(backend, "absent class", inputs | absent)
    for name in ("s", "t"):
        poisoned = inputs[name].clone()
        poisoned[3, 2] = float("nan")
        yield _case(backend, f"nan in {name}", inputs | {name: poisoned}, gradient=False)


def bytes_moved(B: int, C: int, d: int, e: int, item: int, backward: bool = False) -> int:
    """The least traffic of a call: features and float32 landmarks are read once, and ds written once."""
    return (B * (d + e) + (B * d if backward else 0)) * item + 4 * C * (d + e)


def flops(B: int, C: int, d: int, e: int, backward: bool = False) -> int:
    """Two products; the gradient is a third."""
    return 2 * B * C * (d + e) + (2 * B * C * d if backward else 0)


cases = cases_of(landmark_similarity_loss=_cases)
