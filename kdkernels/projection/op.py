# SPDX-License-Identifier: Apache-2.0
"""Distance of two feature maps inside a subspace of their channels: one projection of the difference, no permute copy.

Read on in `reference.py` (what is computed), `torch_impl.py` (how, in PyTorch) and `triton_impl.py` (how, on a GPU).
"""

from __future__ import annotations

import torch

from .. import backend as backends
from .._types import Backend, Mask, ReductionOrNone
from ..autograd import at_least_float32, device_type, in_pytorch
from . import reference
from .checks import check_call, mask_of_positions
from .layout import planes
from .operator import projected

__all__ = ["projected_mse"]


def projected_mse(
    s: torch.Tensor,
    t: torch.Tensor,
    basis: torch.Tensor,
    *,
    channel_dim: int = 1,
    reduction: ReductionOrNone = "mean",
    mask: Mask = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Mean squared error of two features after one linear projection of their channels, |(s - t) P|^2 / (rows k).

    Source: RdimKD (arXiv 2312.08700). The difference is projected once, read in the layout it has: NCHW, channels_last,
    tokens and [B, c] are not copied; positions whose strides do not merge are.

    Args:
        s: features [B, c], [B, c, ...] or, with channel_dim, [B, ..., c]; float16, bfloat16, float32 or float64.
        t: features of the same shape; its own float dtype and layout.
        basis: P [c, k], k <= c, in any float dtype; used in the dtype of the computation.
        channel_dim: the dimension of the channels, not 0; -1 for tokens [B, T, c].
        reduction: "mean" over rows (samples and positions) and k; "sum"; "none": [B], the mean over each sample's own
            positions and k.
        mask: bool [B] or one entry a position ([B, H, W], [B, T]): False rows take no part, are not counted, and get
            gradient 0; where none is left the value is 0.
        backend: "auto", "triton", "cpp", "torch" or "reference" (the last one also gives higher derivatives).

    Returns:
        A scalar or [B]; float32 for half inputs, else the promoted dtype of s and t, in which all is computed.
        Gradients to s, t and basis; beyond the inputs the backward pass keeps the projection, rows x k numbers. A NaN
        in a row that counts gives NaN. An empty batch gives 0.

    Raises:
        ValueError: shapes that do not fit, k > c, another device. TypeError: a dtype that is not float.

    >>> s, t = torch.randn(8, 32, 7, 7), torch.randn(8, 32, 7, 7)
    >>> P = kd.random_basis(32, 4)
    >>> plain = ((s - t).permute(0, 2, 3, 1) @ P).square().mean()
    >>> torch.allclose(kd.projected_mse(s, t, P), plain)
    True
    """
    dim = check_call(s, t, basis, channel_dim, reduction, mask)
    mask = mask_of_positions(mask, s, dim)
    chosen = backends.resolve("projected_mse", backend, device_type(s), (s.dtype, t.dtype))
    if chosen == "reference":
        return in_pytorch(_reference, (s, t, basis, mask), dim, reduction)
    return projected(s, t, basis, mask, dim, reduction, chosen)


def _reference(s, t, basis, mask, channel_dim, reduction):
    dtype = at_least_float32(s, t)
    rows = (planes(x, channel_dim).mT.to(dtype) for x in (s, t))
    return reference.projected_mse(*rows, basis.to(dtype), mask, reduction)
