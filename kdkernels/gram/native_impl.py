# SPDX-License-Identifier: Apache-2.0
"""The Gram family in the compiled CPU library: one call a pass where it serves the problem, else compiled steps.

CKA and HSIC up to `SMALL` rows, linear and Gaussian kernels, float32: `csrc/gram/pair_statistic_cpu.cpp` computes the
value and, where a gradient is asked for, the matrix V that it is one product with; `pair_gradient_cpu.cpp` is that
product. Everything else is `torch_impl`'s, with the steps of `STEPS`: centred rows, moments of a tile, the weights.
"""

from __future__ import annotations

import functools

import torch

from . import torch_impl
from .call import Call, Problem, Question, Rows, Steps, working_dtype
from .kernels import KernelSpec
from .torch_impl import forms, panels, prepared
from .torch_impl.panels import Pairs, Sums

_KERNELS = ("linear", "rbf")
_RULES = {"mean": 2, "median": 3}  # 0 is linear, 1 a number or several
SAVED = 3  # numbers a side: scale of the rows, factor of V z, dL/dsigma
NO_DIAGONAL = -(2**31)  # panel_moments leaves nothing out: the tiles come with their diagonal already zero


def follows_rules(question: Question, kernels, rows: Rows) -> bool:
    """Whether the rule of a bandwidth is left to the compiled call, which has the distances anyway."""
    return _serves(question, kernels, rows.x.shape[-2], working_dtype(question, rows.x, rows.y))


def _serves(question: Question | Problem, kernels, n: int, dtype: torch.dtype) -> bool:
    return (
        question.stat in ("cka", "hsic")
        and not question.row_normalize
        and kernels[0].name in _KERNELS
        and kernels[1].name in _KERNELS
        and dtype == torch.float32
        and (forms.FEW if question.unbiased else 0) < n <= panels.SMALL
    )


def in_one_call(call: Call) -> bool:
    """Whether one compiled call serves the problem, and feature space is not cheaper."""
    n, p, q = call.sizes
    problem = call.problem
    return _serves(problem, problem.specs, n, call.dtype) and not forms.in_feature_space(call.problem, n, p, q)


def kept(call: Call):
    if not call.need or not in_one_call(call):
        return torch_impl.kept(call)
    G, n, _ = call.x.features.shape
    return ((G, 2, SAVED), (sum(call.sides_asked), G, n, n)), call.dtype


def forward(call: Call):
    if not in_one_call(call):
        return torch_impl.forward(call, STEPS)
    problem = call.problem
    how = (problem.stat == "cka", problem.unbiased, problem.center, call.need, problem.minimum)
    mask = None if call.mask is None else call.mask.contiguous()
    x, y = _rows(call.x.features), _rows(call.y.features)
    return torch.ops.kdkernels.pair_statistic(x, y, mask, *_kernel(call.x), *_kernel(call.y), *how)


def backward(call: Call, saved, grad):
    if not in_one_call(call):
        return torch_impl.backward(call, saved, grad, STEPS)
    (rows, kept), out, slot = saved, [None] * 4, 0
    mask = None if call.mask is None else call.mask.contiguous()
    for k, (features, spec, sigma) in enumerate(call.sides):
        if not call.sides_asked[k]:
            continue
        if call.need & (1 << k):
            centre = call.problem.center or spec.of_distance
            dx = torch.ops.kdkernels.pair_gradient(grad, _rows(features), mask, rows[:, k], kept[slot], centre)
            out[k] = dx.to(features.dtype)
        if call.need & (0b100 << k):
            out[2 + k] = forms.sigma_gradient(rows[:, k, 2] * grad, sigma)
        slot += 1
    return tuple(out)


def _rows(x):
    x = x.float()
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _kernel(side):
    """rule, factor and numbers of a kernel, as the compiled call takes them."""
    _, spec, sigma = side
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


def centre(x, mask, spec: KernelSpec, problem: Problem):
    """`prepared.centre` in two passes over x."""
    if x.dtype != torch.float32:
        return prepared.centre(x, mask, spec, problem)
    centred = problem.stable or spec.of_distance
    mask = None if mask is None else mask.contiguous()
    how = centred, problem.stat != "mse"
    z, square, scale, shift, unit, typical = torch.ops.kdkernels.centre_rows(_rows(x), mask, *how)
    return z, square, scale, shift if centred else None, unit, typical


def moments(K, L, columns: bool):
    if K.dim() == 2:
        return torch.ops.kdkernels.panel_moments(K, L, NO_DIAGONAL, columns)
    # no diagonal to leave out and no column sums: the rows of all groups are rows of one panel
    rows, _ = torch.ops.kdkernels.panel_moments(K.flatten(0, 1), L.flatten(0, 1), NO_DIAGONAL, False)
    return rows.unflatten(1, K.shape[:2]), None


def weights(call: Call, pairs: Pairs, sums: Sums):
    """`combine` and `pack_rows` in one call."""
    problem = call.problem
    if problem.stat not in ("cka", "hsic") or problem.row_normalize:
        return forms.weights(call, pairs, sums)
    count, eps = None if call.mask is None else call.mask.sum(1), torch.finfo(call.dtype).eps
    how = (problem.stat == "cka", problem.unbiased, problem.center, call.need, problem.minimum, eps)
    units, like = (pairs.x.P.unit, pairs.y.P.unit), torch.empty(0, dtype=call.dtype, device="cpu")
    return torch.ops.kdkernels.weigh_rows(torch.stack(sums.stats[:5]), count, *units, *sums.u, like, *how)


STEPS = Steps(centre, moments, weights)
