# SPDX-License-Identifier: Apache-2.0
"""What is asked of one call, apart from the tensors: a small record that an operator schema carries as a string."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from ..gram.kernels import KernelSpec

WHITENINGS = ("cholesky", "sqrt")
# hsic, cka: of the Nystrom kernels; transfer: |K~_S - K~_T|^2; features: no statistic, Phi itself
STATS = ("features", "cka", "hsic", "transfer")


class Problem(NamedTuple):
    stat: str
    kx: KernelSpec
    ky: KernelSpec
    whiten: str
    jitter: float
    unbiased: bool
    normalize: bool
    backend: str


def encode(stat, kernel_x, kernel_y, whiten, jitter, unbiased, normalize, backend) -> str:
    """The schema's `problem` argument, for example cka|rbf:2.0|linear|cholesky|1e-06|10|torch."""
    return _text(stat, kernel_x.code, kernel_y.code, whiten, jitter, unbiased, normalize, backend)


@lru_cache(maxsize=1024)
def _text(stat, x, y, whiten, jitter, unbiased, normalize, backend) -> str:
    return f"{stat}|{x}|{y}|{whiten}|{jitter!r}|{unbiased:d}{normalize:d}|{backend}"


def kernel_spec(text: str) -> KernelSpec:
    name, *params = text.split(":")
    return KernelSpec(name, tuple(float(value) for value in params))


@lru_cache(maxsize=1024)
def decode(text: str) -> Problem:
    stat, kx, ky, whiten, jitter, flags, backend = text.split("|")
    flags = (flag == "1" for flag in flags)
    return Problem(stat, kernel_spec(kx), kernel_spec(ky), whiten, float(jitter), *flags, backend)
