# SPDX-License-Identifier: Apache-2.0
"""What a loss makes of a chunk of logits, by a name that an operator can carry: values of rows, and their slopes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from .. import backend as backends
from . import torch_impl
from .call import Measure
from .slices import Slices


class Asked(NamedTuple):
    """What a call asks of the rows of heads."""

    kind: str
    numbers: tuple  # of the kind
    backend: str
    reduction: str = "mean"
    factor: float = 1.0
    chunk: int | None = None  # rows at a time
    slices: Slices | None = None  # of the classes, where other ranks have the rest


_KINDS: dict[str, Callable] = {}
_OF_SLICES: dict[str, Callable] = {}


def kind_of(name: str, slices: Slices | None = None) -> Callable:
    """run(z, y, [first, second, third], weights, numbers, backend, need) -> (values [r] times their weights, slopes).

    weights: [r], or one number. Slopes, [r, C] as z, are those of the sum of the values; anything without `need`. Of
    rows of which other ranks have the rest, `slices` are in the place of a backend.
    """
    return (_KINDS if slices is None else _OF_SLICES)[name]


def kind(name: str, kinds=_KINDS):
    """Registers a function of rows (z, y, first, second, third, numbers, backend) -> values [r], which PyTorch can
    differentiate in z: the slopes of a chunk are those of autograd."""

    def register(rows):
        def run(z, y, own, weights, numbers, backend, need):
            with _recorded(need):
                z = z.detach().requires_grad_(need)
                values = rows(z, y, *own, numbers, backend) * weights
                slopes = torch.autograd.grad(values.sum(), z)[0] if need else None
            return values.detach(), slopes

        kinds[name] = run
        return rows

    return register


def kind_of_slices(name: str):
    """`kind` of a function that gets `Slices` in the place of a backend."""
    return kind(name, _OF_SLICES)


@contextlib.contextmanager
def _recorded(need: bool):
    """Inside, autograd records, also in an operator of a compiled graph, which runs below autograd."""
    dispatch, guard = torch._C.DispatchKey, contextlib.nullcontext()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    if need and excluded.has(dispatch.AutogradFunctionality):
        excluded = excluded.remove(dispatch.AutogradFunctionality).remove(dispatch.ADInplaceOrView)
        guard = torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)
    with guard, torch.set_grad_enabled(need):
        yield


def _divergence(z, y, own, weights, numbers, backend, need):
    """The row op of every divergence, which makes the slopes in the same pass."""
    return _made(backends.implementation(__package__, backend).divergence, z, y, own[0], weights, numbers, need)


def _divergence_of_slices(z, y, own, weights, numbers, slices, need):
    run = functools.partial(torch_impl.divergence, over=slices)
    return _made(run, z, y, own[0], weights, numbers, need)


def _made(run, z, y, taus, weights, numbers, need):
    every = None if isinstance(weights, float) else weights
    value, _, slopes = run(z, y, (taus, every), Measure(*numbers), weights if every is None else 1.0, False, need)
    return value, slopes


_KINDS["divergence"], _OF_SLICES["divergence"] = _divergence, _divergence_of_slices
