# SPDX-License-Identifier: Apache-2.0
"""Bytes that a call brings to this rank, counted where torch.distributed is asked for them.

Of a collective what its ring algorithm needs is counted, W ranks: 2 (W - 1)/W of an all-reduce's tensor, (W - 1)/W of
an all-gather's output and of a reduce-scatter's input; of a point-to-point message its size. Headers are not.
"""

from __future__ import annotations

import torch.distributed as dist

# function of torch.distributed, what it is, which argument's bytes, how often their (W - 1)/W is received
_COLLECTIVES = (
    ("all_reduce", "all_reduce", 0, 2),
    ("all_gather_into_tensor", "all_gather", 0, 1),
    ("all_gather_single", "all_gather", 0, 1),
    ("reduce_scatter_tensor", "reduce_scatter", 1, 1),
    ("reduce_scatter_single", "reduce_scatter", 1, 1),
)


def received(call, world: int) -> dict[str, int]:
    """{collective: bytes} of everything that `call` asks torch.distributed for."""
    found, originals, depth = {}, {}, 0

    def note(what, size):
        found[what] = found.get(what, 0) + round(size)

    def counting(name, what, at, times):
        def run(*arguments, **options):
            nonlocal depth
            depth += 1  # one of them may call another
            if depth == 1:
                note(what, times * arguments[at].nbytes * (world - 1) / world)
            try:
                return originals[name](*arguments, **options)
            finally:
                depth -= 1

        return run

    def messages(operations):
        for operation in operations:
            if operation.op is dist.irecv:
                note("ring", operation.tensor.nbytes)
        return originals["batch_isend_irecv"](operations)

    for name, what, at, times in _COLLECTIVES:
        if hasattr(dist, name):
            originals[name] = getattr(dist, name)
            setattr(dist, name, counting(name, what, at, times))
    originals["batch_isend_irecv"], dist.batch_isend_irecv = dist.batch_isend_irecv, messages
    try:
        call()
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)
    return found
