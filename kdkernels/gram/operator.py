# SPDX-License-Identifier: Apache-2.0
"""The one differentiable operator of the family: every statistic, on every backend.

Two operators of fixed arity (`kdkernels::gram_fwd`, `kdkernels::gram_bwd`); what is asked of them travels as the string
of `problem.py`. Both take [n, p] or [G, n, p]: a view made outside would cost a graph node.
"""

from __future__ import annotations

from ..backend import implementation
from ..differentiable import of_rows, operator
from ..dtypes import at_least_float32
from .problem import decode


def _grouped(x, y, mask):
    """One group is the case G = 1. Indexing by None or 0 is the cheapest view there is; `reshape` costs thrice that."""
    if x.dim() == 3:
        return x, y, mask
    return x[None], y[None], None if mask is None else mask[None]


def _forward(x, y, mask, sigma_x, sigma_y, problem, need):
    problem = decode(problem)
    run = implementation(__package__, problem.backend).forward
    value, rows, kept = run(*_grouped(x, y, mask), sigma_x, sigma_y, problem, need)
    return value if x.dim() == 3 else value[0], rows, kept


def _backward(grad, x, y, mask, sigma_x, sigma_y, rows, kept, problem, need):
    problem = decode(problem)
    run, upstream = implementation(__package__, problem.backend).backward, grad if x.dim() == 3 else grad[None]
    gradients = run(upstream, *_grouped(x, y, mask), sigma_x, sigma_y, rows, kept, problem, need)
    # contiguous, as the fake promises: permuted features give permuted ones
    dx, dy, *dsigma = (g.contiguous() if need >> bit & 1 else None for bit, g in enumerate(gradients))
    if x.dim() == 2:
        dx, dy = (None if g is None else g[0] for g in (dx, dy))
    return dx, dy, *dsigma


def _fake(x, y, mask, sigma_x, sigma_y, problem, need):
    problem = decode(problem)
    (n, p), q, G = x.shape[-2:], y.shape[-1], x.shape[0] if x.dim() == 3 else 1
    run = implementation(__package__, problem.backend)
    saved = run.saved_dtype(problem, x, y)
    rows, kept = run.saved_shapes(problem, G, n, p, q, need, saved)
    value = x.new_empty(x.shape[:-2], dtype=at_least_float32(x, y))
    return value, x.new_empty(rows, dtype=saved), x.new_empty(kept, dtype=saved)


statistic = operator(
    "gram",
    "x y mask? sigma_x? sigma_y?",
    "str problem",
    "rows kept",
    wanted="x y sigma_x sigma_y",
    forward=_forward,
    backward=_backward,
    fake=_fake,
    tangent=of_rows(0, 1, 2, 3),
)
