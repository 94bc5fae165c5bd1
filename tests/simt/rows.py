# SPDX-License-Identifier: Apache-2.0
"""Rows that break ranking kernels, one regime a row, so that every launch mixes them: a row must not see another's."""

import numpy as np

# as stored; what is no greater is absent
LEAST = {
    "float16": np.uint16(0xFBFF), "bfloat16": np.uint16(0xFF7F),
    "float32": np.finfo(np.float32).min, "float64": np.finfo(np.float64).min,
}  # fmt: skip
HUGE, TINY = {"float16": 3e4, "bfloat16": 3e38, "float32": 3e38, "float64": 1e150}, 1e-40


def _one_of(rng, n, value, at=None):
    x = rng.standard_normal(n)
    if n:
        x[rng.integers(n) if at is None else at] = value
    return x


# name: (generator, n, the dtype's name) -> float64 [n]
REGIMES = {
    "random": lambda rng, n, d: rng.standard_normal(n),
    "unit": lambda rng, n, d: rng.random(n),
    "ties": lambda rng, n, d: rng.integers(0, max(2, n // 8), n) * 0.5,
    "rising": lambda rng, n, d: np.sort(rng.standard_normal(n)),
    "nan": lambda rng, n, d: _one_of(rng, n, np.nan),
    "falling": lambda rng, n, d: -np.sort(rng.standard_normal(n)),
    "evenly": lambda rng, n, d: rng.permutation(n) * 1.0,
    "constant": lambda rng, n, d: np.full(n, 0.37),
    "outlier": lambda rng, n, d: _one_of(rng, n, 1e4),
    "infinite": lambda rng, n, d: _one_of(rng, n, np.inf),
    "zeros": lambda rng, n, d: np.where(rng.random(n) < 0.5, 0.0, -0.0),
    "denormal": lambda rng, n, d: rng.integers(-9, 9, n) * TINY,
    "offset": lambda rng, n, d: rng.standard_normal(n) + 1e4,
    "masked": lambda rng, n, d: np.where(rng.random(n) < 0.3, -np.inf, rng.standard_normal(n)),
    "absent": lambda rng, n, d: np.full(n, -np.inf),
    "masked nan": lambda rng, n, d: np.where(np.arange(n) == n // 2, np.nan, -np.inf),
    "one left": lambda rng, n, d: np.where(np.arange(n) == n - 1, 0.5, -np.inf),
    "huge": lambda rng, n, d: rng.uniform(-1, 1, n) * HUGE[d],
    "last nan": lambda rng, n, d: _one_of(rng, n, np.nan, n - 1),
    "convex": lambda rng, n, d: (np.arange(n) / max(1, n)) ** 2 * n,
    "concave": lambda rng, n, d: np.sqrt(np.arange(n) * 1.0),
    "clusters": lambda rng, n, d: rng.integers(0, 4, n) * 3.0 + 0.01 * rng.standard_normal(n),
}


# float32 rows of a batch that mixes what a format holds with what it does not: name: (generator, whether one does)
UPCAST = {
    "bfloat16": (lambda rng, n: _values(rng, n, "bfloat16"), True),
    "float16": (lambda rng, n: _values(rng, n, "float16"), True),
    "float32": (lambda rng, n: rng.standard_normal(n), False),
    "bfloat16 and one more bit": (lambda rng, n: _last(_values(rng, n, "bfloat16"), 1 + 2.0**-16), False),
    "float16 and one more bit": (lambda rng, n: _last(_values(rng, n, "float16"), 1 + 2.0**-11), False),
    "float16 and one too large": (lambda rng, n: _last(_values(rng, n, "float16"), 65520 + 32), False),
    "float16 and one too small": (lambda rng, n: _last(_values(rng, n, "float16"), 2.0**-24 + 2.0**-36), False),
    "float16 below its normal numbers": (lambda rng, n: rng.integers(-999, 999, n) * 2.0**-24, True),
    "bfloat16 from end to end": (lambda rng, n: _values(rng, n, "bfloat16", 1e38), True),
    "zeros of both signs": (lambda rng, n: np.where(rng.random(n) < 0.5, 0.0, -0.0), True),
    "bfloat16, masked": (lambda rng, n: np.where(rng.random(n) < 0.3, -np.inf, _values(rng, n, "bfloat16")), True),
    "float32, masked": (lambda rng, n: np.where(rng.random(n) < 0.3, -np.inf, rng.standard_normal(n)), False),
    "bfloat16 with nan": (lambda rng, n: _last(_values(rng, n, "bfloat16"), np.nan), True),
    "float32 with nan": (lambda rng, n: _last(rng.standard_normal(n), np.nan), True),  # poisoned: nothing to sort
    "all absent": (lambda rng, n: np.full(n, -np.inf), True),
    "negative float16": (lambda rng, n: -np.abs(_values(rng, n, "float16")), True),
    "one value": (lambda rng, n: np.full(n, -1.5), True),
}


def _last(x, value):
    x[-1] = value
    return x


def _values(rng, n, dtype, scale=3.0):
    return round_to(scale * rng.standard_normal(n), dtype)[0].astype(np.float64)


def padded(x, storage, dtype: str):
    """Rows as stored, with every other -inf of x as the least number of the dtype."""
    absent = np.isneginf(x)
    return np.where(absent & (absent.cumsum(1) % 2 == 1), LEAST[dtype], storage)


def upcast(n: int, seed: int = 0, names=None):
    """(values float32 [R, n], storage, names), and the rows that have to be sorted."""
    rng, names = np.random.default_rng([seed, n]), list(UPCAST if names is None else names)
    x = np.stack([UPCAST[name][0](rng, n) for name in names]).astype(np.float32)
    return (x, padded(x, x, "float32"), names), [row for row, name in enumerate(names) if not UPCAST[name][1]]


def round_to(x, dtype: str):
    """float64 -> the values of `dtype`, held in float32 (half formats, as uint16 bits beside them) or in itself."""
    with np.errstate(over="ignore"):
        if dtype == "float64":
            return x, x
        x = x.astype(np.float32)
        if dtype == "float32":
            return x, x
        if dtype == "float16":
            half = x.astype(np.float16)
            return half.astype(np.float32), half.view(np.uint16)
        bits = x.view(np.uint32)
        up = ((bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        up = np.where(np.isnan(x), np.uint16(0x7FC0), up)
        return (up.astype(np.uint32) << 16).view(np.float32), up


def matrix(n: int, dtype: str, seed: int, names=None):
    """(values [R, n], storage [R, n], names): one row a regime, in the order of REGIMES unless names are given."""
    rng = np.random.default_rng([seed, n])
    names = list(REGIMES if names is None else names)
    x = np.stack([np.asarray(REGIMES[name](rng, n, dtype), np.float64) for name in names])
    x, storage = round_to(np.ascontiguousarray(x), dtype)
    return x, padded(x, storage, dtype), names
