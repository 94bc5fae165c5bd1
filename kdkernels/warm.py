# SPDX-License-Identifier: Apache-2.0
"""`warmup`: what the first call of a training run would otherwise wait for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def warmup(function: Callable, *arguments: Any, **options: Any) -> None:
    """Compiles and loads the kernels of a call and of its backward pass, and leaves everything else as it was.

    A Triton kernel is compiled when it is first called with tensors of a device, dtype and layout, in seconds, and kept
    on disk; in each process it is loaded when it is first called, which the capture of a CUDA graph forbids. A batch of
    another size needs kernels of its own where a schedule changes (64, 128 and 1,024 rows) and where 16 divides one of
    two sizes alone: an epoch's last batch is worth a second `warmup`, with so many rows.

    Args:
        function: an op (`kd.cka`), a loss module, or any function of tensors, compiled or not; it is called once.
        arguments, options: those of a call; what tensors hold does not matter on a GPU, `torch.empty` will do. The
            gradient is that of the tensors that require one, or, where none does, of the first with a float dtype.

    Buffers of a module and the state of random number generators are put back; no `.grad` is written.

    Raises: what the call raises; RuntimeError while a CUDA graph is captured.

    >>> loss = kd.losses.CKALoss(kernel="rbf")
    >>> kd.warmup(loss, torch.empty(32, 16), torch.empty(32, 64))
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a CUDA graph is being captured: call warmup before that")
    tensors = [a for a in (*arguments, *options.values()) if isinstance(a, torch.Tensor)]
    wanted = [t for t in tensors if t.requires_grad] or [t for t in tensors if t.is_floating_point()][:1]
    leaves = {id(t): t.detach().requires_grad_() for t in wanted}
    given = lambda a: leaves.get(id(a), a)  # noqa: E731
    buffers = [(b, b.clone()) for b in function.buffers()] if isinstance(function, torch.nn.Module) else []
    with torch.random.fork_rng(devices={t.device.index for t in tensors if t.is_cuda}):
        try:
            value = function(*map(given, arguments), **{name: given(a) for name, a in options.items()})
            found = [v for v in _flat(value) if v.requires_grad]
            if found and leaves:
                torch.autograd.grad([v.sum() for v in found], list(leaves.values()), allow_unused=True)
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def _flat(value) -> list[torch.Tensor]:
    """The tensors of a result: itself, or those of a tuple or a dict of results."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [t for part in parts for t in _flat(part)]
