# SPDX-License-Identifier: Apache-2.0
"""Rows whose classes lie in slices on the ranks of a group: of each row a few sums travel. MATH.md, section 12."""

from __future__ import annotations

import math

import torch

from . import torch_impl
from .call import measure_of


class Slices:
    """The classes of rows, one slice after another on the ranks; every rank has all rows, and calls as the others do.

    What a function of a row makes of sums over all classes is the same on each rank, and so is its upstream gradient:
    the gradient of what a rank puts into a sum is that of the sum.
    """

    def __init__(self, handle, sizes):
        self.handle, self.sizes = handle, tuple(sizes)
        rank = torch.distributed.get_rank(handle)
        self.start, self.most = sum(self.sizes[:rank]), max(self.sizes)

    @property
    def size(self) -> int:
        """Classes of this rank."""
        return self.sizes[torch.distributed.get_rank(self.handle)]

    @staticmethod
    def parts(rows):
        """All at once, as the driver has made chunks of them, and of as many as on the other ranks."""
        return [slice(0, len(rows))]

    def max(self, x):
        """Over the ranks, in place."""
        torch.distributed.all_reduce(x, torch.distributed.ReduceOp.MAX, group=self.handle)
        return x

    def sum(self, x):
        torch.distributed.all_reduce(x, group=self.handle)
        return x

    def total(self, x):
        """`sum`, differentiable."""
        return total(x, self.handle)

    def part(self, x, size: int, dim: int = -1):
        """The classes of this rank, of a tensor that all ranks hold: its gradient is made of those of all parts."""
        return _Part.apply(x, (dim, self.start, size), self)

    def own(self, classes, like):
        """Where they are in the rows of this rank, [R, k], and which of them are here."""
        place = classes - self.start
        here = (place >= 0) & (place < like.shape[-1])
        return torch.where(here, place, 0), here

    def chosen(self, x, classes):
        """x [R, C] at the classes [R, k], wherever they are."""
        place, here = self.own(classes, x)
        return self.total(torch.where(here, x.gather(-1, place), 0))

    def without(self, x, classes):
        """x with the classes [R, k], no one twice, at -inf."""
        place, here = self.own(classes, x)
        closed = torch.zeros(x.shape, dtype=torch.int32, device=x.device)
        closed.scatter_add_(-1, place, here.int())
        return x.masked_fill(closed > 0, -math.inf)

    def logsumexp(self, x):
        """Of rows [R, C], over all classes, [R]."""
        top = self.max(x.detach().amax(-1))
        top = torch.where(top == -math.inf, 0, top)
        found = self.total((x - top[:, None]).exp().sum(-1))
        nothing = found == 0
        return top + torch.where(nothing, -math.inf, torch.where(nothing, 1, found).log())

    def forward_kl(self, student, teacher, tau):
        """`distillation_kl` of each row, [R], differentiable in the student; tau a number, or [R]."""
        taus = tau if isinstance(tau, torch.Tensor) else None
        return _Divergence.apply(student, teacher, taus, measure_of("forward", 1.0 if taus is not None else tau), self)


def total(x, handle):
    """The sum of x over the ranks, which go on alike: the gradient of x is that of the sum."""
    return _Total.apply(x, handle)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, handle):
        x = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(x, group=handle)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, how, slices):
        ctx.shape, ctx.how, ctx.slices = x.shape, how, slices
        return x.narrow(*how)

    @staticmethod
    def backward(ctx, grad):
        whole = grad.new_zeros(ctx.shape)
        whole.narrow(*ctx.how).copy_(grad)
        return ctx.slices.sum(whole), None, None


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, taus, how, slices):
        need = ctx.needs_input_grad[0]
        values, _, slopes = torch_impl.divergence(student, teacher, (taus, None), how, 1.0, False, need, slices)
        ctx.save_for_backward(slopes)
        return values

    @staticmethod
    def backward(ctx, grad):
        return grad[:, None] * ctx.saved_tensors[0], None, None, None, None
