# SPDX-License-Identifier: Apache-2.0
"""Nystrom statistics of the rows of all ranks: sums of m x m products travel, and neither features nor Phi do.

What a rank sends forward, in float64: CKA and HSIC m_x^2 + m_x m_y + m_y^2 + 4 (m_x + m_y) + 9 numbers, the transfer
m_s^2 + m_s m_t + m_t^2 (and m^2 for the norm where both m agree), whatever the number of rows; backward one number, as
every rank holds the moments. The rule "mean" adds d + 1 numbers a side, "median" gathers the rows it reads, at most
1024. `paired_landmarks` is what a loss needs that chooses its landmarks from the batch: the teacher's rows, gathered.
"""

from __future__ import annotations

import torch

from .. import distributed
from ..autograd import device_type, without_autocast
from . import statistics
from .function import Statistic, needs
from .problem import decode


def agreed(call: str, sides, landmarks, group, check, options) -> distributed.Agreed:
    """The ranks compare what they were given, and that their landmarks are the same; {name: tensor} of both."""
    if isinstance(group, distributed.Agreed):
        return group
    handle = distributed.handle_of(group)

    def prepare():
        check()
        return None, sides | {name: z[None] for name, z in landmarks.items()}

    _, rows = distributed.compare(prepare, handle, call, options)
    check_same(landmarks, handle)
    return distributed.Agreed(handle, rows[next(iter(sides))])


def check_same(landmarks, handle):
    """One error on every rank where landmarks differ by more than what other processors round; the host reads it."""
    held = torch.stack([_fingerprint(z) for z in landmarks.values()])
    table = distributed.gather_rows([held[None]], [1] * torch.distributed.get_world_size(handle), handle)[0].tolist()
    for k, (name, z) in enumerate(landmarks.items()):
        most = max(torch.finfo(z.dtype).eps, 1e-6) * abs(table[0][k])
        for rank, own in enumerate(table):
            if abs(own[k] - table[0][k]) > most:  # a NaN is no difference: it reaches the value
                raise ValueError(
                    f"{name} holds other numbers on rank {rank} of the group than on rank 0: landmarks have to be the "
                    "same on all ranks, kd.distributed.gather joins what each rank has chosen"
                )


def _fingerprint(z):
    """One number that other entries change, and the same ones in another order; its terms do not cancel."""
    z = z.detach().double().abs().flatten()
    return (z * torch.linspace(1, 2, len(z), dtype=z.dtype, device=z.device)).sum()


def of_all_ranks(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """`function` with a group as its last argument; a subclass gives it a `forward` over that group.

    Each rank holds the value; the gradient of its rows is that of the sum of what all ranks make of it.
    """

    class OfAllRanks(function):
        generate_vmap_rule = False

        @staticmethod
        def setup_context(ctx, inputs, output):
            *inputs, ctx.group = inputs
            function.setup_context(ctx, inputs, output)

        @staticmethod
        def backward(ctx, grad, *unused):
            grad = None if grad is None else ctx.group.sum(grad)
            return *function.backward(ctx, grad, *unused), None

    return OfAllRanks


class StatisticOverRanks(of_all_ranks(Statistic)):
    @staticmethod
    def forward(x, y, mask, zx, zy, sigma_x, sigma_y, problem, need, group):
        with without_autocast(device_type(x)):
            return statistics.forward(x, y, mask, zx, zy, sigma_x, sigma_y, decode(problem), group.sum)


def statistic(x, y, mask, zx, zy, sigma_x, sigma_y, problem: str, group):
    need = needs(x, zx, sigma_x, y, zy, sigma_y)
    run = StatisticOverRanks.apply if need else StatisticOverRanks.forward
    return run(x, y, mask, zx, zy, sigma_x, sigma_y, problem, need, group)[0]


def paired_landmarks(s, t, mask, select, group):
    """(m rows of s, the same rows of t) of the batch of all ranks, with the gradient of s; on every rank the same.

    select(t, mask) -> indices [m]. Received: t of all ranks and m rows of s; backward m rows of s.
    """
    whole, mask = group.gather(t.detach(), mask)
    rank = torch.distributed.get_rank(group.handle)
    index = select(whole, mask)
    index = group.sum(index if rank == 0 else torch.zeros_like(index))  # ranks draw different numbers
    own = index - sum(group.rows[:rank])
    here = (own >= 0) & (own < len(s))
    # an empty rank takes part with a graph, or the others would wait for its backward pass
    rows = s[own.clamp(0, len(s) - 1)] if len(s) else s.sum(0).expand(len(index), -1)
    return group.sum(statistics.only(here[:, None], rows)), whole[index]
