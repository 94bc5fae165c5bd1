# SPDX-License-Identifier: Apache-2.0
"""Ops on drawn shapes, dtypes, layouts, masks, sizes and options, against formulas of the fuzzer's own in float64.

`python tests/fuzz.py [--seconds 120] [--seed 0]`, or `make fuzz`; a failure prints the call and how to repeat it. What
is granted follows from conditioning: `STEPS` times what one rounding of the inputs moves the formula, and `UNITS` of
the output's dtype.
"""

import argparse
import math
import random
import sys
import time
from functools import reduce
from typing import NamedTuple

import fuzz_formulas
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels as kd
from kdkernels.backend import obstacle
from kdkernels.registry import OPS

STEPS, UNITS, DRAWS = 8, 4, 6
TEXTBOOK = 0.05  # of the largest number: what is written as in the paper may cancel
SINGLE, DOUBLE = torch.float32, torch.float64
NOISE = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
SIZES = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 40)
WIDTHS = (1, 2, 3, 7, 8, 16, 17, 33, 64, 65, 257, 1000)
ARITHMETIC = set("add sub mul div sum mean mm bmm exp expm1 log sqrt pow logsumexp linalg_solve_triangular".split())
KERNELS = {
    "linear": kd.Linear,
    "polynomial": kd.Polynomial,
    "cosine": kd.Cosine,
    "rbf": kd.RBF,
    "laplacian": kd.Laplacian,
}


class Case(NamedTuple):
    op: str
    tensors: dict[str, torch.Tensor]  # all differentiable
    options: dict
    backend: str

    def __str__(self):
        tensors = [f"{k}={t.dtype} {tuple(t.shape)} strides {t.stride()}" for k, t in self.tensors.items()]
        options = [f"{k}={v!r}" for k, v in self.options.items() if v is not None]
        return f"kd.{self.op}({', '.join([*tensors, *options, f'backend={self.backend!r}'])})"


class Draw(random.Random):
    def __init__(self, seed):
        super().__init__(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def chance(self, p):
        return self.random() < p

    def power(self, least, most):
        return 10 ** self.uniform(least, most)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=DOUBLE)

    def rows(self, *shape, powers=(-6, 6), offsets=(0, 0, 0, 1, 30, 1000)):
        """[..., n, p] of one scale and offset; some are whole numbers, some have two equal rows."""
        t = self.normal(*shape) + self.choice(offsets)
        t = t.round() if self.chance(0.2) else t
        if self.chance(0.2):
            t[..., -1, :] = t[..., 0, :]
        return t * self.power(*powers)

    def beside(self, t, width):
        """Another side: unrelated, close to t, or a mixture of its columns."""
        if self.chance(0.3):
            return self.normal(*t.shape[:-1], width) * self.power(-6, 6)
        if width == t.shape[-1]:
            return t + size_of(t) * width**-0.5 * self.power(-3, 0) * self.normal(*t.shape)
        few = t[..., :4, None]  # each row by itself: equal ones stay equal
        return (few * self.normal(few.shape[-2], width)).sum(-2)

    def mask(self, *shape):
        """None or more than three of a group: fewer rows leave gradients that are 0 but for rounding."""
        if self.chance(0.6):
            return None
        keep = torch.rand(shape, generator=self.generator) < self.choice((0.3, 0.8, 0.9))
        return keep & (keep.sum(-1, keepdim=True) > 3)

    def filled(self, t, mask):
        """What a mask, of a shape that broadcasts, leaves out holds anything."""
        return t if mask is None else t.masked_fill(~mask, self.choice((math.nan, math.inf, 1e4, 0.0)))

    def laid(self, t, shared):
        """In some dtype and layout; shared: groups may be one, as no mask has filled rows of one that others count."""
        dtype = self.choice((torch.float16, torch.bfloat16, SINGLE, DOUBLE))
        if dtype == torch.float16 and largest(t) > 6e4:
            dtype = torch.bfloat16
        t, layout = t.to(dtype), self.choice(("plain", "transposed", "sliced", "shifted", "expanded"))
        if layout == "transposed" and t.dim() > 1:
            a, b = self.sample(range(t.dim()), 2)
            return t.transpose(a, b).contiguous().transpose(a, b)
        if layout == "sliced":
            return t.repeat_interleave(3, -1)[..., 1::3]
        if layout == "shifted":
            return torch.cat([t[:1], t])[1:]
        return t[:1].expand(t.shape) if layout == "expanded" and shared and t.dim() > 2 else t


def largest(t):
    return float(t.nan_to_num(0.0, 0.0, 0.0).abs().max()) if t.numel() else 0.0


def size_of(t):
    """The mean distance of a row to the mean."""
    return float((t - t.mean(-2, keepdim=True)).norm(dim=-1).mean()) or 1.0


def kernel_for(draw, *sides, names=tuple(KERNELS)):
    name, size = draw.choice(names), size_of(torch.cat(sides, -2))
    if name == "polynomial":
        return name, draw.choice((1, 2, 3)), 0.5 / size**2, draw.choice((0.0, 1.0, 2.0))
    rules = ("median", "mean", size * draw.uniform(0.3, 5), (0.5 * size, 2 * size))
    return (name, draw.choice(rules)) if name in ("rbf", "laplacian") else (name,)


def pair(draw, least, widths=WIDTHS, **options):
    """x and y [n, p], [n, q], perhaps in groups, perhaps with a mask."""
    n, p, lead = draw.choice([n for n in SIZES if n >= least]), draw.choice(widths), draw.choice(((), (), (1,), (3,)))
    x = draw.rows(*lead, n, p)
    y = draw.beside(x, draw.choice((p, draw.choice(widths))))
    if "kernel" in options:
        options["kernel"] = kernel_for(draw, x), kernel_for(draw, y)
    mask = draw.mask(*lead, n)
    filled = (draw.filled(t, None if mask is None else mask[..., None]) for t in (x, y))
    return dict(zip("xy", filled, strict=True)), options | {"mask": mask}


# unbiased, center, row_normalize
ESTIMATORS = (
    (True, True, False),
    (False, True, False),
    (False, False, False),
    (False, False, True),
    (False, True, True),
)


def statistic(draw):
    unbiased, center, row_normalize = draw.choice(ESTIMATORS)
    options = {"unbiased": unbiased, "center": center, "row_normalize": row_normalize, "kernel": None}
    return pair(draw, 4 if unbiased else 2, **options)


def two_samples(draw):
    unbiased, p, lead = draw.chance(0.5), draw.choice(WIDTHS), draw.choice(((), (), (3,)))
    n, m = (draw.choice(SIZES[unbiased:]) for _ in range(2))
    x, y = draw.rows(*lead, n + m, p).split([n, m], -2)
    y = y + draw.choice((0, 1)) * size_of(x)
    kernel, masks = kernel_for(draw, x, y), [draw.mask(*lead, k) for k in (n, m)]
    filled = (draw.filled(t, None if k is None else k[..., None]) for t, k in zip((x, y), masks, strict=True))
    return dict(zip("xy", filled, strict=True)), {"unbiased": unbiased, "kernel": kernel, "mask": tuple(masks)}


def scores(draw, names="x", unit=1, **options):
    """Rows along any dim, entries absent, a strength in the unit of x (or its inverse) or relative."""
    shape = [*draw.choice(((), (1,), (3,), (2, 2))), draw.choice((*SIZES, 100))]
    x = draw.rows(1, *shape)[0]
    spread, dim, strength = float(x.std(-1, correction=0).mean()) or 1.0, draw.randrange(len(shape)), draw.power(-2, 2)
    sides = [x, draw.choice((-1, 1)) * x + spread * draw.power(-2, 1) * draw.normal(*shape)][: len(names)]
    if draw.chance(0.2):
        sides[0][..., 0] = -math.inf
    sides = [t.movedim(-1, dim) for t in sides]
    options |= {"regularization": draw.choice(("l2", "kl")), "dim": dim - draw.choice((0, len(shape)))}
    options["regularization_strength"] = draw.choice(("auto", ("auto", strength), strength * spread**unit))
    options["mask"] = draw.mask(*sides[0].shape)
    return {name: draw.filled(t, options["mask"]) for name, t in zip(names, sides, strict=True)}, options


def logits(draw, **options):
    shape = [*draw.choice(((1,), (5,), (2, 3))), draw.choice((*SIZES, *WIDTHS))]
    student = draw.rows(1, *shape, powers=(-2, 1.5))[0]
    teacher = student + draw.normal(*shape) * draw.power(-3, 1)
    if shape[-1] > 2 and draw.chance(0.2):  # of one class alone the gradient is 0, and any rounding too much
        teacher[..., 0] = -math.inf
    options |= {"tau": draw.choice((0.5, 1.0, 2.0, 3.7, 4.0, 20.0)), "reduction": draw.choice(("mean", "sum", "none"))}
    return {"student": student, "teacher": teacher}, options


def projection(draw):
    shape = [draw.choice(SIZES[:8]), draw.choice(WIDTHS), *draw.choice(((), (7,), (3, 5)))]
    s = draw.rows(*shape)
    t = s + largest(s) * draw.power(-3, 1) * draw.normal(*shape)
    dim, mask = draw.randrange(1, len(shape)), draw.mask(shape[0], *draw.choice(((), shape[2:])))
    there = None if mask is None else mask.reshape(len(s), 1, *mask.shape[1:], *[1] * (len(shape) - mask.dim() - 1))
    s, t = (draw.filled(u, there).movedim(1, dim) for u in (s, t))
    tensors = {"s": s, "t": t, "basis": draw.normal(shape[1], draw.randint(1, min(shape[1], 20)))}
    return tensors, {"channel_dim": dim, "reduction": draw.choice(("mean", "sum", "none")), "mask": mask}


def landmarks(draw, both):
    n = draw.choice(SIZES[4:])
    x = draw.rows(n, draw.choice(WIDTHS), offsets=(0, 0, 1, 10))  # farther off it asks for centred rows
    sides = [x, draw.beside(x, draw.choice(WIDTHS))][: 1 + both]
    picked = [t[: draw.randint(1, 9)] for t in sides]
    picked = [t + size_of(t) * t.shape[1] ** -0.5 * draw.normal(*t.shape) for t in picked]
    names = ("linear", "cosine", "rbf", "laplacian")
    options = {"kernel": kernel_for(draw, x, names=names), "jitter": draw.choice((1e-3, 1e-2))}
    if not both:
        return {"x": x, "landmarks": picked[0]}, options
    options |= {"kernel": tuple(kernel_for(draw, t, names=names) for t in sides), "unbiased": draw.chance(0.5)}
    options["mask"] = draw.mask(n)
    sides = [draw.filled(t, None if options["mask"] is None else options["mask"][:, None]) for t in sides]
    return dict(zip(("x", "y", "x_landmarks", "y_landmarks"), sides + picked, strict=True)), options


FAMILIES = {
    "gram": {
        "cka": statistic,
        "hsic": statistic,
        "mmd": two_samples,
        "gram_mse": lambda d: pair(d, 1, normalize=d.choice((None, "row")), reduction=d.choice(("mean", "sum"))),
    },
    "rank": {
        "soft_rank": lambda d: scores(d, descending=d.chance(0.5)),
        "soft_sort": lambda d: scores(d, unit=-1, descending=d.chance(0.5)),
        "spearman": lambda d: scores(d, "xy", hard_target=d.chance(0.3)),
    },
    "logits": {"distillation_kl": logits, "generalized_jsd": lambda d: logits(d, beta=d.uniform(0.05, 0.95))},
    # angles on a line have no gradient
    "relation": {"rkd_distance": lambda d: pair(d, 3), "rkd_angle": lambda d: pair(d, 3, WIDTHS[1:])},
    "nystrom": {"nystrom_features": lambda d: landmarks(d, False), "nystrom_cka": lambda d: landmarks(d, True)},
    "projection": {"projected_mse": projection},
}
MAKERS = {op: make for family in FAMILIES.values() for op, make in family.items()}


def draw_case(seed, ops=tuple(MAKERS)):
    draw = Draw(seed)
    op = draw.choice(ops)
    tensors, options = MAKERS[op](draw)
    backends = [b for b in OPS[op].backends if b != "triton" and obstacle(b, "cpu", op=op) is None]
    shared = options.get("mask") is None
    laid = {k: draw.laid(t, shared) for k, t in tensors.items()}
    return Case(op, laid, options, draw.choice(["auto", *backends]))


def evaluate(function, tensors, options, weights):
    """The value, and the gradients of its finite part in these weights."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    value = function(*leaves, **options)
    if not value.requires_grad:
        return value, [torch.zeros_like(t) for t in leaves]
    upstream = weights(value).to(value.dtype) * value.isfinite()
    return value.detach(), torch.autograd.grad(value, leaves, upstream, allow_unused=True, materialize_grads=True)


def as_op(kernel):
    """The package's kernel objects."""
    pair_of = isinstance(kernel[0], tuple)
    return tuple(as_op(k) for k in kernel) if pair_of else KERNELS[kernel[0]](*kernel[1:])


class Rounded(TorchDispatchMode):
    """Monte Carlo arithmetic: what a formula computes, in its backward pass too, is off by about one rounding."""

    def __init__(self, eps):
        super().__init__()
        self.eps, self.at = eps, 0

    def near(self, t):
        self.at = (self.at + 7919) % 1000
        noise = NOISE.repeat(t.numel() // len(NOISE) + 2) if t.numel() > len(NOISE) - 1000 else NOISE
        return t * (1 + self.eps * noise[self.at : self.at + t.numel()].reshape(t.shape))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        rounds = func.overloadpacket.__name__ in ARITHMETIC and isinstance(out, torch.Tensor) and out.dtype == DOUBLE
        return self.near(out) if rounds else out

    def inputs(self, tensors):
        """Equal numbers alike: what is tied or constant stays so."""
        flat = torch.cat([t.flatten() for t in tensors])
        numbers, place = flat.unique(return_inverse=True)
        parts = self.near(numbers)[place].split([t.numel() for t in tensors])
        return [part.reshape(t.shape) for part, t in zip(parts, tensors, strict=True)]

    def runs(self, formula, tensors, options, weights):
        for _ in range(DRAWS):
            inputs = self.inputs(tensors)
            with self:
                yield evaluate(formula, inputs, options, weights)


def over_budget(got, want, near, rows, textbook):
    """The error in units of what is granted, at worst of `rows` independent rows."""
    right = (want.isnan() & got.isnan()) | (got == want) | (got == want.to(got.dtype))
    if not (right | got.isfinite()).all():
        return math.inf
    top = lambda t: t.nan_to_num(0.0, 0.0, 0.0).abs().reshape(rows, -1).amax(1)  # noqa: E731
    moved, limits = torch.stack([top(t - want) for t in near]).amax(0), torch.finfo(got.dtype)
    budget = STEPS * moved + UNITS * limits.eps * (top(want) + limits.tiny) + 1e-36
    if textbook:
        budget = 32 * budget + TEXTBOOK * top(want)
    return float((top((got.double() - want).masked_fill(right, 0.0)) / budget).max())


def dtypes_of(case):
    """(of the value, of the work) as the docstrings say."""
    given = [t.dtype for name, t in case.tensors.items() if name != "basis"]
    wide = reduce(torch.promote_types, given, SINGLE)
    if case.op == "nystrom_features":
        return reduce(torch.promote_types, given), wide
    if case.op in FAMILIES["rank"]:
        return wide, DOUBLE
    # each side works in its own dtype; a centred statistic of rows that are not centred loses digits
    raw = case.options.get("center", False) and case.options["row_normalize"]
    return wide, SINGLE if raw or (case.op == "nystrom_cka" and set(given) != {DOUBLE}) else wide


def expected(case, work):
    """Weights of the values, the value and gradients of the formula, and those of runs one rounding apart."""
    ups = NOISE[:100_000].bfloat16().double()  # of few digits: exact in every dtype
    weights = lambda value: ups[: value.numel()].reshape(value.shape)  # noqa: E731
    question = getattr(fuzz_formulas, case.op), [t.double() for t in case.tensors.values()], case.options, weights
    eps = torch.finfo(work).eps * (64 if case.op == "rkd_angle" else 1)  # which goes by the law of cosines
    runs = [evaluate(*question), *Rounded(eps).runs(*question)]
    top = max(largest(g) for _, grads in runs for g in grads) or 1.0
    factor = 2.0 ** max(-100, min(100, -round(math.log2(top))))  # half gradients neither overflow nor vanish
    ups *= factor
    want, *near = ([value, *(factor * g for g in grads)] for value, grads in runs)
    return weights, want, near


def judge(case):
    """{part: error over budget}."""
    dtype, work = dtypes_of(case)
    weights, want, near = expected(case, work)
    options = case.options | {k: as_op(v) for k, v in case.options.items() if k == "kernel"} | {"backend": case.backend}
    tensors, found = list(case.tensors.values()), {}
    value, grads = evaluate(getattr(kd, case.op), tensors, options, weights)
    overflows = (want[0].to(dtype).isinf() & want[0].isfinite()).any()
    lead = () if case.op in ("soft_rank", "soft_sort", "nystrom_features") else value.shape
    parts = zip(["value", *case.tensors], [value, *grads], [dtype, *(t.dtype for t in tensors)], want, strict=True)
    for i, (name, got, own, right) in enumerate(parts):
        if got.dtype != own or got.shape != right.shape:
            return {f"{name} is {got.dtype} {list(got.shape)}, not {own} {list(right.shape)}": math.inf}
        rows = value.numel() if lead and got.shape[: len(lead)] == lead else 1
        found[name] = over_budget(got, right, [run[i] for run in near], rows, case.backend == "reference")
    return {"value": found["value"]} if overflows else found


def fails(case, granted=1.0):
    """What to say of a case, or nothing; granted: budgets."""
    try:
        found = judge(case)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ", ".join(f"{part} {ratio:.3g} of its budget" for part, ratio in found.items() if not ratio <= granted)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--case", type=int, help="this seed alone")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start = asked.seed if asked.case is None else asked.case
    seed, failed, end = start, 0, time.monotonic() + asked.seconds
    while seed == start or (asked.case is None and time.monotonic() < end):
        case = draw_case(seed)
        said = fails(case)
        if said or asked.case is not None:
            print(f"python tests/fuzz.py --case {seed}\n  {said or 'passes'}\n  {case}", flush=True)
        seed, failed = seed + 1, failed + bool(said)
    print(f"{seed - start} cases, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
