# SPDX-License-Identifier: Apache-2.0
"""The dtype of the work: half precision is computed in float32, float64 stays what it is."""

from __future__ import annotations

import torch


def at_least_float32(*tensors: torch.Tensor | None) -> torch.dtype:
    """The promoted dtype of the tensors, float32 at least; None has no say."""
    dtype = torch.float32
    for tensor in tensors:
        # most often they agree: a comparison costs a fraction of a call into torch, and every operator asks
        if tensor is not None and tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
