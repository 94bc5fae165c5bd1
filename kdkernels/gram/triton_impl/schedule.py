# SPDX-License-Identifier: Apache-2.0
"""The Gram family on a GPU: three schedules by n and p, ordered reductions, nothing n x n above 1024 samples.

n <= 1024: `small.py` (2 or 3 launches forward, 1 backward). Above: `tiles.py`, whose backward pass keeps the gradient
in registers (p <= 256) or writes row panels of pair weights for a matrix product. Linear kernels with n > p + q stay
in feature space, where cuBLAS is the kernel.
"""

from __future__ import annotations

import torch

from .. import torch_impl
from ..panels import SMALL
from ..problem import Problem
from . import small, tiles

SMALL_ROWS = 14  # vectors a group that the small schedule saves, see `small_kernels.py`


saved_dtype = torch_impl.saved_dtype


def _in_pytorch(problem: Problem, n: int, p: int, q: int) -> bool:
    """Forms whose kernel is cuBLAS: feature space, and centred row-normalised statistics, which need float64."""
    if problem.row_normalize and problem.center:
        return True
    return n > SMALL and torch_impl.in_feature_space(problem, n, p, q)


def saved_shapes(problem: Problem, G: int, n: int, p: int, q: int, need: int):
    """As `torch_impl.saved_shapes`: up to `SMALL` a launch is dearer than arithmetic: always Gram space."""
    if n > SMALL or _in_pytorch(problem, n, p, q):
        return torch_impl.saved_shapes(problem, G, n, p, q, need)
    return ((G, SMALL_ROWS, n), (2, G, n, n)) if need else ((0,), (0,))


def _schedule(problem: Problem, x, y):
    if _in_pytorch(problem, x.shape[1], x.shape[2], y.shape[2]):
        return torch_impl
    return small if x.shape[1] <= SMALL else tiles


def forward(x, y, mask, sigma_x, sigma_y, problem: Problem, need: int):
    with torch.cuda.device_of(x):  # a launch goes to the current device, wherever its tensors are
        return _schedule(problem, x, y).forward(x, y, mask, sigma_x, sigma_y, problem, need)


def backward(grad, x, y, mask, sigma_x, sigma_y, rows, kept, problem: Problem, need: int):
    with torch.cuda.device_of(x):
        return _schedule(problem, x, y).backward(grad, x, y, mask, sigma_x, sigma_y, rows, kept, problem, need)
