# SPDX-License-Identifier: Apache-2.0
"""The checks of the contract: each takes a case, or a probe of it, and yields judged measurements."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from .. import backend as backends
from .case import Case, Outcome, evaluate, oracle_of, rounded

FLOOR = 32  # eps granted beside the reference's own error, which may be small by luck


class Result(NamedTuple):
    """One measurement; error and budget are relative, NaN and wrong dtypes count as an infinite error."""

    check: str
    case: str
    error: float
    budget: float
    ok: bool
    note: str = ""


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


def deviation(got: torch.Tensor, want: torch.Tensor, size: float | torch.Tensor) -> tuple[float, float]:
    """Maximum and L2 error relative to `size`, a number for each entry or a tensor of terms; rounding `got` is free.

    NaN where NaN is wanted is no error; NaN elsewhere is an infinite one.
    """
    got, limits, want = got.detach().cpu(), torch.finfo(got.dtype), want.cpu().double()
    free = limits.eps / 2 * want.abs() + limits.tiny * limits.eps / 2
    error = ((got.double() - want).abs() - free).clamp(min=0).masked_fill(want.isnan() & got.isnan(), 0.0)
    if isinstance(size, torch.Tensor):
        want, size = want.nan_to_num(), size.cpu().double().nan_to_num(0.0, 0.0, 0.0)
        sizes = [max(want.abs().max(), size.abs().max()), max(want.norm(), size.norm())]
    else:
        sizes = [size, size * math.sqrt(max(1, want.numel()))]
    found = (error.max(), error.norm())
    return tuple(_ratio(float(e), float(s)) for e, s in zip(found, sizes, strict=True))


def _ratio(error: float, size: float) -> float:
    if error == 0:
        return 0.0
    return error / size if size > 0 and math.isfinite(error) else math.inf


def _judge(check, case_name, got, want, own, scale, cap, eps) -> Result:
    """The worse of the two norms; `own` is the same-dtype reference, whose error sets the budget below the cap."""
    if got.shape != want.shape or got.dtype != own.dtype:
        note = f"is {got.dtype} {tuple(got.shape)}, not {own.dtype} {tuple(want.shape)}"
        return Result(check, case_name, math.inf, cap, False, note)
    errors, owns = deviation(got, want, scale), deviation(own, want, scale)
    # in float64 the oracle errs as much as what it judges: only the cap stands
    exact = eps <= torch.finfo(torch.float64).eps
    judged = [(e, cap if exact else min(2 * o + FLOOR * eps, cap)) for e, o in zip(errors, owns, strict=True)]
    error, budget = max(judged, key=lambda pair: pair[0] / pair[1])
    return Result(check, case_name, error, budget, all(e <= b for e, b in judged), f"reference {max(owns):.1e}")


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
        oracle = oracle_of(case, inputs)
        own = evaluate(case, inputs, "reference", oracle.upstream)
        got = evaluate(case, inputs, backend, oracle.upstream)
        coarsest = _coarsest(dtype)
        caps, eps, label = case.caps(coarsest), torch.finfo(coarsest).eps, f"{case.name} {_name(dtype)}"
        yield _judge("value", label, got.value, oracle.value, own.value, oracle.scale, caps.value, eps)
        for name, g in got.grads.items():
            want, terms = oracle.grads[name], oracle.terms[name]
            yield _judge(f"gradient {name}", label, g, want, own.grads[name], terms, caps.gradient, eps)


def _alike(check, case, name, got: Outcome, want: Outcome, exact=False) -> Iterator[Result]:
    """Two runs of one backend: the same bits, or the same within the caps."""
    caps = case.caps(torch.float32)
    pairs = [("value", got.value, want.value, caps.value)]
    pairs += [(f"gradient {k}", g, want.grads[k], caps.gradient) for k, g in got.grads.items()]
    for what, a, b, cap in pairs:
        error = deviation(a, b, b)
        if exact:
            error, cap = (0.0 if torch.equal(a, b) else math.inf,), 0.0
        yield Result(check, f"{case.name} {name} {what}".replace("  ", " "), max(error), cap, max(error) <= cap)


class Probe(NamedTuple):
    """One case on one backend: its float32 inputs, the outcome to repeat, and run(inputs, needs=, upstream=)."""

    case: Case
    device: str
    inputs: dict[str, torch.Tensor]
    want: Outcome
    run: Callable[..., Outcome]


def probe_of(case: Case, backend: str, device: str) -> Probe:
    inputs = rounded(case, torch.float32, device)
    default = oracle_of(case, inputs).upstream

    def run(inputs, needs=None, upstream=default):
        return evaluate(case, inputs, backend, upstream, needs)

    want = run(inputs)
    fixed = default(want.value)  # made once: a probe under capture must not copy from the host
    return Probe(
        case,
        device,
        inputs,
        want,
        lambda inputs, needs=None, upstream=lambda value: fixed: run(inputs, needs, upstream),
    )


def needs(probe: Probe) -> Iterator[Result]:
    """Every subset of inputs that ask for a gradient gives the gradients of the full call."""
    names = probe.case.leaves
    for size in range(len(names)):
        for subset in itertools.combinations(names, size):
            got = probe.run(probe.inputs, subset)
            yield from _alike("needs", probe.case, f"only {subset}", got, probe.want)


def twice(probe: Probe) -> Iterator[Result]:
    """The same call gives the same bits."""
    yield from _alike("twice", probe.case, "", probe.run(probe.inputs), probe.want, exact=True)


def poisoned(probe: Probe) -> Iterator[Result]:
    """Nothing is read that was not written, and every output is written to its end."""
    with poison():
        got = probe.run(probe.inputs)
    yield from _alike("poison", probe.case, "", got, probe.want)


_LAYOUTS = {
    "strided": lambda t: torch.stack([t, t + 1], -1).flatten(-2)[..., ::2],
    "transposed": lambda t: t.mT.contiguous().mT,
    "offset": lambda t: torch.cat([t[..., :1] + 1, t], -1)[..., 1:],
    "row slice": lambda t: torch.cat([t, t * 2], -2)[..., : t.shape[-2], :],
    "expanded": lambda t: t[..., :1].expand(t.shape),
}


def layouts(probe: Probe) -> Iterator[Result]:
    """Views with any strides, and an expanded upstream gradient, give what their contiguous copies give."""
    for name, view in _LAYOUTS.items():
        viewed = {k: view(t) if k in probe.case.floats and t.dim() > 1 else t for k, t in probe.inputs.items()}
        copied = {k: t.contiguous().clone() for k, t in viewed.items()}
        want = probe.run(copied, upstream=lambda value: torch.full_like(value, 1.5))
        got = probe.run(viewed, upstream=lambda value: value.new_full((), 1.5).expand(value.shape))
        yield from _alike("layouts", probe.case, name, got, want)


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
        yield from _alike("masks", case, f"{bad} under the mask", got, want)
        for mask, names in case.masks.items():
            for k in names:
                error = math.inf if got.grads[k][~inputs[mask]].any() else 0.0
                yield Result("masks", f"{case.name} gradient of rows dropped from {k}", error, 0.0, error == 0)
    nothing = inputs | {mask: torch.zeros_like(inputs[mask]) for mask in case.masks}
    zero = Outcome(torch.zeros_like(want.value), {k: torch.zeros_like(g) for k, g in want.grads.items()})
    yield from _alike("masks", case, "all masked", probe.run(nothing), zero, exact=True)


def autocast(probe: Probe) -> Iterator[Result]:
    """Autocast changes nothing: products inside keep the dtype of the input."""
    with torch.autocast(probe.device.split(":")[0], torch.bfloat16):
        got = probe.run(probe.inputs)
    yield from _alike("autocast", probe.case, "", got, probe.want)


def no_sync(probe: Probe) -> Iterator[Result]:
    """CUDA: neither forward nor backward waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = probe.run(probe.inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    yield from _alike("no sync", probe.case, "", got, probe.want)


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
    yield from _alike("side stream", probe.case, "", got, probe.want)


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
    yield from _alike("graph", probe.case, "", got, probe.want)


# beside `accuracy`, on the probes of a spec only
STRUCTURAL: dict[str, Callable[[Probe], Iterator[Result]]] = {
    "needs": needs,
    "twice": twice,
    "poison": poisoned,
    "layouts": layouts,
    "masks": masks,
    "autocast": autocast,
    "no sync": no_sync,
    "side stream": side_stream,
    "graph": graph,
}
CUDA_ONLY = ("no sync", "side stream", "graph")
