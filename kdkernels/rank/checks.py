# SPDX-License-Identifier: Apache-2.0
"""What the arguments of the ranking ops must be; each error names the caller's argument and the fix."""

from __future__ import annotations

import math

import torch

from ..checks import boolean, floating, integer, same_device

REGULARIZATIONS = ("l2", "kl")
LONGEST = 2**31 - 1  # positions are int32


def check_rows(x, dim, name: str = "x") -> int:
    """x may be ranked along dim; returns dim counted from the front."""
    floating(x, name)
    integer(dim, "dim", None)
    count = x.dim()
    if count == 0:
        raise ValueError(f"{name} is 0-d: ranks need at least one dimension")
    if not -count <= dim < count:
        raise ValueError(f"dim is {dim}: {name} has {count} dimensions, give one from {-count} to {count - 1}")
    dim %= count
    if x.shape[dim] > LONGEST:
        raise ValueError(f"{name} has {x.shape[dim]} elements along dim {dim}: a row may have {LONGEST}")
    return dim


def check_pair(x, y, dim) -> int:
    dim = check_rows(x, dim)
    floating(y, "y")
    same_device(x, y, "x", "y")
    if x.shape != y.shape:
        raise ValueError(f"y has shape {tuple(y.shape)}, x has {tuple(x.shape)}: rows are compared one to one")
    return dim


def present(x, mask):
    """x with what the mask leaves out absent, and with gradient 0 there."""
    if mask is None:
        return x
    boolean(mask, x, "x")
    if mask.shape != x.shape:
        if not broadcasts(mask.shape, x.shape):
            raise ValueError(f"mask has shape {tuple(mask.shape)}: it must broadcast to that of x, {tuple(x.shape)}")
    return x.masked_fill(~mask, -math.inf)


def broadcasts(shape, to) -> bool:
    return len(shape) <= len(to) and all(m in (1, n) for m, n in zip(shape[::-1], to[::-1], strict=False))


def absent(x):
    """What is no entry: -inf, and the least number of x's dtype, by which logits are padded. Asked before x is widened
    or negated; `widened` and `torch_impl.theta_of` leave -inf."""
    return x <= torch.finfo(x.dtype).min


def widened(x, dtype):
    return x if x.dtype == dtype else x.masked_fill(absent(x), -math.inf).to(dtype)


def check_regularization(regularization) -> bool:
    """Whether it is kl."""
    if regularization not in REGULARIZATIONS:
        raise ValueError(f"regularization is {regularization!r}: give 'l2' or 'kl'")
    return regularization == "kl"
