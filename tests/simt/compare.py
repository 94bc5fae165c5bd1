# SPDX-License-Identifier: Apache-2.0
"""What a result of the ranking kernels must satisfy, against the NumPy oracle; an AssertionError names the row.

`kernels` offers the native schemas on NumPy arrays (drive.py): values in float32 or float64, half formats as uint16.
"""

import numpy as np
import oracle
import rows

# whole numbers and equal steps: a gap can equal eps to the last bit, where rounding decides the block but not the rank
LATTICES = {"ties", "evenly", "constant", "zeros", "denormal", "convex", "clusters"}
# of the oracle's own arithmetic and a float64 kernel's, relative to the terms that enter
FLOAT64 = 1e-11
KINDS = {"float16": np.float16, "bfloat16": np.float32, "float32": np.float32, "float64": np.float64}
LARGEST_BFLOAT16 = (2 - 2.0**-7) * 2.0**127


def ulp(value, dtype):
    """The spacing of the dtype at |value|, at the largest number beyond it."""
    kind, size = KINDS[dtype], np.abs(finite(value, dtype))
    spacing = np.spacing(size.astype(kind)).astype(np.float64)
    return np.maximum(spacing * 2.0**16, 2.0**-133) if dtype == "bfloat16" else spacing


def finite(value, dtype):
    """Infinity, and what would become it, as the largest number of the dtype: a gradient may end there."""
    most = LARGEST_BFLOAT16 if dtype == "bfloat16" else float(np.finfo(KINDS[dtype]).max)
    return np.clip(value, -most, most)


def near(found, expected, allowed, what, names):
    found = np.asarray(found, np.float64)
    missing = np.isnan(expected)
    allowed = np.broadcast_to(allowed, expected.shape)
    with np.errstate(invalid="ignore"):
        wrong = np.where(missing, ~np.isnan(found), ~((np.abs(found - expected) <= allowed) | (found == expected)))
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0])
        raise AssertionError(
            f"{what}: {wrong.sum()} entries wrong, first in row {names[at[0]]!r} at {at[1:]}: "
            f"{found[at]!r}, expected {expected[at]!r} within {allowed[at]:.3g}"
        )


def first_positions(x, block, descending):
    """Block ids in the oracle's numbering: the first sorted position; -1 stays."""
    out = np.full(block.shape, -1, np.int64)
    for r, row in enumerate(x):
        at = np.flatnonzero(row > -np.inf)
        theta = row[at].astype(np.float64) * (-1 if descending else 1)
        ids = block[r][at][np.argsort(-theta, kind="stable")]
        assert (block[r][row == -np.inf] == -1).all(), "an absent element has a block"
        for one in np.unique(ids[ids >= 0]):
            inside = np.flatnonzero(ids == one)
            assert len(inside) > 1, f"block {one} of row {r} holds one element"
            assert len(inside) == inside[-1] - inside[0] + 1, f"block {one} of row {r} is no interval of values"
            out[r][at[np.flatnonzero(block[r][at] == one)]] = inside[0]
    return out


def compare_rank(
    kernels,
    n,
    dtype,
    strength,
    relative=False,
    kl=False,
    descending=False,
    factor=None,
    seed=0,
    names=None,
    twice=False,
    data=None,
):
    x, storage, names = data or rows.matrix(n, dtype, seed, names)
    work = "float64" if dtype == "float64" else "float32"
    what = f"rank n={n} {dtype} eps={strength} relative={relative} kl={kl} descending={descending}"
    if factor is not None:
        factor = np.linspace(0.5, 2.0, len(x)) if factor == "rows" else np.array([factor], np.float64)
    call = (storage, dtype, factor, strength, relative, kl, descending)
    rank, block, eps = kernels.rank_rows(*call, True)
    if twice:
        again = kernels.rank_rows(*call, True)
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip((rank, block, eps), again, strict=True)), what
        alone, none, _ = kernels.rank_rows(*call, False)
        assert none.size == 0 and np.array_equal(alone, rank, equal_nan=True), f"{what}: ranks differ without blocks"

    expected, expected_block, expected_eps = oracle.rank_rows(x, factor, strength, relative, kl, descending)
    near(eps[:, None], expected_eps[:, None], 1e-12 * np.abs(expected_eps[:, None]), f"eps, {what}", names)
    half_an_ulp = ulp(expected, work) / 2 if work == "float32" else 0
    near(rank, expected, half_an_ulp + FLOAT64 * n, what, names)
    numbered = first_positions(x, block, descending)
    for r, name in enumerate(names):
        # at strength 0 ties may count as blocks or not: the gradient is zero
        if strength > 0 and name not in LATTICES:
            assert np.array_equal(numbered[r], expected_block[r]), f"{what}: blocks of row {name!r}"

    grad = np.random.default_rng([seed, n, 1]).standard_normal(x.shape).astype(work)
    found = kernels.rank_rows_backward(grad, storage, dtype, rank, block, eps, kl, descending)
    if twice:
        again = kernels.rank_rows_backward(grad, storage, dtype, rank, block, eps, kl, descending)
        assert np.array_equal(found, again, equal_nan=True), what
    expected = oracle.rank_rows_backward(grad, rank.astype(np.float64), numbered, eps, kl, descending)
    # a rounding of the terms that cancel, then of the result
    terms = (
        4 * (np.abs(rank) if kl else 1) * np.abs(grad).max(1, initial=0)[:, None] / np.where(eps > 0, eps, 1)[:, None]
    )
    slack = (2e-7 if work == "float32" else FLOAT64) * terms
    near(finite(found, dtype), finite(expected, dtype), slack + ulp(expected, dtype), f"backward, {what}", names)


def compare_sort(kernels, n, dtype, strength, relative=False, kl=False, factor=None, seed=0, names=None, twice=False):
    x, _, names = rows.matrix(n, dtype, seed, names)
    what = f"sort n={n} {dtype} eps={strength} relative={relative} kl={kl}"
    work = "float64" if dtype == "float64" else "float32"
    # as torch.sort leaves them: NaN first, absent entries last
    x = -np.sort(np.where(np.isnan(x), -np.inf, -x), axis=1)
    x = np.where(np.isposinf(x) & oracle_nan(rows.matrix(n, dtype, seed, names)[0]), np.nan, x)
    s, storage = rows.round_to(x.astype(np.float64), dtype)
    if factor is not None:
        factor = np.linspace(0.5, 2.0, len(x)) if factor == "rows" else np.array([factor], np.float64)
    value, start, eps = kernels.sort_rows(storage, dtype, factor, strength, relative, kl)
    if twice:
        again = kernels.sort_rows(storage, dtype, factor, strength, relative, kl)
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip((value, start, eps), again, strict=True)), what
    expected, expected_start, expected_eps = oracle.sort_rows(s, factor, strength, relative, kl)
    near(eps[:, None], expected_eps[:, None], 1e-12 * np.abs(expected_eps[:, None]), f"eps, {what}", names)
    with np.errstate(invalid="ignore"):
        top = np.where(np.isfinite(s), np.abs(s), 0).astype(np.float64).max(1, initial=0)[:, None]
    steps = n / np.where(expected_eps > 0, expected_eps, 1)[:, None]
    slack = 1e-13 * (top + steps)
    near(value, expected, slack + (ulp(expected, work) if work == "float32" else 0), what, names)
    for r, name in enumerate(names):
        if name not in LATTICES and not oracle.poisoned(s[r]):
            assert np.array_equal(start[r], expected_start[r]), f"{what}: blocks of row {name!r}"

    grad = np.random.default_rng([seed, n, 2]).standard_normal(x.shape).astype(work)
    found = kernels.sort_rows_backward(grad, storage, dtype, start, kl)
    expected = oracle.sort_rows_backward(grad, s, start, kl)
    slack = (4e-7 if work == "float32" else FLOAT64) * np.abs(grad).max(1, initial=0)[:, None]
    near(found, expected, slack + ulp(expected, dtype), f"backward, {what}", names)


def oracle_nan(x):
    return np.isnan(x).any(1)[:, None]


def compare_spearman(
    kernels, n, dtype, strength, relative=False, kl=False, hard=False, seed=0, names=None, twice=False
):
    x, x_storage, names = rows.matrix(n, dtype, seed, names)
    # the target's regimes are turned by one, so that both sides meet several of the other's
    turned = [*names[1:], names[0]]
    y, y_storage, _ = rows.matrix(n, dtype, seed + 1, turned)
    names = [f"{a} against {b}" for a, b in zip(names, turned, strict=True)]
    what = f"spearman n={n} {dtype} eps={strength} relative={relative} kl={kl} hard={hard}"
    call = (x_storage, y_storage, dtype, strength, relative, kl, hard)
    value, dx, dy = kernels.spearman_rows(*call, True, True)
    if twice:
        again = kernels.spearman_rows(*call, True, True)
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip((value, dx, dy), again, strict=True)), what
        alone, no_dx, no_dy = kernels.spearman_rows(*call, False, False)
        assert no_dx.size == no_dy.size == 0 and np.array_equal(alone, value, equal_nan=True), what
    tight = dtype == "float64"
    for r, name in enumerate(names):
        rho, gx, gy, length_x, length_y, eps_x, eps_y = oracle.spearman_row(x[r], y[r], strength, relative, kl, hard)
        if min(length_x, length_y) < 1e-6 * n:  # ranks that are equal up to rounding: no correlation to speak of
            continue
        near(value[r : r + 1, None], np.full((1, 1), rho), 1e-9 if tight else 1e-6, what, [name])
        sides = [(dx, gx, length_x, eps_x), (dy, gy, length_y, eps_y)]  # hard: eps 0, gradient 0
        for found, expected, length, eps in sides:
            # d rho/dr is at most 1 / length; the Jacobian brings 1 / eps, and with kl a rank of up to n
            terms = (n if kl else 1) / (length * eps) if eps > 0 else 0
            found, expected = (finite(g, "float64" if tight else "float32") for g in (found[r], expected))
            near(found[None], expected[None], (1e-9 if tight else 1e-6) * terms, f"gradient, {what}", [name])


class Textbook:
    """The oracle in the place of the kernels: what the comparison accepts, and the tests then spoil."""

    def _result(self, x, dtype):
        return x.astype(np.float64 if dtype == "float64" else np.float32)

    def _values(self, storage, dtype):
        absent = storage == rows.LEAST[dtype]
        if dtype == "bfloat16":
            storage = (storage.astype(np.uint32) << 16).view(np.float32)
        if dtype == "float16":
            storage = storage.view(np.float16).astype(np.float32)
        return np.where(absent, -np.inf, storage)

    def rank_rows(self, x, dtype, factor, strength, relative, kl, descending, need_blocks):
        rank, block, eps = oracle.rank_rows(self._values(x, dtype), factor, strength, relative, kl, descending)
        return self._result(rank, dtype), block.astype(np.int32) if need_blocks else np.zeros(0, np.int32), eps

    def rank_rows_backward(self, grad, x, dtype, rank, block, eps, kl, descending):
        g = oracle.rank_rows_backward(grad, rank.astype(np.float64), block, eps, kl, descending)
        return rows.round_to(g, dtype)[0]

    def sort_rows(self, s, dtype, factor, strength, relative, kl):
        value, start, eps = oracle.sort_rows(self._values(s, dtype), factor, strength, relative, kl)
        return self._result(value, dtype), start.astype(np.int32), eps

    def sort_rows_backward(self, grad, s, dtype, start, kl):
        return rows.round_to(oracle.sort_rows_backward(grad, self._values(s, dtype), start, kl), dtype)[0]

    def spearman_rows(self, x, y, dtype, strength, relative, kl, hard, grad_x, grad_y):
        pairs = zip(self._values(x, dtype), self._values(y, dtype), strict=True)
        found = [oracle.spearman_row(a, b, strength, relative, kl, hard)[:3] for a, b in pairs]
        value, dx, dy = (self._result(np.stack(part), dtype) for part in zip(*found, strict=True))
        return value, dx if grad_x else np.zeros(0), dy if grad_y else np.zeros(0)
