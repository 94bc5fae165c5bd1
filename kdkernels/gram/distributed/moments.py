# SPDX-License-Identifier: Apache-2.0
"""Statistics of linear kernels over the rows of all ranks, from sums: p x p moments travel and no feature does."""

from __future__ import annotations

import torch

from ... import distributed
from ...autograd import at_least_float32, device_type, without_autocast
from ...distributed import Agreed
from ..call import Question, Rows, minimum_rows
from ..torch_impl.forms import difference_and_sum
from ..torch_impl.prepared import unit_rows


def serve(question: Question, kernels) -> bool:
    """Whether the statistic follows from moments."""
    if not all(kernel.name in ("linear", "cosine") for kernel in kernels):
        return False
    centred = question.center and not question.row_normalize
    return question.stat == "mse" or (centred and question.stat in ("cka", "hsic"))


def are_fewer(question: Question, rows: Rows, total: int) -> bool:
    """Whether they are fewer numbers than all rows, `total` of them, have."""
    p, q = rows.x.shape[-1], rows.y.shape[-1]
    moments = 3 * max(p, q) ** 2 if question.stat == "mse" else p * p + p * q + q * q + p + q
    return moments <= total * (p + q)


def statistic(question: Question, kernels, rows: Rows, group: Agreed):
    """In plain PyTorch, on differentiable sums over the ranks."""
    x, y, mask = rows
    if x.dim() == 2:
        grouped = Rows(x[None], y[None], None if mask is None else mask[None])
        return statistic(question, kernels, grouped, group)[0]
    dtype, handle = at_least_float32(x, y), group.handle
    with without_autocast(device_type(x)):
        X, Y = (
            unit_rows(side, mask, dtype) if kernel.name == "cosine" else _masked(side.to(dtype), mask)
            for side, kernel in zip((x, y), kernels, strict=True)
        )
        N = x.new_full((x.shape[0],), group.total, dtype=torch.float64)
        if mask is not None:
            N = distributed.sum_over(mask.sum(1).double(), handle)
        least = minimum_rows(question.unbiased, True, question.stat)
        enough, N = N >= least, N.clamp(min=least)
        if question.stat == "mse":
            value = _MSE.apply(X, Y, handle) / (N.square() if question.mean else 1)
        else:
            value = _hsic_or_cka(question, X, Y, N, mask, handle)
        return torch.where(enough, value, 0).to(dtype)


def _masked(x, mask):
    return x if mask is None else torch.where(mask[..., None], x, torch.zeros((), dtype=x.dtype, device=x.device))


def _centred(x, N, mask, handle):
    """Rows minus their mean, of size one or so, and the scale [G], a power of two.

    The mean has its gradient: the form of the statistic below holds for rows that sum to 0 alone.
    """
    sums = torch.cat([x.sum(-2, dtype=torch.float64), x.detach().double().square().sum((1, 2))[:, None]], 1)
    sums = distributed.sum_over(sums, handle) / N[:, None]
    mean, square = sums[:, :-1], sums[:, -1].detach()
    spread = square - mean.detach().square().sum(-1)
    # the mean in two parts: rows far from 0 need the digits of it that their own dtype does not have
    high = mean.detach().to(x.dtype)
    low = (mean - high).to(x.dtype)
    # rows that differ by less than the rounding of their mean are constant
    varies = spread > (4 * torch.finfo(x.dtype).eps) ** 2 * square
    scale = torch.exp2(torch.log2(torch.where(varies, spread, 1)).div_(-2).round_())
    z = (x - high[:, None] - low[:, None]) * torch.where(varies, scale, 0).to(x.dtype)[:, None, None]
    return _masked(z, mask), scale


def _products(pairs, handle):
    """A'B of each pair over the rows of all ranks, float64, in one message."""
    local = [A.mT @ B for A, B in pairs]
    packed = distributed.sum_over(torch.cat([t.flatten(1) for t in local], 1), handle).double()
    return [
        t.unflatten(1, a.shape[1:]) for t, a in zip(packed.split([a[0].numel() for a in local], 1), local, strict=True)
    ]


def _hsic_or_cka(question, X, Y, N, mask, handle):
    """Rows of X and Y sum to 0 over the ranks: row sums of K are 0, and without its diagonal -k_i."""
    stat, unbiased = question.stat, question.unbiased
    (X, unit_x), (Y, unit_y) = (_centred(side, N, mask, handle) for side in (X, Y))
    k, l = X.double().square().sum(-1), Y.double().square().sum(-1)
    squares = torch.stack([(k * l).sum(-1), (k * k).sum(-1), (l * l).sum(-1), k.sum(-1), l.sum(-1)])
    cross, own_x, own_y, trace_x, trace_y = distributed.sum_over(squares, handle)
    pairs = [(X, Y)] if stat == "hsic" else [(X, Y), (X, X), (Y, Y)]
    sums = [t.square().sum((1, 2)) for t in _products(pairs, handle)]
    diagonals = ((cross, trace_x, trace_y), (own_x, trace_x, trace_x), (own_y, trace_y, trace_y))

    def h(total, dots, first, second):
        if not unbiased:
            return total / (N - 1) ** 2
        return (total - N / (N - 2) * dots + first * second / ((N - 1) * (N - 2))) / (N * (N - 3))

    values = [h(total, *diagonal) for total, diagonal in zip(sums, diagonals, strict=False)]
    if stat == "hsic":
        return values[0] / (unit_x * unit_y).square()
    # a side below its own rounding has no direction: 0, with zero gradient
    floor = (8 * torch.finfo(X.dtype).eps) ** 2 / (N * (N - 3) if unbiased else (N - 1) ** 2)
    defined = torch.ones_like(N, dtype=torch.bool)
    for value, total in zip(values[1:], sums[1:], strict=True):
        defined = defined & ~(value <= floor * total)
    kl, kk, ll = (torch.where(defined, value, one) for value, one in zip(values, (0.0, 1.0, 1.0), strict=True))
    return kl / (kk.sqrt() * ll.sqrt())


class _MSE(torch.autograd.Function):
    """|XX' - YY'|^2 [G] from D = X - Y and M = X + Y: nothing cancels as X nears Y. Zero columns pad the narrower.

    The gradient of X is 2 g (D M'X + M D'X), from products of its own: by way of D and M that of a small side is lost
    in the large one's. It can be differentiated again.
    """

    @staticmethod
    def forward(X, Y, handle):
        D, M = difference_and_sum(X, Y)
        DD, MM, DM = _products([(D, D), (M, M), (D, M)], handle)
        return ((DD * MM).sum((1, 2)) + (DM * DM.mT).sum((1, 2))) / 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        *sides, ctx.handle = inputs
        ctx.save_for_backward(*sides)

    @staticmethod
    def backward(ctx, grad):
        sides = ctx.saved_tensors
        D, M = difference_and_sum(*sides)
        grad = distributed.sum_over(grad, ctx.handle)[:, None, None]
        out = [None, None]
        for k in (0, 1):
            if ctx.needs_input_grad[k]:
                sign, Z = (2, -2)[k], sides[k]
                MZ, DZ = _products([(M, Z), (D, Z)], ctx.handle)
                out[k] = (sign * grad).to(Z.dtype) * (D @ MZ.to(Z.dtype) + M @ DZ.to(Z.dtype))[..., : Z.shape[-1]]
        return *out, None
