# SPDX-License-Identifier: Apache-2.0
"""What the contract and the benchmark need to know of the relations: cases in every data regime, caps, bytes, flops.

A value is judged in units of what its terms are differences of: |g| (u_x + u_y) for relative distances or cosines u, T
(1 + |log|) for similarities. So is a gradient; that of the angles is g = cos_x - cos_y times a slope in float32, and is
judged by the slope times the cosines.
"""

from __future__ import annotations

import torch

from ..testing import REGIMES, Caps, Case, pair
from ..testing.shared import DOUBLE, EVERY_DTYPE, HALF, SINGLE, cases_of, instead, one_in, some_rows
from . import op as ops
from . import pairs, reference, torch_impl
from .problem import EPS, MINIMUM

# n, p, q: more rows than features, fewer, equal widths
SHAPES = ((17, 7, 5), (13, 20, 23), (15, 9, 9))
# the minimum, odd, prime, and around the vectors and tiles of every backend
SIZES = (2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33)
MORE_SIZES = (47, 48, 49, 63, 64, 65)
WIDTHS = ((1, 1), (1, 17), (15, 16), (33, 2))


def caps():
    """Pairs are float64 and triplets as good as that: what remains is a product with the rows in float32."""
    return lambda dtype: Caps(1e-10, 1e-9) if dtype == DOUBLE else Caps(1e-6, 5e-6)


# what takes a second chunk and a third tile in Triton, whose interpreter is slow
FEW_SIZES = (3, 16, 33)


def small_chunks():
    """Blocks of a few columns and chunks of a few vertices."""
    places = [(table, key, size) for table, size in ((pairs.COLUMNS, 64), (torch_impl.TRIPLETS, 500)) for key in table]
    return instead(*places)


def _cases(op, backend, quick, generator):
    interpreted, groups = backend == "triton" and quick, ((None, False), (2, False), (None, True), (2, True))
    for count, regime, shape, (G, masked) in one_in(quick, 7 if interpreted else 4, REGIMES, SHAPES, groups):
        inputs = _inputs(regime, shape, G, masked, generator)
        yield _case(op, backend, regime, inputs, dtypes=_dtypes(count))
    for n in FEW_SIZES if interpreted else SIZES if quick else (*SIZES, *MORE_SIZES):
        if n >= MINIMUM[op]:
            # the only distance is its own mean: the gradient is 0 but for rounding
            known = op != "rkd_distance" or n > 2
            yield _case(op, backend, "size", _inputs("peaky", (n, 5, 4), None, False, generator), gradient=known)
    for p, q in WIDTHS:
        # samples on a line: cosines are +-1, and their gradient 0 but for rounding
        known = op == "rkd_distance" or min(p, q) > 1
        yield _case(op, backend, "width", _inputs("peaky", (9, p, q), None, False, generator), gradient=known)
    for size in (1e-3, 300.0):
        inputs = _inputs("bland", (11, 24, 20), None, False, generator)
        inputs |= {name: size * inputs[name] for name in "xy"}
        yield _case(op, backend, f"size {size:g}", inputs, dtypes=(SINGLE, *HALF))
    yield from _degenerate(op, backend, generator)
    if backend in ("torch", "cpp"):
        for regime, n, G in (("edge", 19, None), ("offset30", 12, 2), ("near", 33, None)):
            inputs = _inputs(regime, (n, 15, 9), G, G is None, generator)
            yield _case(op, backend, f"{regime} chunks", inputs, context=small_chunks)
    for shape, G, masked in (((11, 6, 5), 2, True), ((13, 4, 4), None, False)):
        yield _case(op, backend, "probe", _inputs("peaky", shape, G, masked, generator), probe=True)


def _inputs(regime, shape, G, masked, generator):
    (n, p, q), lead = shape, () if G is None else (G,)
    x, y = pair(regime, (*lead, n, p), (*lead, n, q), generator)
    inputs = {"x": x, "y": y}
    if masked:
        inputs["mask"] = some_rows((*lead, n), generator)
    return inputs


def _dtypes(count):
    return EVERY_DTYPE if count % 8 == 0 else (SINGLE,)


def _degenerate(op, backend, generator):
    """Identical samples on one side, on both, all of them; a sample that is 0; NaN in its own group only."""
    for sides, rows, value in (("x", [2, 6, 7], None), ("xy", [0, 4], None), ("x", slice(None), 3.1), ("y", [3], 0.0)):
        inputs = _inputs("bland", (9, 4, 5), 2, False, generator)
        for side in sides:
            inputs[side][1, rows] = inputs[side][1, :1].clone() if value is None else value
        yield _case(op, backend, f"alike {sides} {value}", inputs, dtypes=(SINGLE, HALF[0]))
    inputs = _inputs("bland", (9, 4, 5), 2, False, generator)
    inputs["y"][1, 3, 2] = float("nan")
    yield _case(op, backend, "nan", inputs, gradient=False)


def _case(op, backend, label, inputs, **fields):
    function = getattr(ops, op)

    def call(t, backend):
        return function(t["x"], t["y"], mask=t.get("mask"), backend=backend)

    def each(t, of):
        """of(x, y) of each group, over the rows that count."""
        keep = t["mask"] if "mask" in t else torch.ones_like(t["x"][..., 0], dtype=torch.bool)
        if keep.dim() == 1:
            return of(t["x"][keep], t["y"][keep])
        return torch.stack([of(x[k], y[k]) for x, y, k in zip(t["x"], t["y"], keep, strict=True)])

    def scale(t):
        return each(t, lambda x, y: _size(op, x.detach(), y.detach())).nan_to_num().max().clamp(min=1e-12)

    def terms(t):
        return each(t, lambda x, y: _terms(op, x, y))

    masks = {"mask": ("x", "y")} if "mask" in inputs else {}
    shape = "x".join(map(str, [*inputs["x"].shape, inputs["y"].shape[-1]]))
    name = f"{label} {shape}{' masked' if masks else ''}"
    # samples on a line have cosines of +-1, whose gradient is rounding
    alike = 0 if inputs["x"].dim() == 3 else -1 if op == "rkd_distance" else None
    return Case(name, inputs, call, caps(), scale, terms, masks=masks, alike=alike, **fields)


_RELATION = {"rkd_distance": reference.relative_distances, "rkd_angle": reference.angles}


def _size(op, x, y):
    if op == "pkt":
        p, t = (reference.probabilities(side, EPS) for side in (x, y))
        return (t * (1 + (t / p).log().abs())).mean()
    u, v = (_RELATION[op](side) for side in (x, y))
    return ((u - v).clamp(-1, 1).abs() * (u.abs() + v.abs())).mean()


def _terms(op, x, y):
    if op == "pkt":
        p, t = (reference.probabilities(side, EPS) for side in (x, y))
        return (t.detach() * p.log()).mean() + t.log().mean() / len(t)
    u, v = (_RELATION[op](side) for side in (x, y))
    if op == "rkd_angle":
        size = (u.abs() + v.abs()).detach()
    else:
        size = (u - v).detach().clamp(-1, 1).abs()
    return (size * (u + v)).mean()


def bytes_moved(n: int, p: int, q: int, itemsize: int, backward: bool = False) -> int:
    """The least traffic: the features are read once, and the student's gradient written once."""
    return n * (p + q) * itemsize + (n * p * itemsize if backward else 0)


def flops(op: str, n: int, p: int, q: int, backward: bool = False) -> int:
    """Multiplications and additions: the Gram matrices, the triplets (half of them), one product for the gradient."""
    total = n * n * (p + q)
    if op == "rkd_angle":
        total += n**3 // 2 * (45 if backward else 15)
    return total + (2 * n * n * p if backward else 0)


cases = cases_of(rkd_distance=_cases, rkd_angle=_cases, pkt=_cases)
