# SPDX-License-Identifier: Apache-2.0
"""The Gram family on a GPU: three schedules by n and p, ordered reductions, nothing n x n above 1024 samples.

n <= 1024: `small.py` (2 or 3 launches forward, 2 backward a side). Above: `tiles.py`, whose backward pass keeps the
gradient in registers (p <= 256) or writes row panels of pair weights for a matrix product. Linear kernels with n > p +
q stay in feature space, where cuBLAS is the kernel.
"""

from __future__ import annotations

import torch

from .. import torch_impl
from ..call import SMALL, Call
from ..torch_impl import forms
from . import small, tiles
from .matrices import width_of
from .small_kernels import SAVED


def few(n: int) -> bool:
    """Whether the launches of `small` take so many rows."""
    return n <= SMALL


def _in_pytorch(call: Call) -> bool:
    """Forms whose kernel is cuBLAS: feature space, and centred row-normalised statistics, which need float64."""
    n, p, q = call.sizes
    if call.problem.row_normalize and call.problem.center:
        return True
    return not few(n) and forms.in_feature_space(call.problem, n, p, q)


def kept(call: Call):
    """As `torch_impl.kept`: up to `SMALL` a launch is dearer than arithmetic: always Gram space."""
    G, n, _ = call.x.features.shape
    if not call.need or not few(n) or _in_pytorch(call):
        return torch_impl.kept(call)
    return ((G, SAVED.value, n), (2, G, n, width_of(n))), call.dtype


def _schedule(call: Call):
    if _in_pytorch(call):
        return torch_impl
    return small if few(call.sizes[0]) else tiles


def forward(call: Call):
    with torch.cuda.device_of(call.x.features):  # a launch goes to the current device, wherever its tensors are
        return _schedule(call).forward(call)


def backward(call: Call, saved, grad):
    with torch.cuda.device_of(call.x.features):
        return _schedule(call).backward(call, saved, grad)
