# SPDX-License-Identifier: Apache-2.0
"""The differentiable operator of the family; kept beyond the inputs is the projected difference, rows x k numbers."""

from __future__ import annotations

from ..autograd import at_least_float32
from ..backend import implementation
from ..differentiable import of_rows, operator
from . import torch_impl


def _forward(s, t, basis, mask, channel_dim, reduction, backend, need):
    return implementation(__package__, backend).forward(s, t, basis, mask, channel_dim, reduction, need > 0)


def _backward(grad, s, t, basis, mask, projected, channel_dim, reduction, backend, need):
    run = implementation(__package__, backend).backward
    return run(grad, s, t, basis, mask, projected, channel_dim, reduction, need)


def _fake(s, t, basis, mask, channel_dim, reduction, backend, need):
    dtype = at_least_float32(s, t)
    value = s.new_empty((s.shape[0],) if reduction == "none" else (), dtype=dtype)
    return value, s.new_empty(torch_impl.saved_size(s, basis, channel_dim, need > 0), dtype=dtype)


projected = operator(
    "projected_mse",
    "s t basis mask?",
    "int channel_dim, str reduction, str backend",
    "projected",
    wanted="s:s= t:t= basis",
    forward=_forward,
    backward=_backward,
    fake=_fake,
    tangent=of_rows(0, 1),
).value
