# SPDX-License-Identifier: Apache-2.0
"""The one differentiable operator of the family: every statistic, on every backend.

Two operators of fixed arity (`kdkernels::gram_fwd`, `kdkernels::gram_bwd`); what is asked of them travels as a string,
which `encode` writes and `decode` reads. Both take [n, p] or [G, n, p]: a view made outside would cost a graph node.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from ..autograd import at_least_float32
from ..backend import implementation
from ..differentiable import of_rows, operator
from .bandwidth import sigma_of
from .call import Problem, Question, Rows, call_of
from .kernels import spec_from


def encode(question: Question, kernels, backend: str, ruled: bool = False) -> str:
    """The schema's `problem` argument, for example cka|rbf:2.0|linear|1100|torch; ruled: with the bandwidths' rules."""
    (stat, _, *flags), (kernel_x, kernel_y) = question, kernels
    x, y = (kernel_x.ruled_code, kernel_y.ruled_code) if ruled else (kernel_x.code, kernel_y.code)
    # a compiler says of a cache that it looks through it
    return (_text if torch.compiler.is_compiling() else _cached_text)(stat, x, y, *flags, backend)


def _text(stat, x, y, unbiased, center, row_normalize, mean, backend) -> str:
    return f"{stat}|{x}|{y}|{unbiased:d}{center:d}{row_normalize:d}{mean:d}|{backend}"


_cached_text = lru_cache(maxsize=1024)(_text)


@lru_cache(maxsize=1024)
def decode(text: str) -> tuple[Problem, str]:
    """The problem, and the backend that is to solve it."""
    stat, kx, ky, flags, backend = text.split("|")
    return Problem(stat, spec_from(kx), spec_from(ky), *(flag == "1" for flag in flags)), backend


def statistic(question: Question, kernels, rows: Rows, backend: str):
    """The value, with its gradient where one is needed: bandwidth rules are resolved, then the operator runs."""
    (x, y, mask), (kernel_x, kernel_y) = rows, kernels
    ruled = _ruled(question, kernels, rows, backend)
    if x.dtype != y.dtype and torch.float64 in (x.dtype, y.dtype):  # the bandwidth of a half side has float64's digits
        x, y = x.double(), y.double()
    sigma_x = None if kernel_x.sigma is None or (ruled and kernel_x.has_rule) else sigma_of(kernel_x, x, mask)
    sigma_y = None if kernel_y.sigma is None or (ruled and kernel_y.has_rule) else sigma_of(kernel_y, y, mask)
    return gram.value(x, y, mask, sigma_x, sigma_y, encode(question, kernels, backend, ruled))


def _ruled(question: Question, kernels, rows: Rows, backend: str) -> bool:
    """Whether the rule of a bandwidth is left to the implementation, which has the distances anyway. A compiler would
    have to trace the same decision for each n, and keeps the operator of its own."""
    if not (kernels[0].has_rule or kernels[1].has_rule) or torch.compiler.is_compiling():
        return False
    follows_rules = getattr(implementation(__package__, backend), "follows_rules", None)
    return follows_rules is not None and follows_rules(question, kernels, rows)


def _read(x, y, mask, sigma_x, sigma_y, text, need):
    """The call, and the implementation that is to serve it. One group is the case G = 1."""
    problem, backend = decode(text)
    if x.dim() == 2:  # indexing by None is the cheapest view there is; `reshape` costs thrice that
        x, y, mask = x[None], y[None], None if mask is None else mask[None]
    return call_of(problem, x, y, mask, (sigma_x, sigma_y), need), implementation(__package__, backend)


def _forward(x, *rest):
    call, run = _read(x, *rest)
    value, *saved = run.forward(call)
    return value if x.dim() == 3 else value[0], *saved


def _backward(grad, x, y, mask, sigma_x, sigma_y, *rest):
    *saved, text, need = rest
    call, run = _read(x, y, mask, sigma_x, sigma_y, text, need)
    gradients = run.backward(call, saved, grad if x.dim() == 3 else grad[None])
    # contiguous, as the fake promises: permuted features give permuted ones
    dx, dy, *dsigma = (g.contiguous() if need >> bit & 1 else None for bit, g in enumerate(gradients))
    if x.dim() == 2:
        dx, dy = (None if g is None else g[0] for g in (dx, dy))
    return dx, dy, *dsigma


def _fake(x, y, *rest):
    call, run = _read(x, y, *rest)
    shapes, dtype = run.kept(call)
    value = x.new_empty(x.shape[:-2], dtype=at_least_float32(x, y))
    return value, *(x.new_empty(shape, dtype=dtype) for shape in shapes)


gram = operator(
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
