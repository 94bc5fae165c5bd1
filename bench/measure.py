# SPDX-License-Identifier: Apache-2.0
"""How a time is taken: contenders in one process, round after round (A B C, B C A, ...), compared pair by pair.

CUDA: before each timed call a buffer twice the size of L2 is written and the device is idle, and the inputs rotate over
several draws, so every call starts with cold caches and pays for its own launches. `graph` replays the same step
captured once.

CPU: the inputs rotate there too, but nothing flushes the caches (l2 "hot"). Two clocks: "wall", what a user waits,
needs a quiet machine; "cpu", the processor time of all threads of this process, also tells contenders apart on a shared
one, where waiting for a core is most of the wall time. It is meant for one thread: spinning at a barrier counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Contender(NamedTuple):
    name: str
    backend: str | None  # of kdkernels; None for the others
    function: Callable  # f(x, y) -> value


class Runner(NamedTuple):
    """One contender with one way to run it: call(k) -> {phase: ms} on the k-th draw of the inputs."""

    contender: Contender
    method: str
    call: Callable[[int], dict[str, float]]


def leaves(draws):
    """Each draw as (x that asks for a gradient, y)."""
    return [(x.detach().clone().requires_grad_(), y.detach()) for x, y in draws]


def backward(value, y):
    """With y as the upstream gradient of a value of its shape, else with ones."""
    if not value.requires_grad:  # an analysis has no backward pass
        return
    if value.shape == y.shape:
        value.backward(y.to(value.dtype))
    else:
        value.sum().backward() if value.dim() else value.backward()


def step(function, x, y):
    """Forward and backward with respect to x, as a training step runs them."""
    x.grad = None
    value = function(x, y)
    backward(value, y)
    return value


def cpu_runner(contender: Contender, draws, clock: str = "wall") -> Runner:
    draws, now = leaves(draws), CLOCKS[clock]

    def call(k):
        x, y = draws[k % len(draws)]
        x.grad = None
        start = now()
        value = contender.function(x, y)
        middle = now()
        backward(value, y)
        end = now()
        return {"fwd": (middle - start) * 1e3, "bwd": (end - middle) * 1e3, "step": (end - start) * 1e3}

    return Runner(contender, "eager", call)


def flush_buffer():
    size = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 64 * 2**20
    return torch.empty(2 * size, dtype=torch.int8, device="cuda")


def _timed(flush, *parts):
    """Milliseconds of each part on an idle device with cold L2, by events: launch gaps count."""
    flush.zero_()
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(parts) + 1)]
    events[0].record()
    for part, event in zip(parts, events[1:], strict=True):
        part()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]


def cuda_runner(contender: Contender, draws, flush) -> Runner:
    draws = leaves(draws)

    def call(k):
        x, y = draws[k % len(draws)]
        x.grad = None
        held = []

        fwd, bwd = _timed(flush, lambda: held.append(contender.function(x, y)), lambda: backward(held.pop(), y))
        return {"fwd": fwd, "bwd": bwd, "step": fwd + bwd}

    return Runner(contender, "eager", call)


def graph_runner(contender: Contender, draws, flush) -> Runner:
    """Forward alone and the whole step, each captured once: raises where the contender cannot be captured."""
    x, y = leaves(draws[:1])[0]
    y = y.clone()  # overwritten by later draws
    graphs = {}
    for phase in ("fwd", "step"):

        def body(phase=phase):
            if phase == "step":
                return step(contender.function, x, y)
            return contender.function(x, y)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                body()
        torch.cuda.current_stream().wait_stream(side)
        x.grad = None
        graphs[phase] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[phase]):
            body()

    def call(k):
        fresh = draws[k % len(draws)]
        with torch.no_grad():
            x.copy_(fresh[0])
            y.copy_(fresh[1])
        return {phase: _timed(flush, graph.replay)[0] for phase, graph in graphs.items()}

    return Runner(contender, "graph", call)


def interleave(runners: list[Runner], seconds: float, least: int = 5, most: int = 200) -> list[dict[str, list[float]]]:
    """{phase: [ms of each round]} a runner: as many rounds as `seconds` allow, in rotating order."""
    results: list[dict[str, list[float]]] = [{} for _ in runners]
    for k in range(2):  # warm-up, and the second one tells how long a round takes
        start = time.perf_counter()
        for runner in runners:
            runner.call(k)
        one = time.perf_counter() - start
    rounds = int(min(max(seconds / max(one, 1e-9), least), most))
    for k in range(rounds):
        for m in range(len(runners)):
            index = (k + m) % len(runners)
            for phase, ms in runners[index].call(k).items():
                results[index].setdefault(phase, []).append(ms)
    return results


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    q = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return tuple(q.tolist())


def pair_ratios(against: list[float], ours: list[float]) -> tuple[float, float, float]:
    """p20, p50, p80 of against / ours, each pair from one round."""
    return percentiles([a / max(b, 1e-12) for a, b in zip(against, ours, strict=True)])


def launches(function, x, y, forward: bool = False) -> int:
    """Kernels that one step, or its forward pass alone, puts on the device, from the profiler."""
    from torch.profiler import ProfilerActivity, profile

    step(function, x, y)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        function(x, y) if forward else step(function, x, y)
        torch.cuda.synchronize()
    on_device = [e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not e.name.startswith(("Memcpy", "Memset")) and not e.is_user_annotation for e in on_device)


def cuda_peak(function, x, y) -> int:
    """Bytes above the inputs at the peak of one step, the gradient included."""
    step(function, x, y)
    x.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(function, x, y)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
