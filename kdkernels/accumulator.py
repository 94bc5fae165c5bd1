# SPDX-License-Identifier: Apache-2.0
"""Modules whose buffers keep their dtypes, whatever the model is cast to: sums over batches, constants of losses."""

from __future__ import annotations

import torch
from torch import nn

from . import distributed
from .autograd import at_least_float32


class Unrounded(nn.Module):
    """`.to(device)` moves its own buffers, `.half()` and a default dtype leave them float32 or wider."""

    def register_buffer(self, name: str, tensor: torch.Tensor | None, persistent: bool = True) -> None:
        if tensor is not None and tensor.is_floating_point():
            tensor = tensor.to(at_least_float32(tensor))
        super().register_buffer(name, tensor, persistent)

    def _apply(self, fn, recurse=True):
        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(without_rounding(fn), recurse=False)


class Accumulator(Unrounded):
    """What adds something up over batches, and over ranks."""

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
