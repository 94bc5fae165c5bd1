# SPDX-License-Identifier: Apache-2.0
"""What the contract and the benchmark need to know of the Gram family: cases in every data regime, caps, bytes, flops.

Caps: CKA's error is absolute, the others' relative to the terms that they add up. A backend that rounds half inputs
again after centring (MATH.md, "Precision") is granted 1e-4 for them, and 1e-3 of the gradient.
"""

from __future__ import annotations

from functools import partial

import torch

from ..testing import REGIMES, SCALES, Caps, Case, pair
from ..testing.shared import DOUBLE, EVERY_DTYPE, HALF, SINGLE, cases_of, grid, instead, one_in, some_rows
from . import call, reference
from . import op as ops
from .kernels import RBF, Laplacian, Polynomial, spec_of
from .torch_impl import panels

# each takes the tensor sigma of the case (or None) and the spread of its data, and gives the `kernel` argument
KERNELS = {
    "linear": lambda sigma, spread: "linear",
    "polynomial": lambda sigma, spread: "polynomial",
    "cubic": lambda sigma, spread: Polynomial(3, 0.5, 2.0),
    "cosine": lambda sigma, spread: "cosine",
    "rbf": lambda sigma, spread: "rbf",
    "rbf far": lambda sigma, spread: RBF(("median", 5.0)),
    "rbf sum": lambda sigma, spread: RBF((0.5 * spread, spread, 4 * spread)),
    "rbf sigma": lambda sigma, spread: RBF(sigma),
    "laplacian": lambda sigma, spread: Laplacian("mean"),
    "mixed": lambda sigma, spread: ("rbf", "linear"),
}
# that see nothing but their own cluster where two of standard deviation 1 are a thousand apart
NARROW = {
    "narrow rbf": lambda sigma, spread: RBF(3.0),
    "narrow laplacian": lambda sigma, spread: Laplacian(3.0),
    "narrow sum": lambda sigma, spread: RBF((2.0, 2000.0)),
    "narrow median": lambda sigma, spread: "rbf",
}
MMD_KERNELS = [name for name in KERNELS if name != "mixed"]
OF_ANY_SIZE = {"cka": ("linear", "cosine", "rbf", "laplacian"), "hsic": ("cosine", "rbf", "laplacian")}
ESTIMATORS = {
    "unbiased": {},
    "biased": {"unbiased": False},
    "uncentred": {"unbiased": False, "center": False},
    "row": {"unbiased": False, "center": False, "row_normalize": True},
    "centred row": {"unbiased": False, "row_normalize": True},
}
# kernel, estimator, shape, groups, masked
PROBES = (
    ("rbf sigma", "unbiased", (13, 6, 5), 2, True),
    ("linear", "unbiased", (33, 5, 4), None, False),
    ("polynomial", "centred row", (11, 5, 6), None, True),
    ("linear", "biased", (11, 20, 17), 2, True),
    ("rbf sum", "unbiased", (12, 6, 5), None, True),
    ("cosine", "row", (33, 4, 4), 2, False),
)
# n, p, q: more rows than features (feature space for linear kernels), fewer, and equal widths
SHAPES = ((33, 7, 5), (19, 40, 43), (23, 9, 9))
WIDE = (19, 40, 40)
# the estimators' minimum, odd, prime, and around the power-of-two tiles of every backend
SIZES = (1, 2, 3, 4, 5, 7, 13, 15, 16, 17, 31, 32, 33)
MORE_SIZES = (63, 64, 65, 127, 128, 129)
WIDTHS = ((1, 1), (1, 17), (15, 16), (32, 33), (65, 2))
TORCH_EDGES = (panels.SMALL - 1, panels.SMALL, panels.SMALL + 1)  # kept products end, tiles begin


def small_tiles(backend: str):
    """No kept products, in PyTorch tiles of 16 rows: the path of large n on a matrix that a test can afford."""
    places = [(call, "SMALL", 8), (panels, "SMALL", 8), (panels, "TILE", 16)]
    if backend == "triton":
        from .triton_impl import schedule  # here, as importing it needs triton

        places.append((schedule, "SMALL", 8))
    return instead(*places)


def caps(kernel: str, backend: str, shape: tuple[int, int]):
    """Caps by dtype, for [n, narrower width]. A polynomial's terms exceed their centred sum by more, so do a
    Laplacian's at its cusp, and so do all those of the unbiased estimator on a handful of rows. A rounding of rows at
    1000 moves the distances within a cluster by 1e-4."""
    n, width = shape
    single = Caps(5e-6 if kernel in ("polynomial", "cubic", "laplacian") or n < 8 else 1e-6, 1e-4)
    single = Caps(1e-4, 1e-3) if kernel in NARROW else single

    def of(dtype: torch.dtype) -> Caps:
        if dtype == DOUBLE:
            return Caps(1e-9, 1e-7)
        if dtype == SINGLE or backend != "triton":  # in PyTorch half inputs are computed in float32
            return single
        # the rows are rounded again once centred: n * width roundings average out, the figures hold from 64 x 64 on
        rounding = torch.finfo(dtype).eps / 2
        spread = (n * width) ** -0.5
        return Caps(max(1e-4, 8 * rounding * spread), max(1e-3, 4 * rounding * min(1.0, 16 * spread)))

    return of


def _inputs(regime, shape, G, masked, sigma, generator, m=None):
    """x, y, and where asked for: sigma [G] or [], and masks; m is the number of rows of y if it is not n."""
    (n, p, q), lead = shape, () if G is None else (G,)
    x, y = pair(regime, (*lead, n, p), (*lead, m or n, q), generator, rows_match=m is None)
    inputs = {"x": x, "y": y}
    if sigma:
        inputs["sigma"] = 1.3 * (x - x.mean(-2, keepdim=True)).square().sum(-1).mean(-1).sqrt()
    if masked:
        for name, rows in ({"mask": n} if m is None else {"mask_x": n, "mask_y": m}).items():
            inputs[name] = some_rows((*lead, rows), generator)
    return inputs


def _clusters(n, p, q, G, masked, generator, m=None):
    """Two clusters a side, far apart; with m the second is y's."""
    inputs = _inputs("plain", (n, p, q), G, masked, False, generator, m)
    if m is None:
        inputs["x"][..., ::2, :] += 1000.0
    inputs["y"][..., slice(None, None, 2 if m is None else 1), :] += 1000.0
    return inputs


def _unusual(backend, kernels, generator, m=None):
    """(kernel, label, inputs, fields) of what float32 squares do not hold: clusters far apart under a kernel that sees
    its own alone, and features of any size under what does not depend on it. A GPU does not look (MATH.md)."""
    if backend == "triton":
        return
    for count, kernel in enumerate((*NARROW, *NARROW)):
        tiles = {"context": partial(small_tiles, backend)} if count >= len(NARROW) and backend != "reference" else {}
        q = 6 if m else 5
        inputs = _clusters(21, 6, q, (None, 2)[count % 2], count % 3 == 1, generator, m)
        yield kernel, "clusters" + " tiles" * bool(tiles), inputs, tiles
    for factor in SCALES:
        for count, kernel in enumerate(kernels):
            inputs = _inputs("peaky", (13, 6, 6), (None, 2)[count % 2], count % 3 == 1, False, generator, m)
            inputs |= {name: factor * inputs[name] for name in "xy"}
            yield kernel, f"scale {factor:g}", inputs, {"dtypes": (SINGLE, DOUBLE)}


def _statistic(op, backend, quick, generator):
    function = getattr(ops, op)
    # each regime meets each kernel once, and every estimator equally often; hsic is cka without its last division, and
    # meets half of them, no sizes and no forced tiles
    every = len(ESTIMATORS) * (1 if op == "cka" else 2)
    for count, regime, kernel, estimator in grid(quick, every, REGIMES, KERNELS, ESTIMATORS, steps=(1, 2, 3)):
        shape, G = SHAPES[count % 3], (None, 2)[count % 7 < 3]
        inputs = _inputs(regime, shape, G, count % 4 == 1, kernel == "rbf sigma", generator)
        fields = {"dtypes": _dtypes(count, regime), "gradient": _known(estimator, regime)}
        yield _pair_case(function, backend, kernel, estimator, regime, inputs, **fields)
    if op == "cka" or not quick:
        yield from _sizes(function, backend, quick, generator)
        yield from _forced_tiles(function, backend, quick, generator)
    if op == "cka":
        yield from _degenerate(function, backend, generator)
        yield from _far_from_one(function, backend, generator)
    for kernel, label, inputs, fields in _unusual(backend, OF_ANY_SIZE[op], generator):
        for estimator in ("biased", "unbiased"):
            yield _pair_case(function, backend, kernel, estimator, label, inputs, **fields)
        if kernel == "linear":
            for estimator in ("uncentred", "row", "centred row"):
                yield _pair_case(function, backend, kernel, estimator, label, inputs, **fields)
    for kernel, estimator, shape, G, masked in PROBES if op == "cka" else PROBES[:3]:
        inputs = _inputs("offset3", shape, G, masked, kernel == "rbf sigma", generator)
        yield _pair_case(function, backend, kernel, estimator, "probe", inputs, probe=True)


def _known(estimator, regime) -> bool:
    """Uncentred, a mean of 30 leaves CKA at 1 - 1e-4: its gradient is the rounding of equal terms in any float32."""
    return regime != "offset30" or estimator not in ("uncentred", "row")


def _dtypes(count, regime):
    """Every third case takes every dtype; the float64 textbook is no oracle for float64 under a large mean."""
    dtypes = EVERY_DTYPE if count % 3 == 0 else (SINGLE,)
    return tuple(d for d in dtypes if d != DOUBLE or regime != "offset30")


def _pair_case(function, backend, kernel, estimator, label, inputs, **fields):
    make, how = _kernel_of(kernel, inputs), ESTIMATORS[estimator]

    def call(t, backend):
        return function(t["x"], t["y"], kernel=make(t), mask=t.get("mask"), backend=backend, **how)

    def norms(t):
        """sqrt(h(K, K) h(L, L)), without gradient."""
        how_too = {"mask": t.get("mask"), "backend": "reference", **how}
        own = [ops.hsic(t[s], t[s], kernel=k, **how_too) for s, k in zip("xy", spec_of(make(t)), strict=True)]
        return (own[0] * own[1]).abs().sqrt().detach()

    def scale(t):
        return 1.0 if function is ops.cka else norms(t).max()

    def terms(t):
        """h(K, L) / sqrt(h(K, K) h(L, L)): its gradient nearly cancels against the norms' where x is close to y."""
        numerator = ops.hsic(t["x"], t["y"], kernel=make(t), mask=t.get("mask"), backend="reference", **how)
        return numerator / (norms(t) if function is ops.cka else 1.0)

    masks = {"mask": ("x", "y")} if "mask" in inputs else {}
    # cosines of columns that are alike are +-1: a constant side
    fields["alike"] = 0 if kernel == "cosine" else -1
    name = f"{kernel} {estimator} {label} {_shape_of(inputs)}"
    return Case(name, inputs, call, caps(kernel, backend, _size(inputs)), scale, terms, masks=masks, **fields)


def _kernel_of(kernel, inputs):
    """From the inputs of a call to its `kernel` argument; numbers in it follow the spread of the data."""
    x = inputs["x"]
    spread = float((x - x.mean(-2, keepdim=True)).square().sum(-1).mean().sqrt()) or 1.0
    if "sigma" in inputs:
        return lambda t: KERNELS[kernel](t["sigma"], spread)
    # of numbers it is made once: Dynamo may take one made inside for symbolic
    fixed = (KERNELS | NARROW)[kernel](None, spread)
    return lambda t: fixed


def _size(inputs):
    return min(t.shape[-2] for t in (inputs["x"], inputs["y"])), min(t.shape[-1] for t in (inputs["x"], inputs["y"]))


def _shape_of(inputs):
    shape = "x".join(map(str, [*inputs["x"].shape, inputs["y"].shape[-1]]))
    return shape + ("" if len(inputs) == 2 else " masked" if any("mask" in name for name in inputs) else "")


def _sizes(function, backend, quick, generator):
    sizes = SIZES if quick else (*SIZES, *MORE_SIZES, *(TORCH_EDGES if backend in ("torch", "cpp") else ()))
    for n in sizes:
        for kernel in ("linear", "rbf sum"):  # a bandwidth rule is exact for the reference only above 1024
            estimator = "unbiased" if n >= 4 else "biased" if n >= 2 else "uncentred"
            # wide features keep the linear kernel in Gram space, narrow ones bring it to feature space
            inputs = _inputs("peaky", (n, 3, 4) if n % 2 else (n, n + 1, n), None, False, False, generator)
            yield _pair_case(function, backend, kernel, estimator, "size", inputs)
    for p, q in WIDTHS:
        inputs = _inputs("peaky", (9, p, q), None, False, False, generator)
        yield _pair_case(function, backend, "polynomial", "unbiased", "width", inputs)


def _forced_tiles(function, backend, quick, generator):
    if backend == "reference":
        return
    for count, n, kernel, estimator in one_in(quick, 4, (32, 33, 47), KERNELS, ESTIMATORS):
        regime = REGIMES[count % len(REGIMES)]
        inputs = _inputs(regime, (n, 30, 34), (None, 2)[count % 2], count % 3 == 0, kernel == "rbf sigma", generator)
        fields = {"context": partial(small_tiles, backend), "gradient": _known(estimator, regime)}
        fields["dtypes"] = (SINGLE, *HALF) if count % 5 == 0 else (SINGLE,)
        yield _pair_case(function, backend, kernel, estimator, f"{regime} tiles", inputs, **fields)


def _far_from_one(function, backend, generator):
    """Features whose bandwidths, products and slopes leave the range of half precision."""
    for kernel in ("linear", "rbf", "rbf sum", "laplacian"):
        for size in (1e-2, 300.0):
            inputs = _inputs("bland", (33, 24, 20), None, False, False, generator)
            inputs |= {name: size * inputs[name] for name in "xy"}
            yield _pair_case(function, backend, kernel, "unbiased", f"size {size:g}", inputs, dtypes=(SINGLE, *HALF))


def _degenerate(function, backend, generator):
    """A constant side gives 0 with zero gradient, a NaN in a row that counts gives NaN, in its own group only."""
    for kernel in ("linear", "polynomial", "cosine", "rbf", "laplacian"):
        for estimator in ("unbiased", "biased"):
            for value in (0.0, 3.1):
                inputs = _inputs("bland", (9, 4, 5), 2, False, False, generator)
                inputs["x"][0] = value
                dtypes = (SINGLE, *HALF) if value else (SINGLE,)
                yield _pair_case(function, backend, kernel, estimator, f"constant {value}", inputs, dtypes=dtypes)
        inputs = _inputs("bland", (9, 4, 5), 2, False, False, generator)
        inputs["y"][1, 3, 2] = float("nan")
        yield _pair_case(function, backend, kernel, "unbiased", "nan", inputs, gradient=False)


def _gram_mse(op, backend, quick, generator):
    options = REGIMES, (None, "row"), (*SHAPES, WIDE), ("mean", "sum")
    for count, regime, normalize, shape, reduction in one_in(quick, 2, *options):
        inputs = _inputs(regime, shape, (None, 3)[count % 5 < 2], count % 3 == 1, False, generator)
        yield _mse_case(backend, normalize, reduction, regime, inputs, dtypes=_dtypes(count, regime))
    sizes = SIZES if quick else (*SIZES, *MORE_SIZES, *(TORCH_EDGES if backend in ("torch", "cpp") else ()))
    for n in sizes:
        inputs = _inputs("peaky", (n, 3, 4) if n % 2 else (n, n + 1, n), None, False, False, generator)
        yield _mse_case(backend, (None, "row")[n % 3 == 0], "mean", "size", inputs)
    if backend != "reference":
        for n in (32, 33, 47):
            for normalize in (None, "row"):
                inputs = _inputs("edge", (n, 40, 40 + n % 2), 2, n % 2 == 1, False, generator)
                yield _mse_case(backend, normalize, "mean", "edge tiles", inputs, context=partial(small_tiles, backend))
    for factor in SCALES if backend != "triton" else ():
        for count, shape in enumerate(SHAPES):
            inputs = _inputs("peaky", shape, (None, 3)[count % 2], count == 1, False, generator)
            inputs |= {name: factor * inputs[name] for name in "xy"}
            yield _mse_case(backend, "row", "mean", f"scale {factor:g}", inputs, dtypes=(SINGLE, DOUBLE))
    for normalize, shape, G, masked in ((None, (13, 6, 6), 2, True), ("row", (13, 20, 6), None, True)):
        inputs = _inputs("offset3", shape, G, masked, False, generator)
        yield _mse_case(backend, normalize, "mean", "probe", inputs, probe=True)


def _mse_case(backend, normalize, reduction, label, inputs, **fields):
    # feature space with p = q works on x - y itself (MATH.md), so that nothing is lost as x nears y
    (n, p), q = inputs["x"].shape[-2:], inputs["y"].shape[-1]
    strict = normalize is None and p == q and backend in ("torch", "cpp") and 3 * p * p < n * (2 * p + 40)

    def call(t, backend):
        how = {"normalize": normalize, "reduction": reduction, "mask": t.get("mask")}
        return ops.gram_mse(t["x"], t["y"], backend=backend, **how)

    def scale(t):
        if strict:
            return call(t, "reference").max()
        sides = [call(t | {s: torch.zeros_like(t[s])}, "reference") for s in "xy"]  # |L|^2 and |K|^2
        return (sides[0] + sides[1]).max()

    def terms(t):
        """2 <K, L>, plain or on rows of fixed norm: the gradient of |K|^2 nearly cancels it where x is close to y."""
        if strict:
            return call(t, "reference")
        weight = t["mask"][..., None] if "mask" in t else torch.ones_like(t["x"][..., :1])
        K, L = ((t[s] * weight) @ (t[s] * weight).mT for s in "xy")
        if normalize == "row":
            K, L = (M / M.detach().norm(dim=-1, keepdim=True).clamp(min=1e-300) for M in (K, L))
        return 2 * (K * L).sum((-2, -1)) / (weight.sum((-2, -1)) ** 2 if reduction == "mean" else 1.0)

    masks = {"mask": ("x", "y")} if "mask" in inputs else {}
    name = f"{normalize or 'plain'} {reduction} {label} {_shape_of(inputs)}"
    return Case(name, inputs, call, caps("linear", backend, _size(inputs)), scale, terms, masks=masks, **fields)


def _mmd(op, backend, quick, generator):
    for count, regime, kernel, unbiased in grid(quick, 2, REGIMES, MMD_KERNELS, (True, False)):
        if kernel == "laplacian" and regime == "near":
            continue  # in float32 two samples this close are one: the cusp is cut off (MATH.md, "Precision")
        n, p, _ = SHAPES[count % 3]
        m = None if regime == "near" else n + 4
        G, masked = (None, 2)[count % 7 < 3], count % 4 == 1
        inputs = _inputs(regime, (n, p, p), G, masked and m is not None, kernel == "rbf sigma", generator, m)
        yield _mmd_case(backend, kernel, unbiased, regime, inputs, dtypes=_dtypes(count, regime))
    for n in SIZES[::3] if quick else (*SIZES, *MORE_SIZES):
        inputs = _inputs("peaky", (n, 3 + n % 5, 3 + n % 5), None, False, False, generator, n + n % 3)
        yield _mmd_case(backend, "rbf", n > 1, "size", inputs)
    if backend != "reference":
        for kernel in MMD_KERNELS:
            inputs = _inputs("offset3", (21, 30, 30), 2, True, kernel == "rbf sigma", generator, 26)
            yield _mmd_case(backend, kernel, True, "tiles", inputs, context=partial(small_tiles, backend))
    for kernel, label, inputs, fields in _unusual(backend, OF_ANY_SIZE["hsic"], generator, 17):
        for unbiased in (True, False):
            yield _mmd_case(backend, kernel, unbiased, label, inputs, **fields)
    for kernel, unbiased, G in (("rbf sigma", True, 2), ("linear", False, None)):
        inputs = _inputs("offset3", (11, 5, 5), G, True, kernel == "rbf sigma", generator, 14)
        yield _mmd_case(backend, kernel, unbiased, "probe", inputs, probe=True)


def _mmd_case(backend, kernel, unbiased, label, inputs, **fields):
    make = _kernel_of(kernel, inputs)

    def call(t, backend):
        mask = (t["mask_x"], t["mask_y"]) if "mask_x" in t else None
        return ops.mmd(t["x"], t["y"], kernel=make(t), unbiased=unbiased, mask=mask, backend=backend)

    def matrices(t):
        """The kernel matrix of each group's joined samples."""
        joined = torch.cat([t["x"], t["y"]], -2)
        function = spec_of(make(t))[0]
        return [
            reference.kernel_matrix(x, function.of_group(g))
            for g, x in enumerate(joined.reshape(-1, *joined.shape[-2:]))
        ]

    def scale(t):
        return max(K.diagonal().mean() for K in matrices(t))

    def terms(t):
        """2 mean k(x, y): its gradient nearly cancels against that of the other two means where x is close to y."""
        n = t["x"].shape[-2]
        mixed = torch.stack([2 * K[:n, n:].mean() for K in matrices(t)])
        return mixed if t["x"].dim() == 3 else mixed[0]

    masks = {"mask_x": ("x",), "mask_y": ("y",)} if "mask_x" in inputs else {}
    name = f"{kernel} {'unbiased' if unbiased else 'biased'} {label} {_shape_of(inputs)}"
    return Case(name, inputs, call, caps(kernel, backend, _size(inputs)), scale, terms, masks=masks, **fields)


def bytes_moved(G: int, n: int, p: int, q: int, itemsize: int, backward: bool = False, sides: int = 1) -> int:
    """The least traffic of a call: the features are read once, and the gradients of `sides` sides written once."""
    read = G * n * (p + q) * itemsize
    return read + G * n * (p if sides == 1 else p + q) * itemsize if backward else read


def flops(G: int, n: int, p: int, q: int, linear: bool, backward: bool = False, sides: int = 1) -> int:
    """Multiplications and additions of the cheaper exact form; products that are symmetric count once.

    Gram space: K and L need n^2 (p + q), a gradient W X another 2 n^2 p. Feature space, linear kernels only: X'X, X'Y,
    Y'Y need n (p^2 + 2 p q + q^2), a gradient X (X'X) + Y (Y'X) another 2 n p (p + q).
    """
    gram = n * n * (p + q)
    feature = n * (p + q) ** 2
    if backward:
        widths = (p,) if sides == 1 else (p, q)
        gram += sum(2 * n * n * w for w in widths)
        feature += sum(2 * n * w * (p + q) for w in widths)
    return G * (min(gram, feature) if linear else gram)


cases = cases_of(cka=_statistic, hsic=_statistic, mmd=_mmd, gram_mse=_gram_mse)
