# SPDX-License-Identifier: Apache-2.0
"""Checks of the contract about PyTorch itself: what transforms, modes and compilers make of a call is right or refused.

A derivative that is not written out is an error which says so, never 0. The textbook is plain PyTorch: asked of it are
its second derivative, and teachers made under inference mode.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Iterator

import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from .case import Outcome
from .probe import Probe, Result, probe_of
from .yardstick import doubled

SECOND, FORWARD = "second derivative", "forward-mode differentiation"  # what a refusal has in it


def _refusal(error: RuntimeError, *words: str) -> bool:
    return any(word in str(error) for word in words) and "backend='reference'" in str(error)


def _verdict(check: str, probe: Probe, how: str, ok: bool, note: str) -> Result:
    return Result(
        check, f"{probe.case.name} {how}".rstrip(), 0.0 if ok else math.inf, 0.0, ok, note[:300].replace("\n", " ")
    )


def _number(probe: Probe, names):
    """(sum(upstream * value), value) as a function of these inputs, the rest fixed."""

    def f(*leaves):
        with probe.case.context():
            value = probe.case.call(probe.inputs | dict(zip(names, leaves, strict=True)), probe.backend)
        return (probe.upstream.detach() * value).sum(), value

    return f


def _leaves(probe: Probe):
    """`_number` of all that gets a gradient, and these inputs."""
    return _number(probe, probe.case.leaves), tuple(probe.inputs[name] for name in probe.case.leaves)


def _differentiable(check):
    """Of a check that has nothing to ask where an op has no gradient."""

    @functools.wraps(check)
    def checked(probe: Probe) -> Iterator[Result]:
        if probe.case.gradient:
            yield from check(probe)

    return checked


@_differentiable
def second_derivative(probe: Probe) -> Iterator[Result]:
    """It is refused, in reverse over reverse and in forward over reverse, also where the upstream gradient is fixed.

    The textbook has it: in float64 along one direction, it is the difference of two gradients.
    """
    if probe.case.linear:
        return
    if probe.backend == "reference":
        if not probe.case.ruled:
            yield _difference(probe)
        return
    f, leaves = _leaves(probe)

    def reverse():
        tracked = [t.detach().requires_grad_() for t in leaves]
        gradients = torch.autograd.grad(f(*tracked)[0], tracked, create_graph=True)
        torch.autograd.grad(sum(g.sum() for g in gradients), tracked, allow_unused=True)

    def forward():
        gradient = torch.func.grad(lambda *a: f(*a)[0], tuple(range(len(leaves))))
        torch.func.jvp(gradient, leaves, tuple(map(torch.ones_like, leaves)))

    for how, run in (("", reverse), ("forward over reverse", forward)):
        try:
            run()
        except RuntimeError as error:
            yield _verdict("second derivative", probe, how, _refusal(error, SECOND, FORWARD), str(error))
        else:
            yield _verdict("second derivative", probe, how, False, "not refused")


def _difference(probe: Probe) -> Result:
    probe = probe._replace(inputs=doubled(probe.case, probe.inputs), upstream=probe.upstream.double())
    f, leaves = _leaves(probe)
    ways = [_direction(t) for t in leaves]

    def gradients(step):
        moved = [(t + step * way).requires_grad_() for t, way in zip(leaves, ways, strict=True)]
        return moved, torch.autograd.grad(f(*moved)[0], moved, create_graph=True)

    moved, found = gradients(0.0)
    along = sum((g * way).sum() for g, way in zip(found, ways, strict=True))
    got = torch.autograd.grad(along, moved, allow_unused=True, materialize_grads=True)
    h = 1e-5
    want = [(a - b) / (2 * h) for a, b in zip(gradients(h)[1], gradients(-h)[1], strict=True)]
    size = max(float(w.norm()) for w in want) + 1e-3 * max(float(g.norm()) for g in found)
    error = max(float((a - b).norm()) for a, b in zip(got, want, strict=True)) / size
    return Result("second derivative", probe.case.name, error, 1e-4, error <= 1e-4)


def _direction(t):
    return torch.cos(torch.arange(t.numel(), device=t.device)).reshape(t.shape).to(t.dtype)


@_differentiable
def forward_mode(probe: Probe) -> Iterator[Result]:
    """<upstream, tangent> is <gradient, direction> for each input that has a gradient, or the call is refused."""
    f, leaves = _leaves(probe)
    for k, name in enumerate(probe.case.leaves):
        direction = _direction(leaves[k])
        one = lambda t, k=k: f(*leaves[:k], t, *leaves[k + 1 :])[0]  # noqa: E731
        try:
            _, tangent = torch.func.jvp(one, (leaves[k],), (direction,))
        except RuntimeError as error:
            yield _verdict("forward mode", probe, name, _refusal(error, FORWARD), str(error))
            continue
        terms = probe.want.grads[name].double() * direction.double()
        # float32 sums in another order, of the value's terms and of the gradient's
        size = float(terms.abs().sum() + 1e-3 * (probe.upstream * probe.want.value).abs().sum())
        error, budget = float((tangent.double() - terms.sum()).abs()) / max(size, 1e-30), 1e-5
        yield Result("forward mode", f"{probe.case.name} {name}", error, budget, error <= budget)


def _gradients(probe: Probe, gradients, value=None) -> Outcome:
    return Outcome(probe.want.value if value is None else value, dict(zip(probe.case.leaves, gradients, strict=True)))


@_differentiable
def func(probe: Probe) -> Iterator[Result]:
    """torch.func.grad gives autograd's gradients; vmap over two calls, and over two upstream gradients, gives both."""
    f, leaves = _leaves(probe)
    slope = torch.func.grad(f, tuple(range(len(leaves))), has_aux=True)
    yield from probe.alike("func", "grad", _gradients(probe, *slope(*leaves)))
    both = [torch.stack([t, t.flip(0)]) for t in leaves]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # a loop over calls is right
        gradients, values = torch.func.vmap(slope, randomness="same")(*both)
    yield from probe.alike("func", "vmap", _gradients(probe, [g[0] for g in gradients], values[0]))
    tracked = [t.detach().requires_grad_() for t in leaves]
    _, value = f(*tracked)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        upstream = torch.stack([probe.upstream, -probe.upstream])
        batched = torch.autograd.grad(value, tracked, upstream, is_grads_batched=True)
    yield from probe.alike("func", "batched gradients", _gradients(probe, [g[0] for g in batched], value.detach()))


@_differentiable
def inference(probe: Probe) -> Iterator[Result]:
    """Whatever gets no gradient may have been made under `torch.inference_mode()`, as a teacher's features are."""
    with torch.inference_mode():
        made = {name: t.clone() for name, t in probe.inputs.items()}
    for name in probe.case.leaves:
        inputs = made | {name: probe.inputs[name]}
        yield from probe.alike("inference mode", f"all but {name}", probe.run(inputs, [name]))


class _Operators(TorchDispatchMode):
    """The operators of this package that run inside, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "kdkernels":
            # of a copy each: arguments are leaves to opcheck
            self.calls.append((operator, [a.detach() if isinstance(a, torch.Tensor) else a for a in args]))
        return operator(*args, **(kwargs or {}))


def operators(probe: Probe) -> Iterator[Result]:
    """What a call runs keeps its schema and its fake, whether features are contiguous or not: torch.library.opcheck."""
    turned = {k: t.mT.contiguous().mT if t.dim() > 1 else t for k, t in probe.inputs.items()}
    for how, inputs in (("contiguous", probe.inputs), ("turned", turned)):
        with _Operators() as seen:
            probe.run(inputs)
        for operator, arguments in seen.calls:
            found = torch.library.opcheck(
                operator, arguments, test_utils=("test_schema", "test_faketensor"), raise_exception=False
            )
            wrong = "; ".join(f"{name}: {verdict}" for name, verdict in found.items() if verdict != "SUCCESS")
            yield _verdict("operators", probe, f"{how} {operator.name()}", not wrong, wrong or "kept")


def traced(probe: Probe) -> Iterator[Result]:
    """make_fx traces value and gradients with symbolic shapes, reading no number; the graph gives the same."""
    names = probe.case.leaves if probe.case.gradient else []
    fixed = {k: t for k, t in probe.inputs.items() if k not in names}

    def run(leaves, fixed, upstream):
        again, places = probe._replace(inputs=probe.inputs | fixed, upstream=upstream), tuple(range(len(names)))
        f = _number(again, names)
        return torch.func.grad(f, places, has_aux=True)(*leaves) if names else ((), f()[1])

    given = tuple(probe.inputs[name] for name in names), fixed, probe.upstream
    graph = make_fx(run, tracing_mode="symbolic")(*given)
    with probe.case.context():
        gradients, value = graph(*given)
    yield from probe.alike("traced", "", Outcome(value, dict(zip(names, gradients, strict=True))))


def _twice_as_many(probe: Probe) -> Probe:
    """The probe with its rows twice: the last dimension but one of the first input, and all that are as long."""
    rows = probe.inputs[probe.case.floats[0]].shape[-2]

    def longer(t):
        for dim, size in enumerate(t.shape):
            t = torch.cat([t, t], dim) if size == rows else t
        return t

    inputs = {name: longer(t).cpu() for name, t in probe.inputs.items()}
    return probe_of(probe.case._replace(inputs=inputs, dtypes=(torch.float32,)), probe.backend, probe.device)


def compiled(probe: Probe) -> Iterator[Result]:
    """torch.compile takes the call as one graph, says nothing, and gives what it gives.

    Other numbers of rows are no new graph, but for one where an op goes another way from some size on.
    """
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(
        lambda inputs: probe.case.call(inputs, probe.backend), fullgraph=True, dynamic=True, backend=counter
    )
    graphs = []  # so far: an analysis that starts again counts as one more
    twice = _twice_as_many(probe)
    for how, one in (("", probe), ("twice as many rows", twice), ("four times as many", _twice_as_many(twice))):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", "dynamo_pgo")
            got = one.run(one.inputs, call=lambda inputs, _: call(inputs))
        graphs.append(counter.frame_count)
        yield from one.alike("compiled", how, got)
    yield _verdict("compiled", probe, "graphs", 0 < graphs[0] <= graphs[2] <= graphs[0] + 1, f"{graphs} so far")


class _Call(torch.nn.Module):
    def __init__(self, probe: Probe):
        super().__init__()
        self.probe = probe

    def forward(self, inputs):
        return self.probe.case.call(inputs, self.probe.backend)


def exported(probe: Probe) -> Iterator[Result]:
    """torch.export takes the call with sizes left open; the program gives the value for other numbers of rows."""
    sizes = {name: {dim: torch.export.Dim.AUTO for dim in range(t.dim())} for name, t in probe.inputs.items()}
    more = _twice_as_many(probe)
    with torch.no_grad():
        program = torch.export.export(_Call(probe), (probe.inputs,), dynamic_shapes=(sizes,)).module()
    for how, one in (("", probe), ("twice as many rows", more)):
        with torch.no_grad(), one.case.context():
            value = program(one.inputs)
        yield from one.alike("exported", how, Outcome(value, {}))


@contextlib.contextmanager
def _threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads(probe: Probe) -> Iterator[Result]:
    """Another number of threads changes no more than the order of sums."""
    for count in (1, 2, 3):
        with _threads(count):
            yield from probe.alike("threads", f"{count}", probe.run(probe.inputs))


CHECKS = {
    "second derivative": second_derivative,
    "forward mode": forward_mode,
    "func": func,
    "inference mode": inference,
    "operators": operators,
    "traced": traced,
    "compiled": compiled,
    "exported": exported,
    "threads": threads,
}
OF_GRADIENTS = ("second derivative", "forward mode", "func", "inference mode")
