# SPDX-License-Identifier: Apache-2.0
"""What every differentiable op shares: the shortest way from a public call to its implementation that is still correct.

An operator registered with `torch.library` is what compilers, transforms and profilers need to see; in a plain eager
call its dispatch only costs time (7 us forward, 10 us backward on two slow cores). So an op calls its implementation
directly when `plain` says that nobody is watching.
"""

from __future__ import annotations

import torch

_PLAIN = (torch.Tensor, torch.nn.Parameter)
# private names: where one is missing, the answer is the one that takes the general way
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_profiling = getattr(torch._C._autograd, "_profiler_enabled", lambda: True)


def plain(*tensors: torch.Tensor | None) -> bool:
    """Eager; no functorch transform, dispatch mode, profiler or tensor subclass: the operator may be left out."""
    if torch.compiler.is_compiling() or _transforms_active() or _modes() or _profiling():
        return False
    for tensor in tensors:  # `all` of a generator takes twice the time
        if tensor is not None and type(tensor) not in _PLAIN:
            return False
    return True


def apply(function: type[torch.autograd.Function], *arguments):
    """`function.apply`, which binds a signature anew in each call; only torch.func needs that."""
    if torch.compiler.is_compiling() or _transforms_active():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)


def in_transform() -> bool:
    """Eager, inside torch.func or torch.vmap; the compiler takes transforms apart before it runs anything."""
    return not torch.compiler.is_compiling() and _transforms_active()


class NoSecondDerivative(torch.autograd.Function):
    """A backward pass as something that refuses to be differentiated again: its `forward` is that pass.

    With create_graph=True the gradient must carry a graph, if only to say that it has none: dropped silently, a
    gradient penalty would be a constant.
    """

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("the second derivative of this op is not written out: pass backend='reference' for it")


def register(name: str, schema: str, function, fake):
    """An operator `kdkernels::name` of fixed arity, with one Python implementation for every device."""
    name = f"kdkernels::{name}"
    torch.library.define(name, schema)
    for device in ("CPU", "CUDA"):
        torch.library.impl(name, device)(function)
    torch.library.register_fake(name)(fake)


class _Nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


_NOTHING = _Nothing()


def without_autocast(device: str):
    """Products inside keep the dtype they are given: autocast would round centred float32 rows to bfloat16."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _NOTHING


def device_type(tensor: torch.Tensor) -> str:
    """`tensor.device.type`, which builds two objects, in a third of the time."""
    return "cuda" if tensor.is_cuda else "cpu" if tensor.is_cpu else tensor.device.type
