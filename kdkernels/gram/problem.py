# SPDX-License-Identifier: Apache-2.0
"""What is asked of one call, apart from the tensors: a small record that an operator schema carries as a string.

The string keeps the operators' arity fixed for every member of the family; it is read through a cache.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from .kernels import RULES, KernelSpec

# statistics: cka, hsic; mse = sum (K - L)^2, row_mse = the same on unit rows (SP), sum = sum K L (mmd)
STATS = ("cka", "hsic", "mse", "row_mse", "sum")


SMALL = 1024  # samples up to which the products of all pairs are kept (at most 4 MB a group and side in float32)


class Problem(NamedTuple):
    stat: str
    kx: KernelSpec
    ky: KernelSpec
    unbiased: bool  # leave the diagonal out of every sum (and use the HSIC_1 estimator)
    center: bool
    row_normalize: bool
    mean: bool  # mse and row_mse: divide by n^2
    backend: str

    @property
    def rowwise(self) -> bool:
        """The pair weights of the gradient differ from row to row."""
        return self.row_normalize or self.stat == "row_mse"

    @property
    def stable(self) -> bool:
        """The value does not change under K_ij -> K_ij + u_i + u_j, which `prepare` then uses against cancellation."""
        return self.center and not self.row_normalize

    def as_given(self, n: int) -> bool:
        """Rows are neither centred nor scaled: sums of K and L are finished in float64, and row_mse scales the kept K.
        Triton, which rounds rows to half precision, wants them scaled."""
        return self.backend != "triton" and (self.stat == "mse" or (self.stat == "row_mse" and n <= SMALL))

    @property
    def minimum(self) -> int:
        """The fewest rows for which the estimator is defined."""
        return minimum_rows(self.unbiased, self.center, self.stat)

    def swapped(self) -> Problem:
        return self._replace(kx=self.ky, ky=self.kx)


def minimum_rows(unbiased: bool, center: bool, stat: str = "cka") -> int:
    if stat == "sum":
        return 1  # kd.mmd has already refused what is too small
    return 4 if unbiased else (2 if center else 1)


def stated(stat, kernel_x, kernel_y, unbiased, center, row_normalize, mean, backend) -> Problem:
    """What `decode` reads from `encode`'s text, where no text is needed."""
    kernels = _decode_kernel(kernel_x.code), _decode_kernel(kernel_y.code)
    return Problem(stat, *kernels, unbiased, center, row_normalize, mean, backend)


def encode(stat, kernel_x, kernel_y, unbiased, center, row_normalize, mean, backend, ruled=False) -> str:
    """The schema's `problem` argument, for example cka|rbf:2.0|linear|1100|torch; ruled: with the bandwidths' rules."""
    x, y = (kernel_x.ruled_code, kernel_y.ruled_code) if ruled else (kernel_x.code, kernel_y.code)
    # without a cache: a compiler traces this, and says of a cache that it looks through it
    return f"{stat}|{x}|{y}|{unbiased:d}{center:d}{row_normalize:d}{mean:d}|{backend}"


def _decode_kernel(text: str) -> KernelSpec:
    name, *params = text.split(":")
    rule = params.pop(0) if params and params[0] in RULES else ""
    return KernelSpec(name, tuple(float(value) for value in params), rule)


@lru_cache(maxsize=1024)
def decode(text: str) -> Problem:
    stat, kx, ky, flags, backend = text.split("|")
    return Problem(stat, _decode_kernel(kx), _decode_kernel(ky), *(flag == "1" for flag in flags), backend)
