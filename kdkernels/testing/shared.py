# SPDX-License-Identifier: Apache-2.0
"""What specs share: dtypes, which combinations of options a quick run keeps, small tiles, caps of products."""

from __future__ import annotations

import contextlib
import itertools
from unittest import mock

import torch

from .case import Caps

HALF, SINGLE, DOUBLE = (torch.float16, torch.bfloat16), torch.float32, torch.float64
# of one side, and of two that differ
ONE_DTYPE = (SINGLE, *HALF, DOUBLE)
EVERY_DTYPE = (*ONE_DTYPE, (torch.float16, SINGLE), (SINGLE, torch.bfloat16))


def grid(quick: bool, every: int, *axes, steps=(1, 1, 1)):
    """(count, one value of each axis) of all combinations. quick keeps one in `every`, as a Latin square does: those
    whose places along the axes, times `steps`, sum to a multiple, so that each value still meets most of the others."""
    for count, places in enumerate(itertools.product(*map(enumerate, axes)), 1):
        if not quick or sum(step * i for step, (i, _) in zip(steps, places, strict=True)) % every == 0:
            yield count, *(value for _, value in places)


def one_in(quick: bool, every: int, *axes):
    """The same of all combinations, or of every `every`-th."""
    for count, values in enumerate(itertools.product(*axes), 1):
        if not (quick and count % every):
            yield count, *values


def some_rows(shape, generator):
    """A mask that leaves every estimator enough rows, and drops the last."""
    keep = torch.rand(shape, generator=generator) > 0.3
    keep[..., :4] = True
    keep[..., -1] = False
    return keep


@contextlib.contextmanager
def instead(*places):
    """Inside, each of (owner, name, value) holds: an attribute of a module, an entry of a dict."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in places:
            of_dict = isinstance(owner, dict)
            patch = mock.patch.dict(owner, {name: value}) if of_dict else mock.patch.object(owner, name, value)
            stack.enter_context(patch)
        yield


def small_blocks(blocks: dict[str, int], elements: int):
    """`blocks`, the largest block of each kind of device, holds `elements` inside: a few rows, as large inputs have."""
    return instead(*((blocks, kind, elements) for kind in blocks))


def product_caps(backend: str):
    """Of values and gradients that are products of two factors: float32 sums, on Triton tf32 for half inputs."""

    def of(dtype: torch.dtype) -> Caps:
        if dtype == DOUBLE:
            return Caps(1e-13, 1e-12)
        if dtype == SINGLE or backend != "triton":
            return Caps(1e-6, 3e-6)
        # two rounded factors, forward and again backward: four times 2^-12 at most, 2^-11 typically
        return Caps(1e-3, 2e-3)

    return of


def cases_of(**families):
    """A spec's `cases(op, backend, quick)` from `family(op, backend, quick, generator)` of each op.

    The cases of one op, a few hundred; quick keeps each value of each option and leaves out combinations.
    """

    def cases(op: str, backend: str, quick: bool):
        return families[op](op, backend, quick, torch.Generator().manual_seed(0))

    return cases
