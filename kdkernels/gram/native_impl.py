# SPDX-License-Identifier: Apache-2.0
"""The Gram family in the compiled CPU library: one call a pass where it serves the problem, else compiled steps.

CKA and HSIC up to `panels.SMALL` rows, linear and Gaussian kernels, float32: `csrc/gram/pair_statistic_cpu.cpp`
computes the value and, where a gradient is asked for, the matrix V that it is one product with; `pair_gradient_cpu.cpp`
is that product. Everything else is `torch_impl`'s.
"""

from __future__ import annotations

import functools

import torch

from .. import native
from ..dtypes import at_least_float32
from . import panels, torch_impl
from .problem import Problem

_KERNELS = ("linear", "rbf")
_RULES = {"mean": 2, "median": 3}  # 0 is linear, 1 a number or several
SAVED = 3  # numbers a side: scale of the rows, factor of V z, dL/dsigma


def in_one_call(problem: Problem, n: int, p: int, q: int, dtype: torch.dtype) -> bool:
    """Whether one compiled call serves the problem, and feature space is not cheaper."""
    served = _serves(problem.stat, *problem[1:3], problem.row_normalize, n, dtype)
    return served and not torch_impl.in_feature_space(problem, n, p, q)


def follows_rules(stat: str, kernel_x, kernel_y, row_normalize: bool, x, y) -> bool:
    """Whether the rule of a bandwidth is left to the compiled call, which has the distances anyway; x and y on the CPU
    and the backend cpp. A compiler would have to trace the same decision for each n, and keeps the operator of its own.
    """
    if kernel_x.ruled_code == kernel_x.code and kernel_y.ruled_code == kernel_y.code:
        return False
    if torch.compiler.is_compiling():
        return False
    return _serves(stat, kernel_x, kernel_y, row_normalize, x.shape[-2], at_least_float32(x, y))


def _serves(stat, kernel_x, kernel_y, row_normalize, n, dtype) -> bool:
    return (
        stat in ("cka", "hsic")
        and not row_normalize
        and kernel_x.name in _KERNELS
        and kernel_y.name in _KERNELS
        and dtype == torch.float32
        and n <= panels.SMALL
    )


saved_dtype = torch_impl.saved_dtype


def saved_shapes(problem: Problem, G: int, n: int, p: int, q: int, need: int, dtype: torch.dtype):
    if not need or not in_one_call(problem, n, p, q, dtype):
        return torch_impl.saved_shapes(problem, G, n, p, q, need, dtype)
    sides = bool(need & 0b101) + bool(need & 0b1010)
    return (G, 2, SAVED), (sides, G, n, n)


def forward(x, y, mask, sigma_x, sigma_y, problem: Problem, need: int):
    if not in_one_call(problem, *x.shape[1:], y.shape[2], saved_dtype(problem, x, y)):
        return torch_impl.forward(x, y, mask, sigma_x, sigma_y, problem, need)
    how = (problem.stat == "cka", problem.unbiased, problem.center, need, problem.minimum)
    mask = None if mask is None else mask.contiguous()
    kernels = (*_kernel(problem.kx, sigma_x), *_kernel(problem.ky, sigma_y))
    return torch.ops.kdkernels.pair_statistic(_rows(x), _rows(y), mask, *kernels, *how)


def backward(grad, x, y, mask, sigma_x, sigma_y, rows, kept, problem: Problem, need: int):
    if not in_one_call(problem, *x.shape[1:], y.shape[2], saved_dtype(problem, x, y)):
        return torch_impl.backward(grad, x, y, mask, sigma_x, sigma_y, rows, kept, problem, need)
    out = [None] * 4
    mask = None if mask is None else mask.contiguous()
    slot = 0
    for k, (features, spec) in enumerate(((x, problem.kx), (y, problem.ky))):
        if not need & (0b101 << k):
            continue
        if need & (1 << k):
            centre = problem.center or spec.of_distance
            dx = torch.ops.kdkernels.pair_gradient(grad, _rows(features), mask, rows[:, k], kept[slot], centre)
            out[k] = dx.to(features.dtype)
        if need & (0b100 << k):
            sigma = (sigma_x, sigma_y)[k]
            total = rows[:, k, 2] * grad
            total = total if sigma.numel() == len(total) else total.sum()
            out[2 + k] = total.reshape(sigma.shape).to(sigma.dtype)
        slot += 1
    return tuple(out)


def _rows(x):
    x = x.float()
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _kernel(spec, sigma):
    """rule, factor and numbers of a kernel, as the compiled call takes them."""
    if spec.linear:
        return 0, 1.0, None
    if spec.rule:
        return _RULES[spec.rule], spec.params[0], None
    if spec.params:
        return 1, 1.0, _numbers(spec.params)
    return 1, 1.0, sigma.detach().double().reshape(-1, 1)


@functools.lru_cache(maxsize=1024)
def _numbers(sigmas: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor([sigmas], dtype=torch.float64, device="cpu")


@native.fake("panel_moments")
def panel_moments(k, l, diagonal, symmetric):
    r, c = k.shape
    rows = k.new_empty((5, r), dtype=torch.float64)
    return rows, k.new_empty((5, c if symmetric else 0), dtype=torch.float64)


@native.fake("centre_rows")
def centre_rows(x, mask, centre, rescale):
    (G, n, p), one = x.shape, x.new_empty(x.shape[0])
    shift = x.new_empty(G, 1, p if centre else 0)
    return x.new_empty(G, n, p), x.new_empty(G, n), one, shift, one.double(), torch.empty_like(one)


@native.fake("weigh_rows")
def weigh_rows(sums, count, unit_x, unit_y, u_x, u_y, like, cka, unbiased, centre, need, minimum, eps):
    _, G, n = sums.shape
    return like.new_empty(G), like.new_empty((G, 12, n) if need else 0)


@native.fake("pair_statistic")
def pair_statistic(x, y, mask, *how):
    need, (G, n, _) = how[-2], x.shape
    sides = bool(need & 0b101) + bool(need & 0b1010)
    rows, kept = ((G, 2, 3), (sides, G, n, n)) if need else ((0,), (0,))
    return x.new_empty(G), x.new_empty(rows), x.new_empty(kept)


@native.fake("pair_gradient")
def pair_gradient(grad, x, mask, scales, V, centre):
    return x.new_empty(x.shape)
