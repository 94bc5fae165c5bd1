# SPDX-License-Identifier: Apache-2.0
"""The family on a CPU through `csrc/relation/`: one call makes value and gradient of PKT and RKD-D, another all angles.

Of PKT and RKD-D the gradient for an upstream of 1 is kept. float64 runs in PyTorch: nobody trains in it here.
"""

from __future__ import annotations

import torch

from ..autograd import at_least_float32
from . import torch_impl


def _in_pytorch(x, y, kind: str) -> bool:
    return kind == "rkd_angle" or at_least_float32(x, y) == torch.float64


def _rows(x):
    x = x if x.dtype == torch.float32 else x.float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def forward(x, y, mask, kind: str, need: int):
    if _in_pytorch(x, y, kind):
        triplets = torch_impl.one_sided(torch.ops.kdkernels.angle_triplets)
        return torch_impl.forward(x, y, mask, kind, need, triplets)
    mask = mask if mask is None else mask.contiguous()
    return torch.ops.kdkernels.relate_pairs(_rows(x), _rows(y), mask, kind == "pkt", need)


def kept_of(x, y, kind: str):
    """As in `torch_impl`, or the gradients themselves, float32."""
    return torch_impl.kept_of(x, y, kind) if _in_pytorch(x, y, kind) else ((x.shape, y.shape), torch.float32)


def backward(grad, x, mask, kept, kind: str):
    if kept.dtype == torch.float64:
        return torch_impl.backward(grad, x, mask, kept, kind)
    dx = torch.ops.kdkernels.scale_pairs(grad, kept, mask if mask is None else mask.contiguous())
    return dx if x.dtype == torch.float32 else dx.to(x.dtype)
