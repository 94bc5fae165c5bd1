# SPDX-License-Identifier: Apache-2.0
"""What the public call costs above its arithmetic: unbiased linear CKA, n = 256, p = 512, gradient to x.

bare   the implementation's forward and backward called directly, problem decoded, upstream gradient at hand
floor  the same two calls inside the smallest autograd.Function that returns a scalar: what PyTorch itself asks
call   kd.cka(x, y).backward()

The overhead is call - bare: argument checks, backend choice, the operator's dispatch, autograd's engine. All three do
the same arithmetic on the same tensors, in rotating order. On CUDA the host's time is what is measured: the time until
the call returns, with the device idle before it.
"""

from __future__ import annotations

import time

import torch

import kdkernels as kd
from kdkernels.gram.kernels import spec_of
from kdkernels.gram.problem import decode, encode

from . import data
from .measure import percentiles

N, P = 256, 512
NEED_X = 1


def measure(backend: str, device: str, reps: int) -> dict:
    """One row: microseconds of call - bare and call - floor, medians of the differences of each round."""
    x, y = (t.float() for t in data.features(N, P, P, "relu:3:1", 0, device))
    x.requires_grad_()
    calls = (_bare(backend, x, y), _floor(backend, x, y), _call(backend, x, y))
    times: list[list[float]] = [[], [], []]
    for k in range(reps + 20):
        for m in range(3):
            index = (k + m) % 3
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            calls[index]()
            times[index].append((time.perf_counter() - start) * 1e6)
    bare, floor, call = (t[20:] for t in times)
    above_bare = [c - b for c, b in zip(call, bare, strict=True)]
    above_floor = [c - f for c, f in zip(call, floor, strict=True)]
    low, middle, high = percentiles(above_bare)
    return {
        "kind": "overhead",
        "status": "ok",
        "op": "cka",
        "case": "overhead of the call",
        "contender": "kdkernels",
        "backend": backend,
        "phase": "step",
        "dtype": "float32",
        "shape": {"groups": 1, "n": N, "p": P, "q": P},
        "regime": "relu:3:1",
        "reps": reps,
        "us_bare": percentiles(bare)[1],
        "us_floor": percentiles(floor)[1],
        "us_call": percentiles(call)[1],
        "us_above_bare": [low, middle, high],
        "us_above_floor": list(percentiles(above_floor)),
        # the quietest runs of each: what the machine's other work adds is not in it
        "us_above_bare_min": min(call) - min(bare),
        "targets": [{"figure": "overhead", "against": "bare", "bound": 15.0, "value": middle, "holds": middle <= 15.0}],
    }


def _implementation(backend):
    from kdkernels.gram.function import _implementation as of

    return of(_problem(backend))


def _problem(backend):
    linear = spec_of("linear")[0]
    return decode(encode("cka", linear, linear, True, True, False, True, backend))


def _bare(backend, x, y):
    implementation, problem = _implementation(backend), _problem(backend)
    x, y, one = x.detach()[None], y[None], torch.ones(1, device=x.device)

    def bare():
        _, rows, kept = implementation.forward(x, y, None, None, None, problem, NEED_X)
        return implementation.backward(one, x, y, None, None, None, rows, kept, problem, NEED_X)[0]

    return bare


def _floor(backend, x, y):
    implementation, problem = _implementation(backend), _problem(backend)

    class Smallest(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            value, rows, kept = implementation.forward(x[None], y[None], None, None, None, problem, NEED_X)
            ctx.save_for_backward(x, y, rows, kept)
            return value[0]

        @staticmethod
        def backward(ctx, grad):
            x, y, rows, kept = ctx.saved_tensors
            x, y, grad = x[None], y[None], grad[None]
            return implementation.backward(grad, x, y, None, None, None, rows, kept, problem, NEED_X)[0][0], None

    def floor():
        x.grad = None
        Smallest.apply(x, y).backward()

    return floor


def _call(backend, x, y):
    def call():
        x.grad = None
        kd.cka(x, y, backend=backend).backward()

    return call
