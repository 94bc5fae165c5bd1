# SPDX-License-Identifier: Apache-2.0
"""The differentiable operator of the family, [n, p] or [G, n, p]: n x n weights are kept of each side that learns.

Or all of its gradient but the upstream factor: `kept_of` of the implementation says which.
"""

from __future__ import annotations

from ..autograd import at_least_float32
from ..backend import implementation
from ..differentiable import of_rows, operator


def _grouped(x, mask):
    """One group is the case G = 1."""
    return (x, mask) if x.dim() == 3 else (x[None], None if mask is None else mask[None])


def _forward(x, y, mask, kind, backend, need):
    features, counted = _grouped(x, mask)
    run = implementation(__package__, backend).forward
    value, of_x, of_y = run(features, _grouped(y, None)[0], counted, kind, need)
    return value if x.dim() == 3 else value[0], of_x, of_y


def _backward(grad, x, y, mask, of_x, of_y, kind, backend, need):
    run, grad, gradients = implementation(__package__, backend).backward, grad.reshape(-1), []
    for bit, (side, kept) in enumerate(((x, of_x), (y, of_y))):
        gradient = None
        if need >> bit & 1:
            features, counted = _grouped(side, mask)
            gradient = run(grad, features, counted, kept, kind)
            gradient = gradient if side.dim() == 3 else gradient[0]
        gradients.append(gradient)
    return gradients


def _fake(x, y, mask, kind, backend, need):
    both = [_grouped(side, None)[0] for side in (x, y)]
    shapes, dtype = implementation(__package__, backend).kept_of(*both, kind)
    kept = [x.new_empty(shape if need >> bit & 1 else (0,), dtype=dtype) for bit, shape in enumerate(shapes)]
    return x.new_empty(x.shape[:-2], dtype=at_least_float32(x, y)), *kept


relation = operator(
    "relation",
    "x y mask?",
    "str kind, str backend",
    "of_x of_y",
    wanted="x y",
    read="x~ y~ mask",
    forward=_forward,
    backward=_backward,
    fake=_fake,
    tangent=of_rows(0, 1),
).value
