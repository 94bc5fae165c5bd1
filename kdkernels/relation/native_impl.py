# SPDX-License-Identifier: Apache-2.0
"""The angles on a CPU through `csrc/relation/`: all triplets in one pass, three angles of a triangle at a time."""

from __future__ import annotations

import torch

from . import torch_impl


def forward(x, y, mask, kind: str, need: int):
    return torch_impl.forward(x, y, mask, kind, need, torch_impl.one_sided(torch.ops.kdkernels.angle_triplets))
