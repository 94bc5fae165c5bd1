# SPDX-License-Identifier: Apache-2.0
"""Losses over the batch of all ranks: differentiable collectives whose gradients, averaged, are those of one process.

Every rank computes the same value of the whole batch. Backward adds up what all ranks send to a tensor, world size
times the gradient of its rows; DDP and FSDP divide by the world size, so that parameters get what one process on the
concatenated batch would give them. Without either, divide by it yourself.

`group` is None for this process alone, "world" for all ranks, or a `torch.distributed.ProcessGroup`.
"""

from __future__ import annotations

import torch

from . import checks
from .autograd import NoSecondDerivative

_REFUSED = -2  # in the place of a dtype
_MOST_DIMS = 6  # a rank tells the others so many sizes of a tensor
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.int64, torch.int32)


def gather(x: torch.Tensor, group=None) -> torch.Tensor:
    """The rows of all ranks, rank after rank, on every rank: [n_r, ...] -> [sum of n_r, ...]; differentiable.

    Ranks may have different numbers of rows, none included (an uneven last batch), of one width, dtype and device
    type; the same error is raised on every rank if they do not. The gradient of a rank's rows is the sum of what all
    ranks send back to them: see the module's first lines for what that means with DDP.

    Costs, W ranks of n rows and d bytes a row: forward W n d received on each rank (rows are padded to the longest
    rank's), backward the same as a reduce-scatter; 56 bytes a rank and tensor to agree on sizes, which the host reads:
    one synchronisation on a GPU, and a graph break under `torch.compile`.

    group: None here means all ranks, as in torch.distributed. Raises RuntimeError without a process group.
    """
    handle = handle_of("world" if group is None else group)
    return gather_rows([x], agree([x], ["x"], handle, lambda: checks.is_tensor(x, "x")), handle)[0]


def gather_rows(tensors, rows, handle) -> list[torch.Tensor | None]:
    """`gather` of several tensors, `rows` of them on each rank; None stays None."""
    return [None if t is None else _Gather.apply(t, rows, handle) for t in tensors]


def sum_over(x: torch.Tensor, handle) -> torch.Tensor:
    """The sum of x over the ranks, on every rank; differentiable."""
    return _Sum.apply(x, handle)


def handle_of(group):
    """The process group that `group` names; RuntimeError where there is none."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise RuntimeError(
            f"group is {group!r}, and torch.distributed is not initialised: call torch.distributed.init_process_group "
            "first, or pass group=None for one process"
        )
    if isinstance(group, str):
        if group != "world":
            raise ValueError(f"group is {group!r}: give None, 'world' or a torch.distributed.ProcessGroup")
        return torch.distributed.group.WORLD
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"group is {group!r}: give None, 'world' or a torch.distributed.ProcessGroup this rank is in")
    return group


def agree(tensors, names, handle, check=lambda: None) -> list[int]:
    """Rows on each rank, after all have compared what they hold: one error on every rank, and no deadlock later.

    A rank whose `check` raises tells the others before it does. Tensors may be None, on all ranks alike. The host reads
    the answer.
    """
    described, error = [[_REFUSED] * (_MOST_DIMS + 1)] * len(names), None
    try:
        check()
        described = [_described(t, name) for t, name in zip(tensors, names, strict=True)]
    except (TypeError, ValueError) as own:
        error = own
    mine = torch.tensor(described, device=_device_of(tensors, handle))
    table = mine.new_empty(torch.distributed.get_world_size(handle), *mine.shape)
    _all_gather(table.view(-1, mine.shape[-1]), mine, handle)
    if error is not None:
        raise error
    table = table.tolist()
    refused = [i for i, rank in enumerate(table) if rank[0][0] == _REFUSED]
    if refused:
        raise ValueError(f"{names[0]}: rank {refused[0]} of the group refused its arguments; its own error says why")
    rows = [rank[0][1] for rank in table]
    for k, name in enumerate(names):
        found = "; ".join(f"rank {i} has {_words(rank[k])}" for i, rank in enumerate(table))
        if len({(rank[k][0], *rank[k][2:]) for rank in table}) > 1:
            raise ValueError(f"{name} differs between the ranks of the group: {found}. Only the rows may differ")
        if tensors[k] is not None and [rank[k][1] for rank in table] != rows:
            raise ValueError(f"{name} has not the rows of {names[0]} on every rank: {found}; {names[0]} has {rows}")
    return rows


def _device_of(tensors, handle) -> torch.device:
    for t in tensors:
        if isinstance(t, torch.Tensor):
            return t.device
    return torch.device("cuda" if torch.distributed.get_backend(handle) == "nccl" else "cpu")


def _described(t, name: str) -> list[int]:
    """dtype, rows and the sizes of a row."""
    if t is None:
        return [-1] * (_MOST_DIMS + 1)
    if t.dim() == 0 or t.dim() > _MOST_DIMS:
        raise ValueError(f"{name} has shape {tuple(t.shape)}: a rank sends rows of 0 to {_MOST_DIMS - 1} dimensions")
    return [_DTYPES.index(t.dtype), *t.shape, *[-1] * (_MOST_DIMS - t.dim())]


def _words(described) -> str:
    if described[0] < 0:
        return "None"
    shape = [size for size in described[1:] if size >= 0]
    return f"{str(_DTYPES[described[0]]).removeprefix('torch.')} {shape}"


def _all_gather(out, x, handle):
    run = getattr(torch.distributed, "all_gather_single", torch.distributed.all_gather_into_tensor)
    run(out, x, group=handle)


def _reduce_scatter(out, x, handle):
    run = getattr(torch.distributed, "reduce_scatter_single", torch.distributed.reduce_scatter_tensor)
    run(out, x, group=handle)


def _padded(x, n: int):
    """x with rows of zeros up to n."""
    return x if len(x) == n else torch.cat([x, x.new_zeros(n - len(x), *x.shape[1:])])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(x, rows, handle):
        longest = max(rows)
        received = x.new_empty(len(rows) * longest, *x.shape[1:])
        # a collective of bools is not available everywhere
        as_bytes = x.dtype == torch.bool
        _all_gather(
            *((t.view(torch.uint8) if as_bytes else t) for t in (received, _padded(x.contiguous(), longest))), handle
        )
        if min(rows) == longest:
            return received
        return torch.cat([part[:n] for part, n in zip(received.split(longest), rows, strict=True)])

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.rows, ctx.handle = inputs
        if not output.is_floating_point():
            ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx, grad):
        run = _Scatter.apply if torch.is_grad_enabled() else _Scatter.forward
        return run(grad, ctx.rows, ctx.handle), None, None


class _Scatter(NoSecondDerivative):
    """The sum over the ranks of the rows that came from this one."""

    @staticmethod
    def forward(grad, rows, handle):
        longest, own = max(rows), rows[torch.distributed.get_rank(handle)]
        sent = torch.cat([_padded(part, longest) for part in grad.split(rows)])
        out = grad.new_empty(longest, *grad.shape[1:])
        _reduce_scatter(out, sent, handle)
        return out[:own]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(x, handle):
        total = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=handle)
        return total

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.handle = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return _Sum.apply(grad, ctx.handle), None
