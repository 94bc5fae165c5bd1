# SPDX-License-Identifier: Apache-2.0
"""One maker of differentiable operators: from three functions to a pair `kdkernels::NAME_fwd`, `kdkernels::NAME_bwd`.

A family writes what is computed: `forward`, `backward` and the shapes of a `fake`. The maker adds what is the same for
all: schemas, autograd, dispatch, no autocast inside, vmap, forward mode, teachers made under inference mode, and the
refusal of second derivatives. A derivative is right or an error, never silently 0.

In a plain eager call nobody watches (`autograd.plain`): then the operator is left out, whose dispatch costs 7 us
forward and 10 us backward on two slow cores, and with it all that only a transform or a compiler needs.
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
    in_traced_gradient,
    is_batched,
    ordinary,
    plain,
    register,
    without_autocast,
)
from .checks import explained


class Operator(NamedTuple):
    """What `operator` makes; all but `value` are below autograd.

    value(*tensors, *how): with gradients and tangents. forward(*tensors, *how, need) -> (value, *kept).
    backward(grad, *read, *kept, *how, need) -> gradients. over_ranks(forward) -> value(*tensors, *how, group).
    settled(plan, *tensors) -> value, of tensors that are `plain`: see `_types.Plan`.
    """

    value: Callable
    settled: Callable
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
    tangent: Callable | None = None,
) -> Operator:
    """The pair of operators `name`, differentiable once, in both modes.

    tensors: names of what goes in, "x y mask?" (`?`: may be None). how: the rest, in the words of a schema, "str kind,
    bool mean". kept: what forward makes for backward; "value", the first of them, is the value itself.
    wanted: the tensors that may get a gradient, bit by bit of `need`, the last argument of all functions. A gradient is
    contiguous, of the shape and dtype of its tensor, or of what is named behind a colon, among `read` and `kept`:
    "x:slope"; "x:x=": in its layout too.
    read: the tensors that backward reads, by default all; "x~": only where its own gradient is asked for. Where one of
    `wanted` is missing, the last of `kept` is floating.

        forward(*tensors, *how, need) -> (value, *kept)
        backward(grad, *read, *kept, *how, need) -> a gradient for each of `wanted`; not looked at where not asked for
        fake(*tensors, *how, need) -> (value, *kept), of the right shapes, dtypes and strides
        tangent(run, tangents, value, saved, how) -> the value's tangent, or None where there is no rule; tangents (or
            None) of `wanted`, run(upstream, *saved, *how) -> gradients

    Without `tangent`, the rule of forward mode is that of one number: the sum of each gradient times its tangent.
    """
    words = _words(tensors, how, kept, wanted, tensors if read is None else read)
    halves = _registered(name, words, forward, backward, fake)
    Function, Dual, Eager = _functions(name, words, halves, tangent or of_rows())
    count, places, run_forward, eager = words.count, words.places, halves.run_forward, applied(Eager)

    def asked(a):
        need = 0
        if torch.is_grad_enabled():
            for bit, place in places:
                t = a[place]
                need |= (t is not None and t.requires_grad) << bit
        return need

    def by_plan(plan, *tensors):
        return eager(plan, *ordinary(tensors))[0] if plan.how[-1] else plan.forward(*tensors)[0]

    settled = explained(name, by_plan)

    def value(*a):
        if plain(*a[:count]):
            return settled(_Unsettled(halves, (*a[count:], asked(a))), *a[:count])
        if in_traced_gradient():
            torch._dynamo.graph_break(msg=f"torch.func.grad of {name}")
        if not in_forward_mode():
            need = asked(a)
            if not need:
                return run_forward(*a, 0)[0]
            return apply(Function, *ordinary(a[:count]), *a[count:], need)[0]
        if torch.compiler.is_dynamo_compiling():
            torch._dynamo.graph_break(msg=f"forward-mode differentiation of {name}")
        need = 0  # a tensor with a tangent asks for no gradient
        for bit, place in places:
            need |= (a[place] is not None) << bit
        return apply(Dual, *ordinary(a[:count]), *a[count:], need)[0]

    def over_ranks(forward):
        """`value` by forward(*tensors, *how, need, group), which speaks to the other ranks of the group."""
        OverRanks = _over_ranks(Function, forward)

        def value(*a):
            *a, group = a
            if in_forward_mode():
                raise RuntimeError(f"{name}: with group= there is no forward-mode differentiation")
            need = asked(a)
            run = OverRanks.apply if need else OverRanks.forward
            return run(*ordinary(a[:count]), *a[count:], need, group)[0]

        return value

    return Operator(value, settled, run_forward, halves.run_backward, over_ranks)


def of_rows(*bits: int) -> Callable:
    """The rule of forward mode where entry i of the value depends on entry i, along the first dimensions, of tensors.

    bits: which of the tensors that get a gradient these are; the others may move only where the value is one number.
    """

    def tangent(run, tangents, value, saved, how):
        for bit, t in enumerate(tangents):
            if t is not None and value.dim() and (bit not in bits or t.shape[: value.dim()] != value.shape):
                return None
        dtype, total = value.dtype, torch.zeros_like(value)
        for g, t in zip(run(torch.ones_like(value), *saved, *how), tangents, strict=True):
            if t is not None:
                total = total + (g.to(dtype) * t.to(dtype)).reshape(*value.shape, -1).sum(-1)
        return total

    return tangent


class _Words(NamedTuple):
    """Where everything stands that `operator` is told of by name."""

    names: tuple  # of the tensors that go in
    count: int  # of them
    places: tuple  # (bit of `need`, place) of each that may get a gradient
    reads: tuple  # (place, the bit of `need` that its being read depends on, or -1) of each that backward reads
    first_kept: int  # its place in what forward gives: 0 where that is the value itself
    held: int  # tensors among backward's arguments
    alike: tuple  # (the place among them of what each gradient has the shape of, whether it has its layout too)
    schema_fwd: str
    schema_bwd: str


def _words(tensors: str, how: str, kept: str, wanted: str, read: str) -> _Words:
    inputs, kept = tensors.split(), kept.split()
    wants, like = zip(*(word.split(":") if ":" in word else (word, word) for word in wanted.split()), strict=True)
    reads = [f"{r}?" if f"{r}?" in inputs else r for r in read.split()]
    names, read_names = _bare(inputs), _bare(reads)
    given = [*read_names, *kept]
    rest = [*filter(None, [how]), "int need"]
    return _Words(
        names=tuple(names),
        count=len(names),
        places=tuple((bit, names.index(w)) for bit, w in enumerate(wants)),
        reads=tuple(
            (names.index(r), wants.index(r) if mark.endswith("~") else -1)
            for r, mark in zip(read_names, reads, strict=True)
        ),
        first_kept=0 if kept[:1] == ["value"] else 1,
        held=1 + len(given),
        alike=tuple((1 + given.index(n.rstrip("=")), n.endswith("=")) for n in like),
        schema_fwd=f"({_spelled(inputs, rest)}) -> ({_spelled(dict.fromkeys(['value', *kept]))})",
        schema_bwd=f"({_spelled(['grad', *reads, *kept], rest)}) -> ({_spelled([f'd_{w}' for w in wants])})",
    )


def _bare(words) -> list[str]:
    return [word.rstrip("?~") for word in words]


def _spelled(words, rest=()) -> str:
    """Tensors, those that may be None with a mark, in the words of a schema."""
    marked = [f"Tensor{'?' if word[-1] in '?~' else ''} {name}" for word, name in zip(words, _bare(words), strict=True)]
    return ", ".join([*marked, *rest])


class _Halves(NamedTuple):
    """Both directions below autograd: `here` runs them, `run` does so by way of the operator where somebody watches."""

    forward_here: Callable
    run_forward: Callable
    backward_here: Callable
    run_backward: Callable


class _Unsettled(NamedTuple):
    """The plan of a call that knows its implementation alone."""

    halves: _Halves
    how: tuple

    def forward(self, *tensors):
        return self.halves.forward_here(*tensors, *self.how)

    def backward(self, *a):
        return self.halves.backward_here(*a, *self.how)


def _registered(name: str, words: _Words, forward, backward, fake) -> _Halves:
    fwd, bwd = f"{name}_fwd", f"{name}_bwd"
    count, held, alike = words.count, words.held, words.alike

    def forward_here(*a):
        with without_autocast(device_type(a[0])):
            return forward(*a)

    def backward_here(*a):
        with without_autocast(device_type(a[0])):
            return tuple(backward(*a))

    def backward_registered(*a):  # an operator has no None to give, and nothing that it was given
        need, found = a[-1], backward_here(*a)
        own = [g.clone() if g is not None and any(g is t for t in a) else g for g in found]
        return tuple(g if need >> bit & 1 and g is not None else a[0].new_empty(0) for bit, g in enumerate(own))

    def backward_fake(*a):
        need, found = a[-1], []
        for bit, (place, layout) in enumerate(alike):
            t = a[place]
            made = torch.empty_like if layout else lambda t: t.new_empty(t.shape)
            found.append(made(t) if t is not None and need >> bit & 1 else a[0].new_empty(0))
        return tuple(found)

    forward_watched = _registered_one(fwd, words.schema_fwd, forward_here, fake)
    backward_watched = _registered_one(bwd, words.schema_bwd, backward_registered, backward_fake)

    def run_forward(*a):
        return (forward_here if plain(*a[:count]) else forward_watched)(*a)

    def run_backward(*a):
        direct = plain(*a[:held]) and not is_batched(a[0])
        return (backward_here if direct else backward_watched)(*a)

    return _Halves(forward_here, run_forward, backward_here, run_backward)


def _registered_one(name: str, schema: str, function, fake):
    """The operator `name`, giving a tuple as its function does: a schema of one result has none."""
    if schema.split("->")[1].count("Tensor ") > 1:
        register(name, schema, function, fake)
        return lambda *a: getattr(torch.ops.kdkernels, name)(*a)
    register(name, schema, lambda *a: function(*a)[0], lambda *a: fake(*a)[0])
    return lambda *a: (getattr(torch.ops.kdkernels, name)(*a),)


def _functions(name: str, words: _Words, halves: _Halves, tangent):
    """Three faces of one Function: what transforms and compilers see, that of forward mode, that of a plain call."""
    names, count, places, reads, first_kept = words.names, words.count, words.places, words.reads, words.first_kept
    run_forward, run_backward = halves.run_forward, halves.run_backward
    conditional = any(bit >= 0 for _, bit in reads)
    all_read = [place for place, _ in reads] == list(range(count))
    learns = {place for _, place in places}
    # a second derivative finds its way to the refusal through the inputs, if all are saved, else through what is kept
    kept_shown = bool(first_kept and words.held > 1 + len(reads) and learns - {place for place, _ in reads})

    def to_read(inputs, need):
        if conditional:
            return [inputs[place] if bit < 0 or need >> bit & 1 else None for place, bit in reads]
        return inputs[:count] if all_read else [inputs[place] for place, _ in reads]

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

    class DualGradient(Gradient):  # apart, as Dynamo takes no Function that has a jvp
        generate_vmap_rule = True

        @staticmethod
        def jvp(ctx, *_):
            raise RuntimeError(SECOND)

    class Function(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*a):
            return run_forward(*a)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.how, need = inputs[count:], inputs[-1]
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*to_read(inputs, need), *output[first_kept:])

        @staticmethod
        def backward(ctx, grad, *_):
            how, size = ctx.how, count + len(ctx.how)
            if grad is None:  # the value was not used
                return (None,) * size
            run = run_backward
            if torch.is_grad_enabled():
                run = (DualGradient if in_forward_mode() else Gradient).apply
            return spread(run(grad, *ctx.saved_tensors, *how), how[-1], size)

    class Dual(Function):
        generate_vmap_rule = True

        @staticmethod
        def setup_context(ctx, inputs, output):
            Function.setup_context(ctx, inputs, output)
            ctx.save_for_forward(*to_read(inputs, inputs[-1]), *output)

        @staticmethod
        @torch.compiler.disable
        def jvp(ctx, *tangents):
            for place, t in enumerate(tangents[:count]):
                if t is not None and place not in learns:
                    raise RuntimeError(f"{name}: {names[place]} has a tangent, and the op no derivative for it")
            saved, moved = ctx.saved_tensors, [tangents[place] for _, place in places]
            read, (value, *made) = saved[: len(reads)], saved[len(reads) :]
            kept = saved[len(reads) + first_kept :]
            found = tangent(DualGradient.apply, moved, value, (*read, *kept), ctx.how)
            if found is None:
                raise RuntimeError(
                    f"{name}: forward-mode differentiation of this call is not written out: pass backend='reference'"
                )
            # zeros: what is kept moves with the inputs, and a derivative of the gradient in forward mode has to know
            return found, *(torch.zeros_like(k) if k.is_floating_point() else None for k in made)

    def gradients(ctx, grad, *_):
        plan = ctx.plan
        if grad is None or torch.is_grad_enabled() or not plain(grad) or is_batched(grad):
            ctx.how = plan.how
            return None, *Function.backward(ctx, grad)[:count]
        return None, *spread(plan.backward(grad, *ctx.saved_tensors), plan.how[-1], count)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, plan, *tensors):
            made, ctx.plan = plan.forward(*tensors), plan
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*to_read(tensors, plan.how[-1]), *made[first_kept:])
            return (made[0], made[-1]) if kept_shown else (made[0],)

        backward = staticmethod(explained(name, gradients))

    for one in (Gradient, DualGradient, Function, Dual, Eager):
        one.__name__ = one.__qualname__ = f"{name}_{one.__name__}"
    return Function, Dual, Eager


def _over_ranks(Function, forward):
    """`Function` with a group as its last argument, and a forward over it.

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

    return OverRanks
