# SPDX-License-Identifier: Apache-2.0
"""What the contract and the benchmark need to know of the ranking family: cases in every data regime, caps, bytes.

Ranks are judged in units of n, beyond the rounding of the result itself: what is left must be below one unit in the
last place. Correlations are judged absolutely, gradients against their own size, or that of the terms they add up.
"""

from __future__ import annotations

import math

import torch

from ..testing import REGIMES, SCALES, Caps, Case, pair
from ..testing.shared import DOUBLE, HALF, SINGLE, cases_of, grid
from ..testing.shared import ONE_DTYPE as EVERY_DTYPE
from . import op as ops
from .strength import of_rows, parse

REGULARIZATIONS = ("l2", "kl")
# a strength by name; "tensor" and "rows" are inputs of the case, with a gradient
STRENGTHS = {
    "tiny": 1e-9,
    "small": 0.02,
    "one": 1.0,
    "large": 300.0,
    "auto": "auto",
    "auto 4": ("auto", 4.0),
    "tensor": None,
    "rows": None,
    "hard": 0.0,
}
# one element, two, around the powers of two that merges and warps work on, odd and prime lengths
SIZES = (1, 2, 3, 5, 7, 8, 9, 13, 16, 17, 31, 32, 33, 63, 64, 65)
MORE_SIZES = (127, 128, 129, 255, 257, 362, 1023, 1025)
SHAPES = ((3, 37), (2, 2, 39), (41,), (1, 63), (7, 5))


def caps(dtype: torch.dtype) -> Caps:
    """Blocks, means and offsets are float64 inside: half inputs are no worse than float32."""
    return Caps(1e-12, 1e-10) if dtype == DOUBLE else Caps(5e-7, 2e-6)


def _x(regime, shape, generator):
    return pair(regime, shape, shape, generator)[0] if len(shape) > 1 else _x(regime, (1, *shape), generator)[0]


def _strength_inputs(name, x):
    """The inputs that a tensor strength adds, about the gap of neighbours."""
    values = x[x.isfinite()]
    gap = float(values.std(correction=0)) * 4 / x.shape[-1] + 1e-3 if len(values) else 1.0
    if name == "tensor":
        return {"strength": torch.tensor(gap, dtype=torch.float64)}
    if name == "rows":
        return {"strength": gap * torch.linspace(0.3, 3, max(1, x.shape[:-1].numel())).double().reshape(x.shape[:-1])}
    return {}


def _masked(x, generator):
    """A third of the entries absent, and one row altogether."""
    x = x.masked_fill(torch.rand(x.shape, generator=generator) < 0.3, -math.inf)
    if x.dim() > 1:
        x[0] = -math.inf
    return x


def _rows(op, backend, quick, generator):
    for count, regime, strength, regularization in grid(quick, 2, REGIMES, STRENGTHS, REGULARIZATIONS):
        x = _x(regime, SHAPES[count % len(SHAPES)], generator)
        masked = count % 3 == 1
        x = _masked(x, generator) if masked else x
        how = {"descending": count % 4 < 2}
        dtypes = EVERY_DTYPE if count % 2 else (SINGLE, HALF[count // 2 % 2])
        yield _row_case(op, x, regularization, strength, regime + " masked" * masked, how, dtypes=dtypes)
    for n in SIZES if quick else (*SIZES, *MORE_SIZES):
        for regularization in REGULARIZATIONS:
            x = _x("bland", (2, n), generator)
            yield _row_case(op, x, regularization, "auto", "size", {}, dtypes=(SINGLE, HALF[n % 2]))
    for label, x in _degenerate(generator):
        for regularization in REGULARIZATIONS:
            # exponentials are rounded: where gaps are multiples of the strength, rounding decides what kl pools
            apart = 0.9 * x if regularization == "kl" else x
            for strength in ("one", "auto", "hard"):
                yield _row_case(op, apart, regularization, strength, label, {}, dtypes=(SINGLE, *HALF))
    for factor in SCALES if op == "soft_rank" else ():
        for regularization in REGULARIZATIONS:
            x = factor * _x("peaky", (2, 13), generator)
            yield _row_case(op, x, regularization, "auto", f"scale {factor:g}", {}, dtypes=(SINGLE, DOUBLE))
    for dim in (0, 1):
        x = _x("peaky", (2, 9, 5), generator)
        yield _row_case(op, x, "l2", "one", f"dim {dim}", {"dim": dim})
    for regularization, strength in (("l2", "rows"), ("kl", "tensor"), ("l2", "auto")):
        x = _x("peaky", (4, 33), generator)  # without ties, which one rounding would part
        yield _row_case(op, x, regularization, strength, "probe", {}, probe=True)


def _degenerate(generator):
    """Rows of ties, of few values, and poisoned ones between healthy ones."""
    x = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    yield "constant", torch.full((2, 9), 3.1, dtype=torch.float64)
    yield "ties", (2 * x).round() / 2
    yield "nan", x.clone().index_fill_(0, torch.tensor([1]), math.nan)
    bad = x.clone()
    bad[1, 3], bad[3, 0], bad[3, 5] = math.nan, math.inf, -math.inf
    yield "poisoned", bad


def _row_case(op, x, regularization, strength, label, how, **fields):
    function = getattr(ops, op)
    inputs = {"x": x} | _strength_inputs(strength, x)

    def call(t, backend):
        return function(t["x"], regularization, t.get("strength", STRENGTHS[strength]), backend=backend, **how)

    def scale(t):
        if op == "soft_rank":
            return max(1, x.shape[how.get("dim", -1)])
        value = call(t, "reference").abs().nan_to_num(0.0, 0.0, 0.0)
        return torch.maximum(value.max(), t["x"].abs().nan_to_num(0, 0, 0).max()).clamp(min=1e-30)

    def terms(t):
        v, dim = t["x"].movedim(how.get("dim", -1), -1), how.get("dim", -1)
        value = t.get("strength", STRENGTHS[strength])
        if op == "soft_rank":
            return _unpooled(v, v.detach(), regularization, value).movedim(-1, dim)
        steps = torch.arange(v.shape[-1]) - (v.shape[-1] - 1) / 2
        still = v.detach()
        eps = of_rows(still, still != -math.inf, (still == math.inf).any(-1), parse(value, still))[..., None]
        away = steps / eps if strength != "hard" else 0.0
        return (v.masked_fill(v == -math.inf, 0.0) + away).movedim(-1, dim)

    name = f"{op} {regularization} {strength} {label} {'x'.join(map(str, x.shape))}"
    fields["ruled"] = strength == "auto"
    return Case(name, inputs, call, caps, scale, terms, alike=0, **fields)


def _unpooled(x, still, regularization, strength, hard=False):
    """What a rank's gradient is a difference of: x / eps (l2), or r x / eps (kl); absent entries are 0."""
    if hard or (isinstance(strength, float) and strength == 0):
        return 0 * x.masked_fill(x == -math.inf, 0.0)
    eps = of_rows(still, still != -math.inf, (still == math.inf).any(-1), parse(strength, still))[..., None]
    centre = still.masked_fill(still == -math.inf, 0.0).mean(-1, keepdim=True)
    x = (x - centre).masked_fill(still == -math.inf, 0.0) / eps
    return x if regularization == "l2" else x * ops.soft_rank(still, "kl", strength, backend="reference").detach()


def _diagnostics(op, backend, quick, generator):
    for count, regime in enumerate(REGIMES):
        for strength in ("tiny", "small", "one", "auto", "rows", "hard"):
            x = _x(regime, SHAPES[count % 5], generator)
            x = _masked(x, generator) if count % 2 else x
            inputs = {"x": x} | _strength_inputs(strength, x)

            def call(t, backend, strength=strength):
                found = ops.rank_diagnostics(t["x"], t.get("strength", STRENGTHS[strength]), backend=backend)
                return torch.stack([found.fraction_pooled, found.blocks.float()])

            name = f"{strength} {regime} {'x'.join(map(str, x.shape))}"
            yield Case(
                name, inputs, call, caps, lambda t: 1.0, dtypes=EVERY_DTYPE, gradient=False, alike=0, probe=count == 1
            )


def _spearman(op, backend, quick, generator):
    strengths = "small", "one", "auto", "auto 4", "tensor", "rows"
    for count, regime, strength, regularization in grid(quick, 2, REGIMES, strengths, REGULARIZATIONS):
        x, y = _two(regime, SHAPES[count % len(SHAPES)], generator)
        masked = count % 3 == 1
        if masked:
            x, y = _masked(x, generator), _masked(y, generator)
        how = {"hard_target": count % 4 == 0}
        dtypes = EVERY_DTYPE if count % 2 else (SINGLE, (SINGLE, torch.bfloat16))
        yield _pair_case(op, x, y, regularization, strength, regime + " masked" * masked, how, dtypes=dtypes)
    for n in SIZES if quick else (*SIZES, *MORE_SIZES):
        x, y = _two("bland", (2, n), generator)
        yield _pair_case(op, x, y, "l2", "auto", "size", {}, dtypes=(SINGLE, HALF[n % 2]))
    for label, x in _degenerate(generator):
        # an absent entry of a poisoned row has gradient 0 or NaN
        x = x.nan_to_num(math.nan, math.inf, 0.5)
        y = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        for sides in ((x, y), (y, x), (x, x)):
            yield _pair_case(op, *sides, "l2", "auto", label, {}, dtypes=(SINGLE, *HALF))
    yield from _scaled(op, "l2", "auto", generator)
    for regularization, strength, hard in (("l2", "auto", False), ("kl", "rows", False), ("l2", "one", True)):
        x, y = _two("peaky", (4, 33), generator)
        yield _pair_case(op, x, y, regularization, strength, "probe", {"hard_target": hard}, probe=True)


def _linear(op, backend, quick, generator):
    for regime in REGIMES:
        for shape in SHAPES:
            for masked in (False, True):
                x, y = _two(regime, shape, generator)
                if masked:
                    x, y = _masked(x, generator), _masked(y, generator)
                label = regime + " masked" * masked
                yield _pair_case(op, x, y, None, None, label, {}, dtypes=(*EVERY_DTYPE, (SINGLE, torch.float16)))
    for n in SIZES:
        yield _pair_case(op, *_two("bland", (2, n), generator), None, None, "size", {})
    for label, x in _degenerate(generator):
        y = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        for sides in ((x, y), (y, x), (x, x)):
            yield _pair_case(op, *sides, None, None, label, {}, dtypes=(SINGLE, *HALF))
    yield from _scaled(op, None, None, generator)
    for count in range(2):
        x, y = _two("peaky", (4, 33 - count), generator)
        yield _pair_case(op, x, y, None, None, "probe", {}, probe=True)


def _scaled(op, regularization, strength, generator):
    for factor in SCALES:
        x, y = _two("peaky", (2, 13), generator)
        label, dtypes = f"scale {factor:g}", (SINGLE, DOUBLE, (DOUBLE, SINGLE))
        yield _pair_case(op, factor * x, factor * y, regularization, strength, label, {}, dtypes=dtypes)


def _two(regime, shape, generator):
    if len(shape) == 1:
        return (t[0] for t in pair(regime, (1, *shape), (1, *shape), generator))
    return pair(regime, shape, shape, generator)


def _pair_case(op, x, y, regularization, strength, label, how, **fields):
    function = getattr(ops, op)
    inputs = {"x": x, "y": y} | _strength_inputs(strength, x)
    fields.setdefault("gradient", op != "spearman_corr")
    hard = how.get("hard_target", False)

    def call(t, backend):
        options = dict(how)
        if op == "spearman":
            options |= {"regularization": regularization}
            options |= {"regularization_strength": t.get("strength", STRENGTHS[strength])}
        return function(t["x"], t["y"], backend=backend, **options)

    def terms(t):
        """The correlation with norms and other side fixed, through ranks that do not pool."""
        if op == "pearson":
            sides = [t[side].masked_fill((t["x"] == -math.inf) | (t["y"] == -math.inf), 0.0) for side in "xy"]
            still = [v.detach() - v.detach().mean(-1, keepdim=True) for v in sides]
        else:
            still = [
                t[side].detach().masked_fill((t["x"] == -math.inf) | (t["y"] == -math.inf), -math.inf) for side in "xy"
            ]
            value = t.get("strength", STRENGTHS[strength])
            sides = [
                _unpooled(t[side], v, regularization, value, hard and side == "y")
                for side, v in zip("xy", still, strict=True)
            ]
            still = [ops.soft_rank(v, regularization, value, backend="reference").detach() for v in still]
            still = [v - v.mean(-1, keepdim=True) for v in still]
        norms = [torch.where(v.norm(dim=-1) > 0, v.norm(dim=-1), 1.0) for v in still]
        mixed = (sides[0] * still[1].abs()).sum(-1) + (sides[1] * still[0].abs()).sum(-1)
        return mixed / (norms[0] * norms[1])

    name = f"{op} {regularization} {strength} {label} {'x'.join(map(str, x.shape))}"
    fields["ruled"] = strength == "auto"
    return Case(name, inputs, call, caps, lambda t: 1.0, terms if op != "spearman_corr" else None, alike=0, **fields)


def bytes_moved(R: int, n: int, itemsize: int, op: str = "soft_rank", backward: bool = False) -> int:
    """The least traffic of a call: rows are read once; ranks, block ids (int32) and gradients written once."""
    if op in ("spearman", "pearson", "spearman_corr"):
        return R * n * itemsize * (3 if backward else 2)
    forward = R * n * (itemsize + 4)
    return forward + R * n * (4 + 4 + 4 + itemsize) if backward else forward


def flops(R: int, n: int) -> int:
    """Comparisons of the sort, which dwarf the rest."""
    return R * n * max(1, math.ceil(math.log2(max(n, 2))))


cases = cases_of(
    soft_rank=_rows,
    soft_sort=_rows,
    rank_diagnostics=_diagnostics,
    spearman=_spearman,
    pearson=_linear,
    spearman_corr=_linear,
)
