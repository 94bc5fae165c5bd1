# SPDX-License-Identifier: Apache-2.0
"""What the public call costs above its arithmetic: unbiased linear CKA, n = 256, p = 512, gradient to x.

bare     the implementation's forward and backward called directly, problem decoded, upstream gradient at hand
floor    the same two calls inside the smallest autograd.Function that returns a scalar: what PyTorch itself asks
call     kd.cka(x, y).backward()
forward  kd.cka(x, y) alone, its gradient recorded, beside `bare_forward`

call - bare is argument checks, backend choice and autograd's engine; floor - bare is the part of autograd, which no
differentiable op avoids and which alone is above the bound. The arithmetic takes milliseconds, and its noise more
than the overhead: so all run on the real implementation (`real_us_*`) and on one that returns answers computed before,
of the same shapes (`us_*`, the figure). Rotating order, medians of the differences of each round; microseconds of host
time.
"""

from __future__ import annotations

import contextlib
import time
from typing import NamedTuple

import torch

import kdkernels as kd
from kdkernels.backend import implementation
from kdkernels.gram import operator
from kdkernels.gram.call import Call, Question, call_of
from kdkernels.gram.kernels import spec_of

from . import data
from .measure import percentiles

N, P = 256, 512
NEED_X = 1
BOUND = 15.0
PROBLEM = Question("cka", "linear", True, True, False, True).problem(spec_of("linear"))


class Ready(NamedTuple):
    """An implementation whose answers are known: the arithmetic left out, the allocation of its value kept."""

    answers: tuple
    gradients: tuple

    def forward(self, *_):
        value, rows, kept = self.answers
        return value.clone(), rows.view_as(rows), kept.view_as(kept)

    def backward(self, *_):
        return tuple(None if g is None else g.view_as(g) for g in self.gradients)


def measure(backend: str, device: str, reps: int) -> dict:
    """One row: what the call costs above bare and above floor."""
    run = implementation(operator.__package__, backend)
    x, y = (t.float() for t in data.features(N, P, P, "relu:3:1", 0, device))
    call = _asked(x[None], y[None])
    answers = run.forward(call)
    gradients = run.backward(call, answers[1:], torch.ones(1, device=device))
    ready = Ready(answers, gradients)
    x.requires_grad_()
    real = _rounds(_calls(run, backend, x, y), device, max(reps // 10, 5))
    with _instead(ready):
        alone = _rounds(_calls(ready, backend, x, y), device, reps)
    row = {
        "kind": "overhead",
        "status": "ok",
        "op": "cka",
        "case": "overhead of the call",
        "contender": "kdkernels",
        "backend": backend,
        "phase": "step",
        "method": "eager",
        "dtype": "float32",
        "shape": {"groups": 1, "n": N, "p": P, "q": P},
        "regime": "relu:3:1",
        "reps": reps,
        "targets": [],
    }
    for prefix, times in (("real_us", real), ("us", alone)):
        row |= {f"{prefix}_{name}": percentiles(t) for name, t in times.items()}
    for what, against in (("forward", "bare_forward"), ("call", "floor"), ("call", "bare")):
        differences = [c - b for c, b in zip(alone[what], alone[against], strict=True)]
        value = percentiles(differences)[1]
        target = {"figure": "overhead", "against": against, "bound": BOUND, "value": value, "holds": value <= BOUND}
        row["targets"].append(target)
    return row


def _asked(x, y) -> Call:
    return call_of(PROBLEM, x, y, None, (None, None), NEED_X)


def _rounds(calls: dict, device: str, reps: int) -> dict[str, list[float]]:
    names, times = list(calls), {name: [] for name in calls}
    warm = min(reps, 50)
    for k in range(warm + reps):
        for m in range(len(names)):
            name = names[(k + m) % len(names)]
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            calls[name]()
            times[name].append((time.perf_counter() - start) * 1e6)
    return {name: t[warm:] for name, t in times.items()}


@contextlib.contextmanager
def _instead(ready: Ready):
    """The operator calls `ready` in place of its implementation."""
    operator.implementation = lambda family, backend: ready
    try:
        yield
    finally:
        operator.implementation = implementation


def _calls(run, backend, x, y) -> dict:
    asked, one = _asked(x.detach()[None], y[None]), torch.ones(1, device=x.device)

    def bare():
        _, *saved = run.forward(asked)
        return run.backward(asked, saved, one)[0]

    class Smallest(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            value, *saved = run.forward(_asked(x[None], y[None]))
            ctx.save_for_backward(x, y, *saved)
            return value[0]

        @staticmethod
        def backward(ctx, grad):
            x, y, *saved = ctx.saved_tensors
            return run.backward(_asked(x[None], y[None]), saved, grad[None])[0][0], None

    def floor():
        x.grad = None
        Smallest.apply(x, y).backward()

    def call():
        x.grad = None
        kd.cka(x, y, backend=backend).backward()

    def bare_forward():
        return run.forward(asked)[0]

    def forward():
        return kd.cka(x, y, backend=backend)

    return {"bare": bare, "floor": floor, "call": call, "bare_forward": bare_forward, "forward": forward}
