# SPDX-License-Identifier: Apache-2.0
"""Modules that add something up over batches: their float64 sums stay float64, whatever the model is cast to."""

import torch
from torch import nn

from . import distributed


class Accumulator(nn.Module):
    """`.to(device)` moves the buffers, `.half()` and `.float()` do not round them."""

    def _apply(self, fn, recurse=True):
        return super()._apply(without_rounding(fn), recurse)

    def _over_ranks(self, group, names, words: str = "", options=None):
        """The group's handle, once its ranks have found buffers, `words` and options alike on all of them."""
        handle, held = distributed.handle_of(group), {name: getattr(self, name)[None] for name in names}
        options = self if options is None else options
        distributed.compare(lambda: (None, held), handle, f"{type(self).__name__}{words}", options)
        return handle


def summed(tensors, handle) -> list[torch.Tensor]:
    """Each of a few tensors summed over the ranks, in one message of float64: the same bits on every rank."""
    flat = distributed.sum_over(torch.cat([t.double().flatten() for t in tensors]), handle)
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]


def without_rounding(fn):
    """What `fn` does to a tensor, but for its dtype."""

    def move(tensor):
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move
