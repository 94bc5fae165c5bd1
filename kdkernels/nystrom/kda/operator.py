# SPDX-License-Identifier: Apache-2.0
"""The differentiable operator of the landmark similarity loss; s alone gets a gradient, the others are constants."""

from __future__ import annotations

import torch

from ...autograd import at_least_float32
from ...backend import implementation
from ...differentiable import operator
from ..operator import distinct
from . import torch_impl


def _forward(s, t, s_centers, t_centers, backend, need):
    return implementation(__package__, backend).forward(s, t, s_centers, t_centers, need > 0)


def _backward(grad, s, t, s_centers, t_centers, kept, inverse, backend, need):
    return (implementation(__package__, backend).backward(grad, s, t, s_centers, t_centers, kept, inverse),)


def _fake(s, t, s_centers, t_centers, backend, need):
    dtype = at_least_float32(s, t)
    kept = s.new_empty(implementation(__package__, backend).kept_shape(s, t, s_centers, need > 0), dtype=dtype)
    return s.new_empty((), dtype=dtype), kept, s.new_empty((), dtype=dtype)


def _forward_over_ranks(s, t, s_centers, t_centers, backend, need, group):
    """Both sums travel, and backward one number."""
    sums, kept = implementation(__package__, backend).sums(s, t, s_centers, t_centers, need > 0)
    return torch_impl.finished(group.sum(sums), at_least_float32(s, t), kept)


_similarity = operator(
    "landmark_similarity",
    "s t s_centers t_centers",
    "str backend",
    "kept inverse",
    wanted="s",
    forward=_forward,
    backward=_backward,
    fake=_fake,
)
similarity_over_ranks = _similarity.over_ranks(_forward_over_ranks)


def similarity(s, t, s_centers, t_centers, backend):
    tensors = s, t, s_centers, t_centers
    if s.requires_grad and not torch.compiler.is_compiling():
        # a call of 40 us would take a third longer on the general way
        directly = getattr(implementation(__package__, backend), "directly", None)
        value = directly and directly(*tensors)
        if value is not None:
            return value
    return _similarity.value(*distinct(*tensors), backend)
