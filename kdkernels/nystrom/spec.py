# SPDX-License-Identifier: Apache-2.0
"""What the contract and the benchmark need to know of the Nystrom family: cases in every data regime, caps, bytes.

Features are judged in units of the terms that a row of C W^(-1/2) adds up, |C| |W^(-1/2)|: the whitener amplifies C's
rounding by up to jitter^(-1/2). CKA's error is absolute, transfer's in units of the two squared norms (of the value
itself where both sides have m landmarks).
"""

from __future__ import annotations

import contextlib
from functools import partial

import torch

from ..gram.bandwidth import sigma_of
from ..gram.kernels import RBF, Laplacian, Polynomial, spec_of
from ..testing import REGIMES, SCALES, Caps, Case, generator_beside, pair, seeded
from ..testing.shared import DOUBLE, EVERY_DTYPE, ONE_DTYPE, SINGLE, cases_of, grid, instead, some_rows
from . import chunks, reference
from . import op as ops

# each takes the tensor sigma of the case (or None) and the spread of its data, and gives the `kernel` argument
KERNELS = {
    "linear": lambda sigma, spread: "linear",
    "polynomial": lambda sigma, spread: "polynomial",
    "cubic": lambda sigma, spread: Polynomial(3, 0.5, 2.0),
    "cosine": lambda sigma, spread: "cosine",
    "rbf": lambda sigma, spread: "rbf",
    "rbf sum": lambda sigma, spread: RBF((0.5 * spread, spread, 4 * spread)),
    "rbf sigma": lambda sigma, spread: RBF(sigma),
    "laplacian": lambda sigma, spread: Laplacian("mean"),
    "laplacian sigma": lambda sigma, spread: Laplacian(sigma),
}
OF_ANY_SIZE = ("linear", "cosine", "rbf", "laplacian")
WHITENINGS = ("cholesky", "sqrt")
# (rows, width, landmarks): fewer landmarks than columns; more; more than rows
SHAPES = ((33, 7, 5), (21, 4, 9), (9, 6, 14))
# around row tiles of 64 and landmark blocks of 32, and the smallest
ROWS = (1, 2, 3, 31, 63, 64, 65, 129)
LANDMARKS = (1, 2, 31, 32, 33, 63, 65)
MORE_LANDMARKS = (127, 128, 129, 255, 256, 257)


def caps(dtype: torch.dtype) -> Caps:
    """Half inputs are computed in float32: the same limits, beyond the rounding of what is stored."""
    return Caps(1e-12, 1e-9) if dtype == DOUBLE else Caps(1e-6, 5e-5)


def statistic_caps(dtype: torch.dtype) -> Caps:
    """The textbook cancels in its centred sums; the gradient passes twice through the whitener."""
    return Caps(1e-10, 1e-7) if dtype == DOUBLE else Caps(1e-4, 5e-4)


def small_chunks(rows: int = 8, fused: int = 16):
    """Chunks of a few rows, and on the backend triton panels above a few landmarks."""
    places = [(chunks, "CHUNK", rows)]
    with contextlib.suppress(ImportError):
        from . import triton_impl

        places.append((triton_impl, "FUSED", fused))
    return instead(*places)


def _spread(x) -> float:
    return float((x - x.mean(0)).square().sum(1).mean().sqrt()) or 1.0


def _sided(regime, shape, generator, sigma: bool):
    """Rows and landmarks of one regime, the landmarks near rows but none of them."""
    n, d, m = shape
    x, other = pair(regime, (n, d), (m, d), generator, rows_match=n == m)
    near = x[torch.arange(m) % n]
    inputs = {"x": x, "landmarks": near + 0.3 * (other - near) if regime != "near" else near + 1e-3 * other}
    if sigma:
        inputs["sigma"] = torch.tensor(_spread(x), dtype=torch.float64)
    return inputs


def _unusual(backend, kernels, make):
    """(kernel, label, inputs) of what float32 squares do not hold: clusters far apart under a narrow kernel, rows of
    any size. A GPU does not look (MATH.md of the Gram family)."""
    if backend == "triton":
        return
    for kernel in ("rbf sigma", "laplacian sigma"):
        inputs = make() | {"sigma": torch.tensor(3.0, dtype=DOUBLE)}
        if "landmarks" in inputs:
            for rows in (inputs["x"], inputs["landmarks"]):
                rows[::2] += 1000.0
            yield kernel, "clusters", inputs
    for factor in SCALES:
        for kernel in kernels:
            yield kernel, f"scale {factor:g}", {k: t if k == "mask" else factor * t for k, t in make().items()}


def _features(op, backend, quick, generator):
    for count, regime, kernel, whiten in grid(quick, 2, REGIMES, KERNELS, WHITENINGS):
        if kernel.startswith("laplacian") and regime == "near":
            continue  # in float32 distances of 1e-3 carry four digits: the cusp amplifies them
        if (kernel, whiten, regime) == ("cosine", "sqrt", "offset30"):
            continue  # cosines within 1e-5 of 1: which eigenvalues count is decided by rounding
        inputs = _sided(regime, SHAPES[count % 3], generator, "sigma" in kernel)
        if kernel in ("cosine", "cubic") and regime == "offset30":
            continue  # entries of W within 1e-5 of each other: the whitener amplifies their rounding
        dtypes = EVERY_DTYPE if count % 3 == 0 and regime != "offset30" else (SINGLE,)
        yield _feature_case(kernel, whiten, 1e-3, regime, inputs, dtypes=dtypes)
    for n in ROWS:
        yield _feature_case("rbf", "cholesky", 1e-3, "rows", _sided("bland", (n, 5, 6), generator, False))
    for m in LANDMARKS if quick else (*LANDMARKS, *MORE_LANDMARKS):
        for whiten in WHITENINGS:
            inputs = _sided("bland", (17, 40, m), generator, False)
            yield _feature_case("rbf", whiten, 1e-3, "landmarks", inputs, dtypes=(SINGLE, torch.float16))
    for kernel in KERNELS:
        for whiten in WHITENINGS:
            inputs = _sided("offset3", (21, 34, 19), generator, "sigma" in kernel)
            yield _feature_case(kernel, whiten, 1e-3, "chunks", inputs, context=small_chunks)
    yield from _degenerate(generator)
    for kernel, label, inputs in _unusual(backend, OF_ANY_SIZE, lambda: _sided("peaky", (13, 6, 7), generator, False)):
        for whiten in WHITENINGS:
            yield _feature_case(kernel, whiten, 1e-3, label, inputs)
    for kernel, whiten, regime in (
        ("rbf sigma", "cholesky", "offset3"),
        ("polynomial", "sqrt", "peaky"),
        ("laplacian sigma", "cholesky", "peaky"),
    ):
        inputs = _sided(regime, (13, 6, 7), generator, "sigma" in kernel)
        # rows and landmarks on a line nearly meet: the Laplacian's cusp amplifies how their distance is rounded
        alike = None if kernel.startswith("laplacian") else -1
        yield _feature_case(kernel, whiten, 1e-3, "probe", inputs, probe=True, alike=alike)


def _degenerate(generator):
    """Duplicates, landmarks that are rows, the default jitter, NaN in a row and in a landmark, a zero row."""
    for whiten in WHITENINGS:
        inputs = _sided("bland", (12, 5, 4), generator, False)
        inputs["landmarks"] = inputs["landmarks"].repeat(2, 1)
        # the square root drops what the factor keeps: with equal eigenvalues autograd is no oracle for its gradient
        yield _feature_case("rbf", whiten, 1e-3, "duplicates", inputs, gradient=whiten == "cholesky")
        inputs = _sided("peaky", (12, 5, 6), generator, False)
        inputs["landmarks"] = inputs["x"][:6].clone()
        for kernel in ("linear", "rbf", "laplacian"):
            yield _feature_case(kernel, whiten, 1e-6, "rows as landmarks", inputs)
        for name in ("x", "landmarks"):
            inputs = _sided("bland", (9, 5, 4), generator, False)
            inputs[name][2, 1] = float("nan")
            yield _feature_case("rbf sum", whiten, 1e-3, f"nan in {name}", inputs, gradient=False)
        inputs = _sided("bland", (9, 5, 4), generator, False)
        inputs["x"][3] = 0
        yield _feature_case("cosine", whiten, 1e-3, "zero row", inputs)


def _parts(kernel, x, z, mask, whiten, jitter):
    """C and the whitener, which is a constant here."""
    function = spec_of(kernel)[0]
    params = ops._parameters(function, sigma_of(function, x, mask), DOUBLE)
    still = [p.detach() if isinstance(p, torch.Tensor) else p for p in params]
    fixed = z.detach()
    W = reference.kernel(fixed, fixed, function.name, still)
    return reference.kernel(x, z, function.name, params), reference.whitener(W, whiten, jitter)


def _feature_case(kernel, whiten, jitter, label, inputs, **fields):
    spread = _spread(inputs["x"].nan_to_num())
    make = lambda t: KERNELS[kernel](t.get("sigma"), spread)  # noqa: E731

    def call(t, backend):
        how = {"kernel": make(t), "whiten": whiten, "jitter": jitter, "backend": backend}
        return ops.nystrom_features(t["x"], t["landmarks"], **how)

    def parts(t):
        return _parts(make(t), t["x"], t["landmarks"], None, whiten, jitter)

    def scale(t):
        C, A = parts({k: v.nan_to_num() for k, v in t.items()})
        return (C.abs() @ A.abs()).max()

    def terms(t):
        """Through C alone: what moves W nearly cancels it where the landmarks are rows."""
        C, A = parts(t)
        return C @ A

    name = f"{kernel} {whiten} {label} {'x'.join(map(str, inputs['x'].shape))}x{len(inputs['landmarks'])}"
    return Case(name, inputs, call, caps, scale, terms, **fields)


ESTIMATORS = {
    "nystrom_cka": ({"unbiased": True}, {"unbiased": False}),
    "nystrom_hsic": ({"unbiased": True}, {"unbiased": False}),
    "nystrom_transfer": ({"normalize": True}, {"normalize": False}),
}
# (rows, width of x, of y, landmarks of x, of y)
PAIR_SHAPES = ((33, 7, 5, 6, 6), (21, 4, 9, 5, 8), (13, 6, 6, 9, 9))


def _two_sided(regime, shape, generator, sigma: bool, masked: bool):
    n, p, q, mx, my = shape
    x, y = pair(regime, (n, p), (n, q), generator)
    inputs = {"x": x, "y": y}
    rows = torch.arange(max(mx, my)) * 7 % n  # the same samples on both sides
    for side, m in (("x", mx), ("y", my)):
        own = inputs[side]
        noise = torch.randn((m, own.shape[1]), generator=generator, dtype=DOUBLE)
        amount = 1e-3 if regime == "near" else 0.1
        inputs[f"{side}_landmarks"] = own[rows[:m]] + amount * own.std() * noise
    if sigma:
        inputs["sigma"] = torch.tensor(_spread(x), dtype=DOUBLE)
    if masked:
        inputs["mask"] = some_rows((n,), generator)
    return inputs


def _pairs(op, backend, quick, generator):
    for count, regime, kernel, how in grid(quick, 2, REGIMES, KERNELS, ESTIMATORS[op]):
        if not _known(op, backend, kernel, regime):
            continue
        inputs = _two_sided(regime, PAIR_SHAPES[count % 3], generator, "sigma" in kernel, count % 3 == 1)
        dtypes = EVERY_DTYPE if count % 4 == 0 and regime != "offset30" else (SINGLE,)
        whiten = WHITENINGS[count % 5 == 0]
        yield _pair_case(op, kernel, whiten, how, regime, inputs, dtypes=dtypes)
    for n in ROWS:
        least = 1 if op == "nystrom_transfer" else 4
        if n >= least:
            inputs = _two_sided("bland", (n, 5, 4, 3, 3 + n % 2), generator, False, False)
            yield _pair_case(op, "rbf", "cholesky", ESTIMATORS[op][0], "rows", inputs)
    for kernel in KERNELS:
        inputs = _two_sided("bland", (21, 18, 20, 17, 19), generator, "sigma" in kernel, True)
        yield _pair_case(op, kernel, "cholesky", ESTIMATORS[op][0], "chunks", inputs, context=small_chunks)
    if op == "nystrom_cka":
        inputs = _two_sided("bland", (12, 5, 4, 4, 4), generator, False, False)
        inputs["x"][:] = 3.1
        yield _pair_case(op, "rbf sum", "cholesky", ESTIMATORS[op][0], "constant", inputs)
    inputs = _two_sided("bland", (12, 5, 4, 4, 4), generator, False, False)
    inputs["y"][3, 1] = float("nan")
    yield _pair_case(op, "rbf sum", "cholesky", ESTIMATORS[op][0], "nan", inputs, gradient=False)
    of_any_size = OF_ANY_SIZE if op == "nystrom_cka" else ("cosine", "rbf", "laplacian")
    make = lambda: _two_sided("bland", (14, 6, 5, 4, 5), generator, False, True)  # noqa: E731
    for kernel, label, inputs in _unusual(backend, of_any_size, make):
        yield _pair_case(op, kernel, "cholesky", ESTIMATORS[op][0], label, inputs)
    # a root drops small eigenvalues: landmarks far apart have none near the border, as they are or in one column
    for kernel, whiten, regime, shape, masked in (
        ("rbf sigma", "cholesky", "offset3", (13, 6, 5, 4, 4), True),
        ("polynomial", "sqrt", "peaky", (14, 6, 5, 4, 5), False),
    ):
        inputs = _two_sided(regime, shape, generator, "sigma" in kernel, masked)
        yield _pair_case(op, kernel, whiten, ESTIMATORS[op][0], "probe", inputs, probe=True)


def _known(op, backend, kernel, regime) -> bool:
    """At a mean of 30 a dot-product kernel spends its jitter on the mean: in float32, which a GPU does not leave,
    centred statistics of K~ are its rounding.

    So are those of K~ without its diagonal where one entry of that is 1e5 times the rest.
    """
    if regime == "offset30" and op != "nystrom_transfer" and backend == "triton":
        return kernel.startswith(("rbf", "laplacian"))
    if regime == "edge" and op != "nystrom_transfer" and kernel == "cubic":
        return False
    return not (kernel.startswith("laplacian") and regime == "near")


def _pair_case(op, kernel, whiten, how, label, inputs, **fields):
    function = getattr(ops, op)
    spread = _spread(inputs["x"])
    strict = len(inputs["x_landmarks"]) == len(inputs["y_landmarks"])

    def call(t, backend, name=None, **options):
        options = {**how, "kernel": KERNELS[kernel](t.get("sigma"), spread), "mask": t.get("mask"), **options}
        tensors = t["x"], t["y"], t["x_landmarks"], t["y_landmarks"]
        run = function if name is None else getattr(ops, name)
        return run(*tensors, whiten=whiten, jitter=1e-3, backend=backend, **options)

    def both(t, s):
        return t | {"x": t[s], "y": t[s], "x_landmarks": t[f"{s}_landmarks"], "y_landmarks": t[f"{s}_landmarks"]}

    def norms(t):
        """sqrt(h(K, K) h(L, L)), without gradient."""
        own = [call(both(t, s), "reference", "nystrom_hsic") for s in "xy"]
        return (own[0] * own[1]).abs().sqrt().detach()

    def squares(t):
        """|K~_S|^2 and |K~_T|^2."""
        phi = [_phi(t, s) for s in "xy"]
        return [(one.mT @ one).square().sum() for one in phi]

    def _phi(t, s):
        """Features through a whitener without gradient."""
        keep = t["mask"] if "mask" in t else slice(None)
        C, A = _parts(KERNELS[kernel](t.get("sigma"), spread), t[s], t[f"{s}_landmarks"], t.get("mask"), whiten, 1e-3)
        return C[keep] @ A

    def scale(t):
        if op == "nystrom_cka":
            return 1.0
        if op == "nystrom_hsic":
            return norms(t)
        ss, tt = squares(t)
        return (ss + tt) / (tt if how["normalize"] and tt > 0 else 1.0)

    def terms(t):
        """What the gradient is a difference of: the numerator over fixed norms; twice the product of the features."""
        if op == "nystrom_transfer":
            phi, psi = _phi(t, "x"), _phi(t, "y")
            fixed = squares(t)[1].detach() if how["normalize"] else 1.0
            return ((phi.mT @ phi).square().sum() + (psi.mT @ psi).square().sum()) / fixed
        numerator = reference.hsic(_phi(t, "x"), _phi(t, "y"), how["unbiased"])
        return numerator / (norms(t) if op == "nystrom_cka" else 1.0)

    masks = {"mask": ("x", "y")} if "mask" in inputs else {}
    shape = "x".join(map(str, [*inputs["x"].shape, *(len(inputs[f"{s}_landmarks"]) for s in "xy")]))
    option = " ".join(f"{k}={v}" for k, v in how.items())
    name = f"{kernel} {whiten} {option} {label} {shape}" + " masked" * bool(masks) + " equal m" * strict
    fields["textbook"] = partial(instead, (ops, "TEXTBOOK", torch.float32))
    return Case(name, inputs, call, statistic_caps, scale, terms, masks=masks, **fields)


def _selection(op, backend, quick, generator):
    """Indices, as the rows' numbers over n: no float error, or a wrong row."""
    for i, regime in enumerate(REGIMES):
        for method in ("rpcholesky", "uniform", "kmeans++", "greedy"):
            for kernel in ("rbf", "linear", "polynomial") if method in ("rpcholesky", "greedy") else ("rbf",):
                if method == "greedy" and kernel == "rbf" and regime in ("edge", "peaky"):
                    continue  # rows so far apart that all residuals are 1 but for rounding
                x = pair(regime, (40, 6), (40, 6), generator)[0]

                def call(t, backend, method=method, kernel=kernel):
                    generator = generator_beside(t["x"])
                    how = {"method": method, "kernel": kernel, "generator": generator, "backend": backend}
                    chosen = ops.select_landmarks(t["x"], 5, **how)
                    return chosen.to(torch.promote_types(t["x"].dtype, SINGLE))

                name = f"{method} {kernel} {regime}"
                fields = {"gradient": False, "probe": i == 0 and kernel == "rbf", "context": seeded}
                yield Case(name, {"x": x}, call, caps, lambda t: 1.0, dtypes=ONE_DTYPE, **fields)


def _quality(op, backend, quick, generator):
    kernels = ("linear", "cosine", "polynomial", "rbf", "laplacian")
    for i, regime in enumerate(REGIMES):
        for j, kernel in enumerate(kernels):
            for shape in ((33, 7, 5), (12, 20, 20)):
                s, t = pair(regime, (shape[0], shape[1]), (shape[0], shape[2]), generator)
                dtypes = EVERY_DTYPE if (i + j) % 2 == 0 and regime != "offset30" else (SINGLE,)
                yield _quality_case(kernel, regime, {"s": s, "t": t}, dtypes=dtypes, probe=(i, j) in ((0, 0), (3, 3)))


def _quality_case(kernel, label, inputs, **fields):
    def call(t, backend):
        return ops.transfer_quality(t["s"], t["t"], kernel=kernel, backend=backend)

    def terms(t):
        """|K_S| and |K_T| apart, over the fixed distance and norm that the quotient rule divides by."""
        one = spec_of(kernel)[0]
        K, L = (
            reference.kernel(v, v, one.name, ops._parameters(one, sigma_of(one, v), DOUBLE)) for v in (t["s"], t["t"])
        )
        distance, norm = (K - L).norm().detach(), L.norm().detach()
        return (K.square().sum() + L.square().sum()) / (distance * norm)

    name = f"{kernel} {label} {'x'.join(map(str, inputs['s'].shape))}"
    fields["ruled"] = kernel in ("rbf", "laplacian")
    return Case(name, inputs, call, statistic_caps, lambda t: 1.0, terms, **fields)


def bytes_moved(n: int, d: int, m: int, itemsize: int, backward: bool = False) -> int:
    """The least traffic of features: rows read and Phi written once; backward reads both and writes dx."""
    forward = n * (d + m) * itemsize
    return forward + n * (d + m + d) * itemsize if backward else forward


def flops(n: int, d: int, m: int) -> int:
    """X Z' and the triangular solve of each row, and the factor."""
    return 2 * n * m * d + n * m * m + m**3 // 3


cases = cases_of(
    nystrom_features=_features,
    nystrom_cka=_pairs,
    nystrom_hsic=_pairs,
    nystrom_transfer=_pairs,
    select_landmarks=_selection,
    transfer_quality=_quality,
)
