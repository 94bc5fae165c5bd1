# SPDX-License-Identifier: Apache-2.0
"""What specs share of ops that are products of features: their caps, and how to force them into small blocks."""

from __future__ import annotations

import contextlib

import torch

from .case import Caps


@contextlib.contextmanager
def small_blocks(blocks: dict[str, int], elements: int):
    """`blocks`, the largest block of each kind of device, holds `elements` inside: a few rows, as large inputs have."""
    before = dict(blocks)
    blocks.update(dict.fromkeys(blocks, elements))
    try:
        yield
    finally:
        blocks.update(before)


def product_caps(backend: str):
    """Of values and gradients that are products of two factors: float32 sums, on Triton tf32 for half inputs."""

    def of(dtype: torch.dtype) -> Caps:
        if dtype == torch.float64:
            return Caps(1e-13, 1e-12)
        if dtype == torch.float32 or backend != "triton":
            return Caps(1e-6, 3e-6)
        # two rounded factors, forward and again backward: four times 2^-12 at most, 2^-11 typically
        return Caps(1e-3, 2e-3)

    return of
