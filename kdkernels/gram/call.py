# SPDX-License-Identifier: Apache-2.0
"""The records that travel, and what the family requires of tensors.

`Question` and `Rows` from the door, `Problem`, `Side` and `Call` below the operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .. import checks
from ..autograd import at_least_float32
from .bandwidth import check_place
from .kernels import Kernel, KernelSpec, spec_of

# where a statistic is not called as its op: sum (K - L)^2, the same on unit rows (SP), sum K L
OPS = {"mse": "gram_mse", "row_mse": "gram_mse", "sum": "mmd"}

SMALL = 1024  # samples up to which the products of all pairs are kept (at most 4 MB a group and side in float32)


def minimum_rows(unbiased: bool, center: bool, stat: str = "cka") -> int:
    """The fewest rows for which the estimator is defined."""
    if stat == "sum":
        return 1  # kd.mmd has already refused what is too small
    return 4 if unbiased else (2 if center else 1)


class Question(NamedTuple):
    """What is asked, as the caller wrote it: made before anything is looked into, as ranks must agree first."""

    stat: str  # cka, hsic, mmd, or one of `OPS`
    kernel: object  # a name, an object, or a pair of either
    unbiased: bool
    center: bool
    row_normalize: bool
    mean: bool  # mse and row_mse: divide by n^2

    # methods, no properties: Dynamo of torch 2.10 looks those up only where all of a record are constants
    def op(self) -> str:
        return OPS.get(self.stat, self.stat)

    def least(self) -> int:
        return minimum_rows(self.unbiased, self.center, self.stat)

    def settles(self) -> bool:
        """Whether this can be part of a key: no bandwidth is a tensor, no flag a number that equals True."""
        flags = type(self.unbiased) is type(self.center) is type(self.row_normalize) is bool
        kernel = self.kernel
        return flags and (
            type(kernel) is str or isinstance(kernel, Kernel) and not isinstance(kernel.sigma, torch.Tensor)
        )

    def kernels(self) -> tuple[Kernel, Kernel]:
        """The kernel functions, if they are any and the estimator is one that exists."""
        kernels = spec_of(self.kernel)
        checks.flags(unbiased=self.unbiased, center=self.center, row_normalize=self.row_normalize)
        if self.stat == "mmd" and kernels[0] is not kernels[1]:
            raise ValueError("kernel is a pair: mmd compares x and y under one kernel function")
        if self.unbiased and self.stat in ("cka", "hsic"):
            if not self.center:
                raise ValueError(
                    "center=False with unbiased=True: the unbiased estimator is centred, pass unbiased=False"
                )
            if self.row_normalize:
                raise ValueError("row_normalize=True with unbiased=True: row normalisation needs unbiased=False")
        return kernels

    def problem(self, kernels) -> Problem:
        """The static part; bandwidths that are tensors or rules travel beside it."""
        specs = (kernel.spec for kernel in kernels)
        return Problem(self.stat, *specs, self.unbiased, self.center, self.row_normalize, self.mean)


class Rows(NamedTuple):
    """The tensors of a call, as the caller gave them."""

    x: torch.Tensor
    y: torch.Tensor
    mask: torch.Tensor | None

    def checked(self, question: Question, kernels) -> Rows:
        """Enough of them for the question; groups with too few are left empty."""
        x, y, mask = self
        least = question.least()
        if x.shape[-2] < least:
            raise ValueError(
                f"x and y have {x.shape[-2]} rows: {question.stat} with unbiased={question.unbiased}, "
                f"center={question.center} needs at least {least}"
            )
        check_bandwidths(kernels, x)
        if mask is None:
            return self
        check_mask(mask, x, "mask")
        # a group left with too few rows is one with none: what those rows hold, even NaN, reaches no gradient
        return Rows(x, y, mask & (mask.sum(-1, keepdim=True) >= least))


class Problem(NamedTuple):
    """What is asked of an implementation, apart from the tensors."""

    stat: str
    kx: KernelSpec
    ky: KernelSpec
    unbiased: bool  # leave the diagonal out of every sum (and use the HSIC_1 estimator)
    center: bool
    row_normalize: bool
    mean: bool  # mse and row_mse: divide by n^2

    @property
    def specs(self) -> tuple[KernelSpec, KernelSpec]:
        return self.kx, self.ky

    @property
    def rowwise(self) -> bool:
        """The pair weights of the gradient differ from row to row."""
        return self.row_normalize or self.stat == "row_mse"

    @property
    def stable(self) -> bool:
        """The value does not change under K_ij -> K_ij + u_i + u_j, which `prepare` then uses against cancellation."""
        return self.center and not self.row_normalize

    @property
    def prepared(self) -> bool:
        """A side needs norms, or its mean, before any product."""
        return any(spec.name in ("cosine", "polynomial") for spec in self.specs)

    def as_given(self, n: int) -> bool:
        """Rows are neither centred nor scaled: sums of K and L are finished in float64, row_mse scales the kept K."""
        return self.stat == "mse" or (self.stat == "row_mse" and n <= SMALL)

    @property
    def minimum(self) -> int:
        return minimum_rows(self.unbiased, self.center, self.stat)

    def swapped(self) -> Problem:
        return self._replace(kx=self.ky, ky=self.kx)


class Side(NamedTuple):
    """One side of a call."""

    features: torch.Tensor  # [G, n, p] of any float dtype
    spec: KernelSpec
    sigma: torch.Tensor | None  # [1] or [G] where it is not a number


class Call(NamedTuple):
    """What an implementation is asked to compute."""

    problem: Problem
    x: Side
    y: Side
    mask: torch.Tensor | None  # bool [G, n]
    need: int  # bits 0, 1, 2, 3: a gradient of x, y, sigma_x, sigma_y is asked for
    dtype: torch.dtype  # of the work and of what is saved, see `working_dtype`

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.x, self.y

    @property
    def sizes(self) -> tuple[int, int, int]:
        """n, p, q"""
        _, n, p = self.x.features.shape
        return n, p, self.y.features.shape[2]

    @property
    def sides_asked(self) -> tuple[bool, bool]:
        """Whether any gradient of x, of y is asked for."""
        return bool(self.need & 0b101), bool(self.need & 0b1010)


def call_of(problem: Problem, x, y, mask, sigmas, need: int) -> Call:
    """A call of features [G, n, p] and [G, n, q]."""
    sigma_x, sigma_y = sigmas
    dtype = working_dtype(problem, x, y)
    return Call(problem, Side(x, problem.kx, sigma_x), Side(y, problem.ky, sigma_y), mask, need, dtype)


def working_dtype(question: Question | Problem, x, y) -> torch.dtype:
    """float64 where row norms meet centring, as `prepare` may then not centre the features and float32 sums would
    cancel down to nothing under a large mean."""
    return torch.float64 if question.row_normalize and question.center else at_least_float32(x, y)


class Steps(NamedTuple):
    """What a backend may do in its own way inside the portable passes of `torch_impl`."""

    centre: Callable  # (x, mask, spec, problem) -> z, |z_i|^2, scale, shift or None, unit, twice the mean |z_i|^2
    moments: Callable  # (K, L, columns) -> float64 row sums (and column sums) a, b, kk, kl, ll
    weights: Callable  # (call, pairs, sums) -> value, the row vectors for backward
    rescale: bool = False  # centre and scale the rows even where the problem takes them as given


def check_features(x, y, same_rows: bool = True, empty: bool = False):
    """empty: no rows are enough, as on one of several ranks."""
    checks.floating(x, "x")
    checks.floating(y, "y")
    checks.same_device(x, y, "x", "y")
    if x.dim() not in (2, 3):
        raise ValueError(f"x has shape {tuple(x.shape)}: give [n, p], or [G, n, p] for G groups")
    if y.dim() != x.dim():
        raise ValueError(
            f"y has shape {tuple(y.shape)}, x has {tuple(x.shape)}: give both with the same number of dims"
        )
    for side, name in ((x, "x"), (y, "y")):
        if not (empty and side.shape[-2] == 0 and side.shape[-1] > 0):
            checks.not_empty(side, name)
    if x.dim() == 3 and y.shape[0] != x.shape[0]:
        raise ValueError(f"y has {y.shape[0]} groups, x has {x.shape[0]}: groups are compared one to one")
    if same_rows and x.shape[-2] != y.shape[-2]:
        raise ValueError(
            f"y has {y.shape[-2]} rows, x has {x.shape[-2]}: both sides must describe the same samples, in one order"
        )
    checks.finite(x, "x")
    checks.finite(y, "y")


def check_mask(mask, x, name):
    checks.boolean(mask, x, "x", name, "the rows that count")
    if mask.shape != x.shape[:-1]:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}: one entry a row of x is {tuple(x.shape[:-1])}")


def check_mmd_masks(mask, x, y):
    if mask is None:
        return None, None
    if not isinstance(mask, (tuple, list)) or len(mask) != 2:
        raise ValueError(
            "mask: mmd takes a pair (mask_x, mask_y), each a bool tensor or None, as x and y are different rows"
        )
    for one, features, name in ((mask[0], x, "mask[0]"), (mask[1], y, "mask[1]")):
        if one is not None:
            check_mask(one, features, name)
    return tuple(mask)


def check_bandwidths(kernels, x):
    for kernel in kernels:
        sigma = kernel.sigma
        if not isinstance(sigma, torch.Tensor):
            continue
        check_place(sigma, x)
        groups = x.shape[0] if x.dim() == 3 else 1
        if sigma.dim() == 1 and len(sigma) not in (1, groups):
            raise ValueError(f"sigma has {len(sigma)} values: give one, or one for each of the {groups} groups")
        if checks.may_read(sigma) and not bool((sigma > 0).all()):
            raise ValueError("sigma holds a value that is not positive: a bandwidth must be > 0")
