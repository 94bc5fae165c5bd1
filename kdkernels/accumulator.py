# SPDX-License-Identifier: Apache-2.0
"""Modules that add something up over batches: their float64 sums stay float64, whatever the model is cast to."""

from torch import nn


class Accumulator(nn.Module):
    """`.to(device)` moves the buffers, `.half()` and `.float()` do not round them."""

    def _apply(self, fn, recurse=True):
        for name, buffer in self._buffers.items():
            moved = fn(buffer)
            self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self
