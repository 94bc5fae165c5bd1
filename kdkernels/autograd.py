# SPDX-License-Identifier: Apache-2.0
"""What every differentiable op shares: the shortest way from a public call to its implementation that is still correct.

An operator registered with `torch.library` is what compilers, transforms and profilers need to see; in a plain eager
call its dispatch only costs time (7 us forward, 10 us backward on two slow cores). So an op calls its implementation
directly when `plain` says that nobody is watching. And the dtype of the work: half precision is computed in float32,
float64 stays what it is, whatever autocast says.
"""

from __future__ import annotations

import contextlib

import torch
from torch.autograd import forward_ad

_PLAIN = (torch.Tensor, torch.nn.Parameter)
# private names: where one is missing, the answer is the one that takes the general way
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_profiling = getattr(torch._C._autograd, "_profiler_enabled", lambda: True)
_legacy_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda tensor: True)


def plain(*tensors: torch.Tensor | None) -> bool:
    """Eager; no transform, tangent, mode, profiler, subclass or meta tensor: the operator may be left out."""
    if torch.compiler.is_compiling() or _transforms_active() or _modes() or _profiling():
        return False
    if forward_ad._current_level >= 0:
        return False
    for tensor in tensors:  # `all` of a generator takes twice the time
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_meta):
            return False
    return True


def apply(function: type[torch.autograd.Function], *arguments):
    """`function.apply`, which binds a signature anew in each call; only torch.func needs that."""
    if torch.compiler.is_compiling() or _transforms_active():
        return function.apply(*arguments)
    return applied(function)(*arguments)


def applied(function: type[torch.autograd.Function]):
    """`apply` of a function, for calls that are `plain`."""
    return super(torch.autograd.Function, function).apply


def in_transform() -> bool:
    """Eager, inside torch.func or torch.vmap; the compiler takes transforms apart before it runs anything."""
    return not torch.compiler.is_compiling() and _transforms_active()


def in_forward_mode() -> bool:
    """Whether a tensor may have a tangent: inside `torch.func.jvp` or `forward_ad.dual_level`."""
    if torch.compiler.is_dynamo_compiling():
        return _traced_in_forward_mode()
    return forward_ad._current_level >= 0


# as a constant: a guard on the level would be checked outside of it, and fail
@torch.compiler.assume_constant_result
def _traced_in_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def in_traced_gradient() -> bool:
    """While Dynamo traces: whether this is inside `torch.func.grad`, where tensors do not say that they require one."""
    return torch.compiler.is_dynamo_compiling() and _traced_in_gradient()


@torch.compiler.assume_constant_result
def _traced_in_gradient() -> bool:
    levels = getattr(torch._C._functorch, "get_interpreter_stack", lambda: None)() or ()
    return any(level.key().name == "Grad" for level in levels)


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether this is an upstream gradient of `torch.autograd.grad(..., is_grads_batched=True)`."""
    return _legacy_batched(tensor)


def ordinary(tensors):
    """Tensors that autograd can save: copies of those made under `torch.inference_mode()`, all others as they are."""
    if torch.compiler.is_compiling():
        frozen = [t is not None and not t.requires_grad for t in tensors]  # Dynamo knows what has been looked at
        return tuple(map(_copied_in_graph, tensors)) if any(frozen) and _traced_from_inference() else tensors
    for t in tensors:
        if t is not None and t.is_inference():
            return tuple(t.clone() if t is not None and t.is_inference() else t for t in tensors)
    return tensors


def _copied_in_graph(t):
    """By an operator: a compiler makes a plain copy again in backward, from the tensor that cannot be saved."""
    return t if t is None or t.requires_grad else torch.ops.kdkernels.ordinary(t)


@torch.compiler.assume_constant_result
def _traced_from_inference() -> bool:
    """While Dynamo traces: whether a tensor that goes into the graph was made under inference mode; guards see to it
    that one which differs is traced anew. The tensors in between cannot be asked."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        nodes = InstructionTranslator.current_tx().output.root_tracer.graph.nodes
        given = [node.meta["grapharg"].example for node in nodes if "grapharg" in node.meta]
    except (ImportError, AttributeError):  # private names
        return False
    return any(isinstance(t, torch.Tensor) and t.is_inference() for t in given)


def in_pytorch(run, tensors, *how):
    """`run(*tensors, *how)`, which is plain PyTorch: nothing is rounded inside, and autograd can save all it reads."""
    with without_autocast(device_type(tensors[0])):
        return run(*(ordinary(tensors) if torch.is_grad_enabled() else tensors), *how)


SECOND = "the second derivative of this op is not written out: pass backend='reference' for it"


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
        raise RuntimeError(SECOND)


def register(name: str, schema: str, function, fake):
    """An operator `kdkernels::name` of fixed arity, with one Python implementation for every device."""
    name = f"kdkernels::{name}"
    torch.library.define(name, schema)
    for device in ("CPU", "CUDA"):
        torch.library.impl(name, device)(function)
    torch.library.register_fake(name)(fake)


register("ordinary", "(Tensor x) -> Tensor", torch.clone, torch.empty_like)


_NOTHING = contextlib.nullcontext()  # one that Dynamo knows


def at_least_float32(*tensors: torch.Tensor | None) -> torch.dtype:
    """The promoted dtype of the tensors, float32 at least; None has no say."""
    dtype = torch.float32
    for tensor in tensors:
        # most often they agree: a comparison costs a fraction of a call into torch, and every operator asks
        if tensor is not None and tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def without_autocast(device: str):
    """Products inside keep the dtype they are given: autocast would round centred float32 rows to bfloat16."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _NOTHING


def device_type(tensor: torch.Tensor) -> str:
    """`tensor.device.type`, which builds two objects, in a third of the time."""
    return "cuda" if tensor.is_cuda else "cpu" if tensor.is_cpu else tensor.device.type


def device_name(tensor: torch.Tensor) -> str:
    """`str(tensor.device)`: of a GPU which one, too."""
    return "cpu" if tensor.is_cpu else str(tensor.device)
