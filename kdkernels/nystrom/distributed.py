# SPDX-License-Identifier: Apache-2.0
"""Nystrom statistics of the rows of all ranks: sums of m x m products travel, and neither features nor Phi do.

What a rank sends forward, in float64: CKA and HSIC m_x^2 + m_x m_y + m_y^2 + 4 (m_x + m_y) + 9 numbers, the transfer
m_s^2 + m_s m_t + m_t^2 (and m^2 for the norm where both m agree), whatever the number of rows; backward one number, as
every rank holds the moments. The rule "mean" adds d + 1 numbers a side, "median" gathers the rows it reads, at most
1024. `paired_landmarks` is what a loss needs that chooses its landmarks from the batch: the teacher's rows, gathered.
"""

from __future__ import annotations

from functools import partial

import torch

from ..distributed import Agreed, compare, gather_rows, handle_of
from ..gram.bandwidth import bandwidth_of_all
from . import statistics
from .call import Question, Rows
from .operator import statistic_over_ranks


def answer(question: Question, rows: Rows, group):
    """(the value, None), or (None, the rows of all ranks) for the textbook, which sees rows: all of them travel."""

    def check():
        rows.check(question, empty=True)
        question.resolved(*rows[:4])

    held = dict(zip((*question.names(), "mask"), rows, strict=True))
    x, y, *landmarks = question.names()
    options = question._asdict()
    del options["stat"]
    sides, landmarks = ({name: held[name] for name in names} for names in ((x, y, "mask"), landmarks))
    group = agreed(question.op(), sides, landmarks, group, check, options)
    question = question.checked()
    question.check_number(group.total, " on all ranks")
    question = question.resolved(*rows[:4])
    if question.backend == "reference":
        x, y, mask = group.gather(rows.x, rows.y, rows.mask)
        return None, rows._replace(x=x, y=y, mask=mask)
    return statistic_over_ranks(rows.call(question, partial(bandwidth_of_all, group=group), group.sum), group), None


def agreed(call: str, sides, landmarks, group, check, options) -> Agreed:
    """The ranks compare what they were given, and that their landmarks are the same; {name: tensor} of both."""
    if isinstance(group, Agreed):
        return group
    handle = handle_of(group)

    def prepare():
        check()
        return None, sides | {name: z[None] for name, z in landmarks.items()}

    _, rows = compare(prepare, handle, call, options)
    check_same(landmarks, handle)
    return Agreed(handle, rows[next(iter(sides))])


def check_same(landmarks, handle):
    """One error on every rank where landmarks differ by more than what other processors round; the host reads it."""
    held = torch.stack([_fingerprint(z) for z in landmarks.values()])
    table = gather_rows([held[None]], [1] * torch.distributed.get_world_size(handle), handle)[0].tolist()
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
