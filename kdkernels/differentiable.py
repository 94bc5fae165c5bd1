# SPDX-License-Identifier: Apache-2.0
"""One maker of differentiable operators: from three functions to a pair `kdkernels::NAME_fwd`, `kdkernels::NAME_bwd`.

A family writes what is computed: `forward`, `backward` and the shapes of a `fake`. The maker adds what is the same for
all: schemas, fakes, autograd, dispatch, no autocast inside, vmap, forward mode, teachers made under inference mode, and
the refusal of second derivatives. Values, never silence: a derivative is right or an error.

In a plain eager call nobody watches (`plain`): the operator is left out, whose dispatch costs 7 us forward and 10 us
backward on two slow cores, and so is all that only a transform or a compiler needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .autograd import (
    SECOND,
    NoSecondDerivative,
    applied,
    apply,
    device_type,
    in_forward_mode,
    is_batched,
    ordinary,
    plain,
    register,
    without_autocast,
)


class Operator(NamedTuple):
    """What `operator` makes; all but `value` are below autograd.

    value(*tensors, *how): with gradients and tangents. forward(*tensors, *how, need) -> (value, *kept).
    backward(grad, *read, *kept, *how, need) -> gradients. over_ranks(forward) -> value(*tensors, *how, group).
    """

    value: Callable
    forward: Callable
    backward: Callable
    over_ranks: Callable


def operator(
    name: str,
    tensors: str,
    how: str,
    kept: str,
    *,
    wanted: str,
    forward: Callable,
    backward: Callable,
    fake: Callable,
    read: str | None = None,
    like: str | None = None,
    tangent: Callable | None = None,
) -> Operator:
    """The pair of operators `name`, differentiable once, in both modes.

    tensors: names of the tensors that go in, "x y mask?" (`?`: may be None). how: the rest, in the words of a schema,
    "str kind, bool mean". kept: names of the tensors that forward makes for backward. wanted: the tensors that may get
    a gradient, bit by bit of `need`, the last argument of all functions. read: the tensors that backward reads, by
    default all; "x~": only where its own gradient is asked for. like: what each gradient has the shape and dtype of,
    a name among `read` and `kept`, by default that of the tensor itself; "x=": and its layout, else it is contiguous.

        forward(*tensors, *how, need) -> (value, *kept)
        backward(grad, *read, *kept, *how, need) -> a gradient for each of `wanted`; not looked at where not asked for
        fake(*tensors, *how, need) -> (value, *kept), of the right shapes, dtypes and strides
        tangent(run, tangents, read, kept, how) -> the value's tangent, or None where there is no rule

    Without `tangent`, the rule of forward mode is that of one number: the sum of each gradient times its tangent.
    """
    names = [t.removesuffix("?") for t in tensors.split()]
    read = tensors if read is None else read
    kept_names = kept.split()
    count = len(names)
    wants = wanted.split()
    places = tuple((bit, names.index(w)) for bit, w in enumerate(wants))
    # with the bit of `need` that a tensor's being read depends on, or -1
    reads = tuple(
        (names.index(r.rstrip("?~")), wants.index(r.rstrip("?~")) if r.endswith("~") else -1) for r in read.split()
    )
    conditional = any(bit >= 0 for _, bit in reads)
    # a second derivative finds its way to the refusal through an input that is saved, or else through what is kept
    outputs_kept = not {place for _, place in places} & {place for place, _ in reads}
    given = [r.rstrip("?~") for r in read.split()] + kept_names
    held = 1 + len(given)
    alike = tuple((given.index(n.rstrip("=")), n.endswith("=")) for n in (like or wanted).split())
    fwd, bwd = f"{name}_fwd", f"{name}_bwd"

    def fwd_here(*a):
        with without_autocast(device_type(a[0])):
            return forward(*a)

    def bwd_here(*a):
        with without_autocast(device_type(a[0])):
            return tuple(backward(*a))

    def bwd_registered(*a):
        return tuple(
            g if a[-1] >> bit & 1 and g is not None else a[0].new_empty(0) for bit, g in enumerate(bwd_here(*a))
        )

    def bwd_fake(*a):
        need, out = a[-1], []
        for bit, (place, layout) in enumerate(alike):
            t = a[1 + place]
            asked = t is not None and need >> bit & 1
            made = torch.empty_like if layout else lambda t: t.new_empty(t.shape)
            out.append(made(t) if asked else a[0].new_empty(0))
        return tuple(out)

    def spelled(words):
        return ", ".join(f"Tensor{'?' if w[-1] in '?~' else ''} {w.rstrip('?~')}" for w in words.split())

    optional = {t.removesuffix("?") for t in tensors.split() if t.endswith("?")}
    read_schema = " ".join(r if r[-1] in "?~" or r not in optional else f"{r}?" for r in read.split())
    rest = f"{how}, int need" if how else "int need"
    inner = ", ".join(part for part in (spelled(read_schema), spelled(kept), rest) if part)
    outputs = ", ".join(["Tensor value", *(f"Tensor {k}" for k in kept_names)])
    gradients = ", ".join(f"Tensor d_{w}" for w in wants)
    register(fwd, f"({spelled(tensors)}, {rest}) -> ({outputs})", fwd_here, fake)
    register(bwd, f"(Tensor grad, {inner}) -> ({gradients})", bwd_registered, bwd_fake)

    def run_forward(*a):
        return (fwd_here if plain(*a[:count]) else getattr(torch.ops.kdkernels, fwd))(*a)

    def run_backward(*a):
        direct = plain(*a[:held]) and not is_batched(a[0])
        return (bwd_here if direct else getattr(torch.ops.kdkernels, bwd))(*a)

    def eager_backward(*a):  # what is saved is as it was in the forward pass
        direct = plain(a[0]) and not is_batched(a[0])
        return (bwd_here if direct else getattr(torch.ops.kdkernels, bwd))(*a)

    def to_read(inputs, need):
        """What backward reads of the inputs."""
        if conditional:
            return [inputs[place] if bit < 0 or need >> bit & 1 else None for place, bit in reads]
        return [inputs[place] for place, _ in reads]

    def spread(found, need, size):
        """Gradients in the places of the inputs."""
        out = [None] * size
        for bit, place in places:
            if need >> bit & 1:
                out[place] = found[bit]
        return tuple(out)

    class Gradient(NoSecondDerivative):
        @staticmethod
        def forward(*a):
            return run_backward(*a)

    class DualGradient(Gradient):
        """The same inside forward mode; a compiler takes no Function with a `jvp`."""

        generate_vmap_rule = True

        @staticmethod
        def jvp(ctx, *_):
            raise RuntimeError(SECOND)

    class Function(torch.autograd.Function):
        """What transforms and compilers see."""

        generate_vmap_rule = True

        @staticmethod
        def forward(*a):
            return run_forward(*a)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.how, need = inputs[count:], inputs[-1]
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*to_read(inputs, need), *output[1:])

        @staticmethod
        def backward(ctx, grad, *_):
            size = count + len(ctx.how)
            if grad is None:  # the value was not used
                return (None,) * size
            run = run_backward
            if torch.is_grad_enabled():
                run = (DualGradient if in_forward_mode() else Gradient).apply
            return spread(run(grad, *ctx.saved_tensors, *ctx.how), ctx.how[-1], size)

    class Dual(Function):
        """Inside forward mode."""

        generate_vmap_rule = True

        @staticmethod
        def setup_context(ctx, inputs, output):
            Function.setup_context(ctx, inputs, output)
            ctx.save_for_forward(*to_read(inputs, inputs[-1]), *output)

        @staticmethod
        def jvp(ctx, *tangents):
            *saved, how = *ctx.saved_tensors, ctx.how
            value, saved = saved[len(reads)], (*saved[: len(reads)], *saved[len(reads) + 1 :])
            moved, learns = [tangents[place] for _, place in places], dict(places).values()
            for place in range(count):
                if place not in learns and tangents[place] is not None:
                    raise RuntimeError(f"{name}: {names[place]} has a tangent, and the op no derivative for it")
            found = (tangent or _of_one_number)(DualGradient.apply, moved, value, saved, how)
            if found is None:
                raise RuntimeError(
                    f"forward-mode differentiation of {name} is not written out for this call: pass "
                    "backend='reference' for it"
                )
            # of zeros, so that what is kept shows in a derivative of the gradient that it moves
            return found, *(torch.zeros_like(k) if k.is_floating_point() else None for k in saved[len(reads) :])

    class Eager(torch.autograd.Function):
        """The same where nobody watches: one output if that will do, and no question asked twice."""

        @staticmethod
        def forward(ctx, *a):
            value, *saved = fwd_here(*a)
            ctx.how = a[count:]
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*to_read(a, a[-1]), *saved)
            return (value, *saved) if outputs_kept else (value,)

        @staticmethod
        def backward(ctx, grad, *_):
            how, size = ctx.how, count + len(ctx.how)
            if grad is None:
                return (None,) * size
            run = Gradient.apply if torch.is_grad_enabled() else eager_backward
            return spread(run(grad, *ctx.saved_tensors, *how), how[-1], size)

    for one in (Gradient, DualGradient, Function, Dual, Eager):
        one.__name__ = one.__qualname__ = f"{name}_{one.__name__}"

    eager = applied(Eager)

    def asked(a):
        need = 0
        if torch.is_grad_enabled():
            for bit, place in places:
                t = a[place]
                need |= (t is not None and t.requires_grad) << bit
        return need

    def value(*a):
        if plain(*a[:count]):
            need = asked(a)
            if not need:
                return fwd_here(*a, 0)[0]
            return eager(*ordinary(a[:count]), *a[count:], need)[0]
        if not in_forward_mode():
            need = asked(a)
            if not need:
                return getattr(torch.ops.kdkernels, fwd)(*a, 0)[0]
            return apply(Function, *ordinary(a[:count]), *a[count:], need)[0]
        if torch.compiler.is_dynamo_compiling():
            torch._dynamo.graph_break(f"forward-mode differentiation of {name}")
        need = 0
        for bit, place in places:
            need |= (a[place] is not None) << bit
        return apply(Dual, *a, need)[0]

    def over_ranks(forward):
        """value(*tensors, *how, group): as `value`, by forward(*tensors, *how, need, group) over the ranks of a group.

        Each rank holds the value; the gradient of its rows is that of the sum of what all ranks make of it.
        """

        class OverRanks(Function):
            generate_vmap_rule = False

            @staticmethod
            def forward(*a):
                with without_autocast(device_type(a[0])):
                    return forward(*a)

            @staticmethod
            def setup_context(ctx, inputs, output):
                *inputs, ctx.group = inputs
                Function.setup_context(ctx, inputs, output)

            @staticmethod
            def backward(ctx, grad, *unused):
                grad = None if grad is None else ctx.group.sum(grad)
                return *Function.backward(ctx, grad, *unused), None

        OverRanks.__name__ = OverRanks.__qualname__ = f"{name}_over_ranks"

        def value(*a):
            *a, group = a
            if in_forward_mode():
                raise RuntimeError(f"{name}: with group= there is no forward-mode differentiation")
            need = asked(a)
            a = *ordinary(a[:count]), *a[count:]
            return (OverRanks.apply if need else OverRanks.forward)(*a, need, group)[0]

        return value

    return Operator(value, run_forward, run_backward, over_ranks)


def _of_one_number(run, moved, value, saved, how):
    """<gradient, tangent> summed over the tensors that move."""
    if value.dim():
        return None
    return _sums(run(torch.ones_like(value), *saved, *how), moved, value)


def of_rows(*bits):
    """The rule of forward mode where entry i of the value depends on entry i, along the first dimensions, of tensors.

    bits: which of the tensors that get a gradient these are; the others may move only where the value is one number.
    """

    def tangent(run, moved, value, saved, how):
        for bit, t in enumerate(moved):
            if t is not None and value.dim() and (bit not in bits or t.shape[: value.dim()] != value.shape):
                return None
        return _sums(run(torch.ones_like(value), *saved, *how), moved, value)

    return tangent


def _sums(gradients, moved, value):
    dtype, total = value.dtype, torch.zeros_like(value)
    for g, t in zip(gradients, moved, strict=True):
        if t is not None:
            total = total + (g.to(dtype) * t.to(dtype)).reshape(*value.shape, -1).sum(-1)
    return total
