# SPDX-License-Identifier: Apache-2.0
"""Modules that add something up over batches: their float64 sums stay float64, whatever the model is cast to."""

from torch import nn


class Accumulator(nn.Module):
    """`.to(device)` moves the buffers, `.half()` and `.float()` do not round them."""

    def _apply(self, fn, recurse=True):
        return super()._apply(without_rounding(fn), recurse)


def without_rounding(fn):
    """What `fn` does to a tensor, but for its dtype."""

    def move(tensor):
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move
