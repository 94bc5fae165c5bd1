# SPDX-License-Identifier: Apache-2.0
"""Blocks of rows round a ring of the ranks: each rank sees all of them, one at a time, and holds two.

Between W ranks of n rows with d bytes a row, a round brings (W - 1) n d to each rank: what gathering brings, but the
memory is 2 n d whatever W is.
"""

from __future__ import annotations

import torch

_ALIGNED = 16  # bytes: a field of a block starts at a multiple, so that it can be looked at in its own dtype


def around(fields, rows, handle):
    """(rank, its fields) of this rank, the one before it, and so on round the ring; the next block is on its way
    meanwhile. Fields are [G, n, ...] with `rows` on each rank; a rank without rows is left out.

    Two buffers of the size of the longest rank's block: one is looked at and sent on, the other received into. What is
    yielded is valid until the next one is asked for.
    """
    rank, world = torch.distributed.get_rank(handle), torch.distributed.get_world_size(handle)
    to, source = (torch.distributed.get_global_rank(handle, (rank + step) % world) for step in (1, -1))
    held, coming = (fields[0].new_empty(_layout(fields, max(rows))[-1], dtype=torch.uint8) for _ in range(2))
    for field, place in zip(fields, _looked_at(held, fields, rows[rank]), strict=True):
        place.copy_(field)
    for step in range(world):
        owner, next_owner = (rank - step) % world, (rank - step - 1) % world
        messages = []
        if step + 1 < world:
            for what, buffer, block, peer in (("isend", held, owner, to), ("irecv", coming, next_owner, source)):
                if rows[block]:
                    part = buffer[: _layout(fields, rows[block])[-1]]
                    messages.append(torch.distributed.P2POp(getattr(torch.distributed, what), part, peer, handle))
        works = torch.distributed.batch_isend_irecv(messages) if messages else []
        if rows[owner]:
            yield owner, _looked_at(held, fields, rows[owner])
        for work in works:
            work.wait()
        held, coming = coming, held


def _layout(fields, n: int) -> list[int]:
    """Where each field of a block of n rows starts, and where the block ends."""
    ends = [0]
    for t in fields:
        size = t.shape[0] * n * t.shape[2:].numel() * t.element_size()
        ends.append(ends[-1] + -(-size // _ALIGNED) * _ALIGNED)
    return ends


def _looked_at(buffer, fields, n: int) -> list[torch.Tensor]:
    """The fields of a block of n rows in a buffer of bytes."""
    out = []
    for t, start in zip(fields, _layout(fields, n), strict=False):
        shape = (t.shape[0], n, *t.shape[2:])
        size = torch.Size(shape).numel() * t.element_size()
        out.append(buffer[start : start + size].view(t.dtype).view(shape))
    return out
