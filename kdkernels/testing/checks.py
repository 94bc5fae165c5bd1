# SPDX-License-Identifier: Apache-2.0
"""The checks of the contract: each takes a case, or a probe of it, and yields judged measurements."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator

import torch

from .. import backend as backends
from . import transforms
from .case import Case, Outcome, evaluate, rounded
from .probe import Probe, Result, alike, same
from .yardstick import Yardstick, doubled, expanded


@contextlib.contextmanager
def poison():
    """Inside, every uninitialised allocation of torch, of whatever language, holds NaN (integers: their maximum)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _name(dtype) -> str:
    return "+".join(map(_name, dtype)) if isinstance(dtype, tuple) else str(dtype).removeprefix("torch.")


def _coarsest(dtype) -> torch.dtype:
    return max(dtype if isinstance(dtype, tuple) else (dtype,), key=lambda d: torch.finfo(d).eps)


def _runs(backend, device, dtype) -> bool:
    return backends.obstacle(backend, device, dtype if isinstance(dtype, tuple) else (dtype,)) is None


def accuracy(case: Case, backend: str, device: str) -> Iterator[Result]:
    """Forward and every gradient against the float64 reference of the same rounded input."""
    for dtype in filter(lambda d: _runs(backend, device, d), case.dtypes):
        inputs = rounded(case, dtype, device)
        yardstick = Yardstick(case, inputs, backend, coarsest=_coarsest(dtype))
        for part, *verdict in yardstick.judge(evaluate(case, inputs, backend, yardstick.oracle.upstream)):
            yield Result(part, f"{case.name} {_name(dtype)}", *verdict)


def needs(probe: Probe) -> Iterator[Result]:
    """Every subset of inputs that ask for a gradient gives the gradients of the full call."""
    names = probe.case.leaves
    for size in range(len(names)):
        for subset in itertools.combinations(names, size):
            got = probe.run(probe.inputs, subset)
            yield from probe.alike("needs", f"only {subset}", got)


def twice(probe: Probe) -> Iterator[Result]:
    """The same call gives the same bits."""
    yield from same("twice", probe.case.name, probe.run(probe.inputs), probe.want)


def poisoned(probe: Probe) -> Iterator[Result]:
    """Nothing is read that was not written, and every output is written to its end."""
    with poison():
        got = probe.run(probe.inputs)
    yield from probe.alike("poison", "", got)


_LAYOUTS = {  # NaN between what is seen, not even to be multiplied by 0
    "strided": lambda t: torch.stack([t, t * math.nan], -1).flatten(-2)[..., ::2],
    "transposed": lambda t: t.mT.contiguous().mT,
    "offset": lambda t: torch.cat([t[..., :1] * math.nan, t], -1)[..., 1:],
    "row slice": lambda t: torch.cat([t, t * math.nan], -2)[..., : t.shape[-2], :],
    "windows": lambda t: t.flatten(-2)[..., : sum(t.shape[-2:]) - 1].unfold(-1, t.shape[-1], 1),
}


def views(case: Case) -> dict[str, Callable]:
    """Layouts by name; what they hold must be well conditioned, or the op would amplify how a BLAS rounds each."""
    if case.alike is None:
        return _LAYOUTS
    return _LAYOUTS | {"expanded": lambda t: t.narrow(case.alike, 0, 1).expand(t.shape)}


def viewed(case: Case, inputs, view: Callable) -> dict[str, torch.Tensor]:
    return inputs | {k: view(inputs[k]) for k in case.floats if inputs[k].dim() > 1}


def layouts(probe: Probe) -> Iterator[Result]:
    """Views with any strides, and an expanded upstream gradient, give what their contiguous copies give."""
    case, copied = probe.case, {}
    for name, view in views(case).items():
        strided = viewed(case, probe.inputs, view)
        if not (copied and all(torch.equal(t, copied[k]) for k, t in strided.items())):  # most hold the same numbers
            copied = {k: t.contiguous().clone() for k, t in strided.items()}
            yardstick = Yardstick(case, copied, probe.backend, expanded)
            upstream = yardstick.oracle.upstream
            want = probe.run(copied, upstream=lambda value, upstream=upstream: upstream(value).contiguous())
        yield from alike("layouts", f"{case.name} {name}", yardstick, probe.run(strided, upstream=upstream), want)


def masks(probe: Probe) -> Iterator[Result]:
    """What a mask drops changes nothing, even as NaN or infinity, and has gradient 0; all masked gives exactly 0."""
    case, inputs, want = probe.case, probe.inputs, probe.want
    if not case.masks:
        return
    for bad in (math.nan, math.inf):
        dirty = dict(inputs)
        for mask, names in case.masks.items():
            dirty |= {k: dirty[k].masked_fill(~inputs[mask][..., None], bad) for k in names}
        got = probe.run(dirty)
        yield from probe.alike("masks", f"{bad} under the mask", got)
        for mask, names in case.masks.items():
            for k in names:
                error = math.inf if got.grads[k][~inputs[mask]].any() else 0.0
                yield Result("masks", f"{case.name} gradient of rows dropped from {k}", error, 0.0, error == 0)
    nothing = inputs | {mask: torch.zeros_like(inputs[mask]) for mask in case.masks}
    zero = Outcome(torch.zeros_like(want.value), {k: torch.zeros_like(g) for k, g in want.grads.items()})
    yield from same("masks", f"{case.name} all masked", probe.run(nothing), zero)


def nonfinite(probe: Probe) -> Iterator[Result]:
    """NaN or infinity in an entry that counts makes nothing but NaN and infinity where the textbook has them, and
    changes nothing where it has numbers; of a value that is lost as a whole, gradients may be as well."""
    case, upstream = probe.case, probe.yardstick.oracle.upstream
    for name in (name for name in case.floats if case.inputs[name].dim() > 1):
        for bad in (math.nan, math.inf, -math.inf):
            label, inputs = f"{case.name} {bad} in {name}", probe.inputs | {name: _spoilt(probe.inputs[name], bad)}
            try:
                want = evaluate(case, doubled(case, inputs), "reference", upstream)
            except ValueError as refusal:
                yield Result("nonfinite", label, *_refused(probe, inputs, refusal))
                continue
            got = probe.run(inputs)
            grads = {
                k: _like(g, want.grads[k], _lost(want.value, g) & _counted(case, inputs, name, k))
                for k, g in got.grads.items()
            }
            got = Outcome(_like(got.value, want.value, False), grads)
            for part, *verdict in probe.yardstick.judge(got, want):
                yield Result("nonfinite", f"{label} {part}", *verdict)


def _spoilt(t, bad: float):
    """With a number of the second row, which every mask keeps, replaced."""
    t = t.clone()
    first = t[(0,) * (t.dim() - 2)]
    first[min(1, len(first) - 1), -1] = bad
    return t


def _refused(probe: Probe, inputs, refusal: ValueError):
    """A parameter that the textbook refuses is refused in the same words."""
    try:
        probe.run(inputs)
    except ValueError as error:
        return (0.0, 0.0, True) if str(error) == str(refusal) else (math.inf, 0.0, False, str(error))
    return math.inf, 0.0, False, f"not refused: {refusal}"


def _lost(value, gradient):
    """Of which groups, or rows, of a gradient the value holds no number: of all, where it has none."""
    lost = ~value.isfinite().to(gradient.device)
    if value.dim() and gradient.dim() and value.shape[0] == gradient.shape[0]:
        return lost.reshape(len(lost), -1).all(1).reshape(-1, *[1] * (gradient.dim() - 1))
    return lost.all()


def _counted(case: Case, inputs, spoilt: str, name: str):
    """Which rows of an input no mask drops: those have gradient 0 whatever the others hold."""
    for mask, names in case.masks.items():
        if name in names and spoilt in names:
            return inputs[mask][..., None]
    return torch.ones((), dtype=torch.bool, device=inputs[name].device)


def _like(got, want, lost):
    """got; what is no number there is as good as any other where none is wanted, or where all is lost."""
    want = want.to(got.device)
    return torch.where(~got.isfinite() & (lost | ~want.isfinite()), want.to(got.dtype), got)


def autocast(probe: Probe) -> Iterator[Result]:
    """Autocast changes nothing: products inside keep the dtype of the input."""
    with torch.autocast(probe.device.split(":")[0], torch.bfloat16):
        got = probe.run(probe.inputs)
    yield from probe.alike("autocast", "", got)


def no_sync(probe: Probe) -> Iterator[Result]:
    """CUDA: neither forward nor backward waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = probe.run(probe.inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    yield from probe.alike("no sync", "", got)


@contextlib.contextmanager
def _another_stream():
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def side_stream(probe: Probe) -> Iterator[Result]:
    """CUDA: everything runs on the current stream; from a busy one, any other would read the data too early."""
    late = {k: torch.zeros_like(t) for k, t in probe.inputs.items()}
    with _another_stream():
        torch.cuda._sleep(50_000_000)  # about 30 ms
        for k, t in late.items():
            t.copy_(probe.inputs[k])
        got = probe.run(late)
    yield from probe.alike("side stream", "", got)


def graph(probe: Probe) -> Iterator[Result]:
    """CUDA: forward and backward can be captured, and a replay uses the data of its time."""
    # captured on other data of the same shapes: what is baked in then differs from what the replay must return
    static = {k: t * 1.5 if k in probe.case.floats else t.clone() for k, t in probe.inputs.items()}
    static = {k: t.flip(-2) if t.dim() > 1 and k in probe.case.floats else t for k, t in static.items()}
    with _another_stream():
        for _ in range(3):
            probe.run(static)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        got = probe.run(static)
    for k, t in static.items():
        t.copy_(probe.inputs[k])
    captured.replay()
    torch.cuda.synchronize()
    yield from probe.alike("graph", "", got)


# beside `accuracy`, on the probes of a spec only
STRUCTURAL: dict[str, Callable[[Probe], Iterator[Result]]] = {
    "needs": needs,
    "twice": twice,
    "poison": poisoned,
    "layouts": layouts,
    "masks": masks,
    "nonfinite": nonfinite,
    "autocast": autocast,
    **transforms.CHECKS,
    "no sync": no_sync,
    "side stream": side_stream,
    "graph": graph,
}
CUDA_ONLY = ("no sync", "side stream", "graph")
