# SPDX-License-Identifier: Apache-2.0
"""Kernel functions as small self-describing objects: a map of g_ij = x_i . x_j, its slope dk/dg, and where to test it.

Every kernel here is either a function of the dot product (linear, polynomial, cosine on unit rows) or of the squared
distance d2_ij = g_ii + g_jj - 2 g_ij (rbf, laplacian). For the second kind dk/dg_ii = -(dk/dg_ij)/2, so one slope
serves both. The maps themselves stand in `torch_impl/prepared.py` (PyTorch), `triton_impl/maps.py` (Triton) and, as the
textbook has them, in `reference.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch

from .._types import Number
from ..checks import is_number

__all__ = [
    "Cosine",
    "Kernel",
    "KernelLike",
    "KernelName",
    "KernelSpec",
    "Laplacian",
    "Linear",
    "Polynomial",
    "RBF",
    "Sigma",
    "spec_of",
]

KernelName: TypeAlias = Literal["linear", "polynomial", "cosine", "rbf", "laplacian"]
_Rule: TypeAlias = Literal["median", "mean"]
Sigma: TypeAlias = Number | _Rule | tuple[_Rule, float] | Sequence[float]


RULES = ("median", "mean")


class KernelSpec(NamedTuple):
    """The static part of a kernel function: what an operator schema can carry."""

    name: str
    params: tuple[float, ...]  # polynomial: degree, scale, coef0; rbf, laplacian: the bandwidths known as numbers
    rule: str = ""  # of the bandwidth, where the implementation itself is to follow it: params is then its factor

    @property
    def of_distance(self) -> bool:
        return self.name in ("rbf", "laplacian")

    @property
    def linear(self) -> bool:
        """Linear in the (for cosine: normalised) rows, so a p x q feature space exists."""
        return self.name in ("linear", "cosine")


def spec_from(code: str) -> KernelSpec:
    """Reads a kernel's `code` or `ruled_code`."""
    name, *params = code.split(":")
    rule = params.pop(0) if params and params[0] in RULES else ""
    return KernelSpec(name, tuple(map(float, params)), rule)


class Kernel:
    """Base of the kernel functions: `code` is the static part, `sigma` the bandwidth rule where there is one."""

    name = ""
    sigma: torch.Tensor | tuple[float, ...] | tuple[_Rule, float] | None = None
    domain = "any real features"
    _has_rule = False
    _code = ""  # made once: torch.compile(dynamic=True) takes the numbers of an object for variables, but not its text

    @property
    def code(self) -> str:
        """The static part as text, for example rbf:2.0."""
        return self._code

    @property
    def spec(self) -> KernelSpec:
        return spec_from(self._code)

    @property
    def ruled_code(self) -> str:
        """The same with the bandwidth's rule, where it has one: rbf:mean:1.0."""
        return self._code

    @property
    def has_rule(self) -> bool:
        """Whether the bandwidth follows from the features."""
        return self._has_rule

    def of_group(self, g: int) -> Kernel:
        """The kernel function of group g, where sigma is a tensor [G]."""
        if isinstance(self.sigma, torch.Tensor) and self.sigma.dim() == 1:
            return type(self)(self.sigma[g if len(self.sigma) > 1 else 0])
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in vars(self).items() if k[0] != '_')})"


KernelLike: TypeAlias = KernelName | Kernel | tuple[KernelName | Kernel, KernelName | Kernel]
"""One kernel function for both sides, or one for each."""


class Linear(Kernel):
    """k(x, y) = x . y"""

    name = _code = "linear"


class Cosine(Kernel):
    """k(x, y) = x . y / (|x| |y|); a zero row has similarity 0 with every row, itself included."""

    name = _code = "cosine"
    domain = "rows away from zero"


class Polynomial(Kernel):
    """k(x, y) = (scale x . y + coef0)^degree, degree a positive integer. scikit-learn: degree 3, scale 1 / p."""

    degree: int
    scale: float
    coef0: float
    name = "polynomial"

    def __init__(self, degree: int = 2, scale: float = 1.0, coef0: float = 1.0):
        if not (is_number(degree) and degree in range(1, 9)):
            raise ValueError(f"degree is {degree!r}: Polynomial needs an integer from 1 to 8")
        if not (is_number(scale) and 0 < scale < math.inf):
            raise ValueError(f"scale is {scale!r}: Polynomial needs a positive number")
        if not (is_number(coef0) and math.isfinite(coef0)):
            raise ValueError(f"coef0 is {coef0!r}: Polynomial needs a finite number")
        self.degree, self.scale, self.coef0 = int(degree), float(scale), float(coef0)
        self._code = f"polynomial:{self.degree}:{self.scale!r}:{self.coef0!r}"


class _Bandwidth(Kernel):
    """A kernel with a bandwidth: a number, a tensor, a rule, or a sequence of numbers (the sum of the kernels)."""

    sigma: torch.Tensor | tuple[float, ...] | tuple[_Rule, float]

    def __init__(self, sigma: Sigma = "median"):
        self.sigma = _check_sigma(sigma, type(self).__name__)
        numbers = self.sigma if isinstance(self.sigma, tuple) and not isinstance(self.sigma[0], str) else ()
        self._code = ":".join((self.name, *map(repr, numbers)))
        ruled = isinstance(self.sigma, tuple) and not numbers
        self._has_rule, self._ruled_code = ruled, self._code
        if ruled:
            self._ruled_code = f"{self.name}:{self.sigma[0]}:{self.sigma[1]!r}"

    @property
    def ruled_code(self) -> str:
        return self._ruled_code


class RBF(_Bandwidth):
    """k(x, y) = exp(-|x - y|^2 / (2 sigma^2)).

    sigma: a number, a 0-d (or [G]) tensor (it gets a gradient if it asks for one), "median" (sigma^2 = median of the
    squared distances, zero diagonal included), ("median", factor), "mean" (sigma^2 = their mean), ("mean", factor),
    or a sequence of numbers for a sum of kernels. Rules are detached: no gradient flows through them, which is for
    comparing; descent on it draws the rows together. To train, use `kd.losses.CKALoss` and its siblings, or a number.
    scikit-learn's gamma is 1 / (2 sigma^2), by default 1 / p.
    """

    name = "rbf"


class Laplacian(_Bandwidth):
    """k(x, y) = exp(-|x - y| / sigma), gradient 0 where x = y; sigma as in `RBF`. scikit-learn: the L1 norm."""

    name = "laplacian"


def _check_sigma(sigma: Sigma, owner: str) -> torch.Tensor | tuple[float, ...] | tuple[_Rule, float]:
    if isinstance(sigma, torch.Tensor):
        if not sigma.is_floating_point():
            raise TypeError(f"sigma is a tensor of {sigma.dtype}: {owner} needs a floating-point tensor")
        if sigma.dim() > 1:
            raise ValueError(
                f"sigma has shape {tuple(sigma.shape)}: {owner} takes a 0-d tensor, or one value a group [G]"
            )
        return sigma
    if isinstance(sigma, str):
        if sigma not in RULES:
            raise ValueError(f"sigma is {sigma!r}: the rules are 'median' and 'mean'")
        return (sigma, 1.0)
    if isinstance(sigma, Sequence) and not isinstance(sigma, (bytes, bytearray)):
        if len(sigma) == 2 and isinstance(sigma[0], str):
            _check_sigma(sigma[0], owner)
            return (sigma[0], _positive(sigma[1], "the factor of sigma", owner))
        if len(sigma) == 0:
            raise ValueError(f"sigma is empty: {owner} needs at least one bandwidth")
        return tuple(_positive(s, "sigma", owner) for s in sigma)
    return (_positive(sigma, "sigma", owner),)


def _positive(value, what: str, owner: str) -> float:
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{what} is {value!r}: {owner} needs a positive number, a tensor or a rule") from None
    if not 0 < number < math.inf:  # which a compiler can ask of a symbolic number too
        raise ValueError(f"{what} is {value!r}: {owner} needs a positive finite number")
    return number


_BY_NAME = {kernel.name: kernel() for kernel in (Linear, Polynomial, Cosine, RBF, Laplacian)}


def names() -> list[str]:
    """Kernel functions that a name is enough for."""
    return sorted(_BY_NAME)


def _one(kernel, what: str) -> Kernel:
    if isinstance(kernel, Kernel):
        return kernel
    if isinstance(kernel, str) and kernel in _BY_NAME:
        return _BY_NAME[kernel]
    raise ValueError(f"{what} is {kernel!r}: give one of {names()} or an object such as kd.RBF(sigma=2.0)")


def spec_of(kernel: KernelLike) -> tuple[Kernel, Kernel]:
    """The kernel functions of both sides, from a name, an object, or a pair of either."""
    if isinstance(kernel, (tuple, list)):
        if len(kernel) != 2:
            raise ValueError(
                f"kernel has {len(kernel)} entries: give one kernel function, or a pair (kernel_x, kernel_y)"
            )
        return _one(kernel[0], "kernel[0]"), _one(kernel[1], "kernel[1]")
    one = _one(kernel, "kernel")
    return one, one
