# SPDX-License-Identifier: Apache-2.0
"""Losses over the batch of all ranks: differentiable collectives whose gradients, averaged, are those of one process.

Every rank computes the same value of the whole batch. Backward adds up what all ranks send to a tensor, world size
times the gradient of its rows; DDP and FSDP divide by the world size, so that parameters get what one process on the
concatenated batch would give them. Without either, divide by it yourself.

`group` is None for this process alone, "world" for all ranks, or a `torch.distributed.ProcessGroup`. It is an argument
of every op and loss in which the rows of a batch meet. Losses that are means over single samples (KD, DKD, STKD, AT,
FSP, NST, ICKD) have none: the average that DDP takes over the ranks is theirs, as long as each rank has as many rows.
(`group=` of a call of KD and DKD, and of `kd.LinearLogits`, names ranks that share a vocabulary, not a batch.)

What a call sends, beside 224 bytes a rank to agree on shapes (56 more for each tensor after the third): CKA, HSIC and
Gram-MSE with linear kernels p x p moments, whatever the batch, with others what `gram/distributed` takes; DIST and CMKD
a few numbers a class; any loss with rows="groups" 16 bytes, as each sample stays on its rank; MMD, SP, PKT, RKD, CC,
RCKA and PCKA (its maps) the rows, of which each rank then holds all.

All ranks make the same calls in the same order, with one choice of options, masks on all or none and gradients for all
or none, and the same backward passes through them; rows may differ in number, and a rank may have none. What does not
fit raises on every rank; a rank that leaves out a call or a backward pass makes the others wait for the timeout of the
process group. Weights are compared where no GPU holds them. Shapes are compared on the host, so under `torch.compile`
such a call is a graph break; `fullgraph=True` refuses it.
"""

from __future__ import annotations

import numbers
import zlib
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import torch

from . import checks

if TYPE_CHECKING:
    from torch._C._distributed_c10d import ProcessGroup
else:  # a torch without torch.distributed has none
    ProcessGroup = getattr(torch.distributed, "ProcessGroup", object)

__all__ = ["gather"]

_REFUSED = -2
_MOST_DIMS = 6  # a rank tells the others so many sizes of a tensor
_WIDTH = 1 + _MOST_DIMS
_AT_ONCE = 3  # tensors described in the first message, which has one size for every call
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.int64, torch.int32)


def gather(x: torch.Tensor, group: GroupLike = None) -> torch.Tensor:
    """The rows of all ranks, rank after rank, on every rank: [n_r, ...] -> [sum of n_r, ...]; differentiable.

    Ranks may have different numbers of rows, none included (an uneven last batch), of one width, dtype and device
    type, with a gradient on all or none; the same error is raised on every rank if they do not. The gradient of a
    rank's rows is the sum of what all ranks send back to them: see the module's first lines for what that means with
    DDP.

    Costs, W ranks of n rows and d bytes a row: forward W n d received on each rank (rows are padded to the longest
    rank's), backward the same as a reduce-scatter; 224 bytes a rank to agree on sizes, which the host reads:
    one synchronisation on a GPU, and a graph break under `torch.compile`.

    x: the rows of this rank. group: None here means all ranks, as in torch.distributed.
    Raises RuntimeError without a process group.
    """
    handle = handle_of("world" if group is None else group)
    return gather_rows([x], agree([x], ["x"], handle, lambda: checks.is_tensor(x, "x"), "gather"), handle)[0]


# compiled ranks could order their collectives each in its own way, and wait for each other
eager = torch.compiler.disable(reason="ranks compare shapes on the host and send in one order")


@eager
def gather_rows(tensors, rows, handle) -> list[torch.Tensor | None]:
    """`gather` of several tensors, `rows` of them on each rank; None stays None."""
    return [None if t is None else _Gather.apply(t, rows, handle) for t in tensors]


@eager
def sum_over(x: torch.Tensor, handle) -> torch.Tensor:
    """The sum of x over the ranks, on every rank; differentiable."""
    return _Sum.apply(x, handle)


def handle_of(group: object):
    """The process group that `group` names; RuntimeError where there is none."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise RuntimeError(
            f"group is {group!r}, and torch.distributed is not initialised: call torch.distributed.init_process_group "
            "first, or pass group=None for one process"
        )
    check_group(group)
    return torch.distributed.group.WORLD if isinstance(group, str) else group


def check_group(group: object) -> None:
    """Refuses what names no group; None is this process alone."""
    if isinstance(group, str):
        if group != "world":
            raise ValueError(f"group is {group!r}: give None, 'world' or a torch.distributed.ProcessGroup")
    elif group is not None and not (
        torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup)
    ):
        raise TypeError(f"group is {group!r}: give None, 'world' or a torch.distributed.ProcessGroup this rank is in")


class Held:
    """A process group as a module holds it: copies of the module share the group, a pickle of it is refused.

    A group cannot be written to a file, and a module that came back without it would silently compute another number.
    """

    def __init__(self, group):
        check_group(group)
        self.group = group

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        raise TypeError(
            "group is a ProcessGroup, which no pickle can hold: save the state_dict (it needs no group), or make the "
            "loss with group='world' (a metric with process_group=None), which can be pickled"
        )


class Agreed(NamedTuple):
    """A group whose ranks have compared what they hold, and the rows of each; an op given it as `group=` asks no more.

    Loss modules compare all levels once (`compare`) and hand one of these to the op of each level.
    """

    handle: ProcessGroup
    rows: list[int]

    @property
    def total(self) -> int:
        """Rows on all ranks."""
        return sum(self.rows)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return sum_over(x, self.handle)

    def gather(self, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
        return gather_rows(tensors, self.rows, self.handle)

    def rows_at(self, places: torch.Tensor, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
        """The rows at `places`, ascending and on the host, among those of all ranks; without a gradient."""
        starts = torch.tensor([0, *self.rows], device=places.device).cumsum(0)
        cuts, rank = torch.searchsorted(places, starts).tolist(), torch.distributed.get_rank(self.handle)
        own = places[cuts[rank] : cuts[rank + 1]] - starts[rank]
        mine = [None if t is None else t.detach()[own.to(t.device)] for t in tensors]
        return gather_rows(mine, [b - a for a, b in zip(cuts, cuts[1:], strict=False)], self.handle)


GroupLike: TypeAlias = Literal["world"] | ProcessGroup | Agreed | None


def agree(tensors, names, handle, check=lambda: None, call: str = "", options=None) -> list[int]:
    """Rows on each rank, after all have compared what they hold: one error on every rank, and no deadlock later.

    A rank whose `check` raises tells the others before it does. Tensors may be None, on all ranks alike. `call` and
    `options` as in `compare`. The host reads the answer.
    """

    def prepare():
        check()
        return None, dict(zip(names, tensors, strict=True))

    _, found = compare(prepare, handle, call, options)
    rows = found[names[0]]
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is not None and found[name] != rows:
            raise ValueError(
                f"{name} has not the rows of {names[0]} on every rank: {found[name]}; {names[0]} has {rows}"
            )
    return rows


def agreed(tensors, names, group, check=lambda: None, call: str = "", options=None) -> Agreed:
    """What an op's `group=` stands for: `agree`, unless a loss module has asked for all its levels already."""
    if isinstance(group, Agreed):
        return group
    handle = handle_of(group)
    return Agreed(handle, agree(tensors, names, handle, check, call, options))


def rows_first(t):
    """[G, n, p] as [n, G, p] and back, [G, n] as [n, G]; [n, p] and [n] have no groups."""
    grouped = isinstance(t, torch.Tensor) and (t.dim() == 3 or (t.dim() == 2 and t.dtype == torch.bool))
    return t.transpose(0, 1) if grouped else t


@eager
def compare(prepare, handle, call: str = "", options=None):
    """What `prepare` makes, and {name: rows on each rank} of the tensors it names; the ranks compare them all at once.

    prepare() -> (anything, {name: tensor or None}). Whatever it raises, the other ranks are told and raise too, so that
    nobody waits for a rank that is gone. But for their rows the tensors of a name must be alike on all ranks, so must
    the number of names, `call`, which says in words what the caller computes, and `options`, a module or whatever
    `worded` takes. One message of 224 bytes a rank, and one of 56 for each name after the third; the host reads them.
    """
    made, named, described, how, error = None, {}, [], "", None
    try:
        made, named = prepare()
        described, how = [_described(t, name) for name, t in named.items()], worded(options)
    except Exception as own:  # of any kind: it is raised below, once the others know
        error = own
    padding = [-1] * (_WIDTH - 4)
    texts = [zlib.crc32(text.encode()) for text in (call, how)]
    header = [_REFUSED if error is not None else 0, len(described), *texts, *padding]
    first = [header, *described[:_AT_ONCE]]
    table = _exchange(first + [[-1] * _WIDTH] * (1 + _AT_ONCE - len(first)), handle)
    if error is not None:
        raise error
    refused = [i for i, rank in enumerate(table) if rank[0][0] == _REFUSED]
    if refused:
        raise ValueError(
            f"{next(iter(named))}: rank {refused[0]} of the group refused its arguments; its own error says why"
        )
    for i, rank in enumerate(table):
        if rank[0][:3] != header[:3]:
            here = f"{call or 'its call'} of {len(named)} tensors"
            there = "another call" if rank[0][1] == header[1] else f"{rank[0][1]} tensors"
            raise ValueError(
                f"{next(iter(named))}: rank {i} of the group has {there}, this rank has {here}: every rank makes the "
                "same call, with as many levels"
            )
    entries = [rank[1 : 1 + len(described)] for rank in table]
    if len(described) > _AT_ONCE:
        rest = _exchange(described[_AT_ONCE:], handle)
        entries = [one + more for one, more in zip(entries, rest, strict=True)]
    for k, name in enumerate(named):
        if len({(rank[k][0], *rank[k][2:]) for rank in entries}) > 1:
            found = "; ".join(f"rank {i} has {_words(rank[k])}" for i, rank in enumerate(entries))
            raise ValueError(f"{name} differs between the ranks of the group: {found}. Only the rows may differ")
    for i, rank in enumerate(table):
        if rank[0][3] != header[3]:
            raise ValueError(
                f"{next(iter(named))}: rank {i} of the group has other options, this rank has {call}: {how}; every "
                "rank makes the same call"
            )
    return made, {name: [rank[k][1] for rank in entries] for k, name in enumerate(named)}


def worded(value, depth: int = 4) -> str:
    """Options as a text that is the same on every rank: no address, and of tensors the sizes, of a bandwidth its values
    (on a GPU the host waits for them, as it then does for what the ranks say).
    """
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)}{' with a gradient' if value.requires_grad else ''}"
    if value is None or isinstance(value, (str, numbers.Number, torch.dtype)):
        return repr(value)
    if isinstance(value, torch.nn.Module):
        return ", ".join(f"{name}={text}" for name, text in _module_worded(value, depth))
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(worded(one, depth) for one in value)}]"
    if not isinstance(value, dict):
        name = getattr(value, "__qualname__", None)
        if name is not None or not depth:
            return name or type(value).__name__
        return f"{type(value).__name__}({worded(_public(value), depth - 1)})"
    texts = {key: worded(one, depth) for key, one in value.items()}
    if isinstance(value.get("sigma"), torch.Tensor):
        texts["sigma"] += f" {value['sigma'].tolist()}"
    return ", ".join(f"{key}={text}" for key, text in texts.items())


def _public(value) -> dict:
    return {name: one for name, one in getattr(value, "__dict__", {}).items() if name[0] != "_" and name != "training"}


def _module_worded(module, depth: int):
    """What its constructor and those of its parts have set; of the sums they hold, the sizes."""
    for path, part in module.named_modules():
        held = {**_public(part), **part._buffers, **part._parameters}
        for name, value in held.items():
            text = worded(value, depth)
            if "weight" in name and name in part._buffers and value is not None and value.device.type == "cpu":
                text = str(value.tolist())
            yield f"{path}.{name}".lstrip("."), text


def _exchange(table, handle) -> list[list[list[int]]]:
    """The table of every rank, [n][7] integers each."""
    # a device of the group, not of a tensor: a rank that refused its arguments may have none
    on_cpu = "cpu:" in torch.distributed.get_backend_config(handle)
    device = torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator()
    mine = torch.tensor(table, device=device)
    everyone = mine.new_empty(torch.distributed.get_world_size(handle), *mine.shape)
    _all_gather(everyone.view(-1, mine.shape[-1]), mine, handle)
    return everyone.tolist()


def _described(t, name: str) -> list[int]:
    """dtype and whether it gets a gradient, rows, the sizes of a row."""
    if t is None:
        return [-1] * _WIDTH
    if t.dim() == 0 or t.dim() > _MOST_DIMS:
        raise ValueError(f"{name} has shape {tuple(t.shape)}: a rank sends rows of 0 to {_MOST_DIMS - 1} dimensions")
    if t.dtype not in _DTYPES:
        raise TypeError(f"{name} is {t.dtype}: ranks send {', '.join(map(str, _DTYPES))}")
    kind = _DTYPES.index(t.dtype) + len(_DTYPES) * (t.requires_grad and torch.is_grad_enabled())
    return [kind, *t.shape, *[-1] * (_MOST_DIMS - t.dim())]


def _words(described) -> str:
    if described[0] < 0:
        return "None"
    shape = [size for size in described[1:] if size >= 0]
    learns, kind = divmod(described[0], len(_DTYPES))
    return f"{str(_DTYPES[kind]).removeprefix('torch.')} {shape}{' with a gradient' if learns else ''}"


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


class _Scatter(torch.autograd.Function):
    """The sum over the ranks of the rows that came from this one."""

    @staticmethod
    def forward(grad, rows, handle):
        longest, own = max(rows), rows[torch.distributed.get_rank(handle)]
        sent = torch.cat([_padded(part, longest) for part in grad.split(rows)])
        out = grad.new_empty(longest, *grad.shape[1:])
        _reduce_scatter(out, sent, handle)
        return out[:own]

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.rows, ctx.handle = inputs

    @staticmethod
    def backward(ctx, grad):
        return _Gather.apply(grad, ctx.rows, ctx.handle), None, None


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
