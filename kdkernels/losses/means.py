# SPDX-License-Identifier: Apache-2.0
"""Means over the rows, or over the samples made of rows, that count: of this process, or of all ranks of a group."""

from __future__ import annotations

import torch

from ..autograd import at_least_float32


def check_normalizer(normalizer, reduction: str):
    """What replaces the number of rows as the divisor of the mean; None does not."""
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError("normalizer replaces the divisor of the mean: use it with reduction='mean'")
    if isinstance(normalizer, torch.Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer has shape {tuple(normalizer.shape)}: give one number to divide by")
    elif not normalizer > 0:
        raise ValueError(f"normalizer is {normalizer!r}: give a positive number to divide by")


def mean_of_rows(values, mask, normalizer, reduction: str = "mean", group=None):
    """Sum of `values` over the rows that count, divided by `normalizer`, or by their number for the mean.

    With a process group: the sum and the number are those of all ranks, and so is `normalizer`.
    """
    check_normalizer(normalizer, reduction)
    total = (values if mask is None else torch.where(mask, values, 0)).sum()
    if group is not None:
        total = group.sum(total)
    if normalizer is not None:
        if isinstance(normalizer, torch.Tensor):
            normalizer = normalizer.reshape(()).to(total.dtype)
            # nothing counted by nobody is 0, not 0 / 0
            normalizer = torch.where(normalizer == 0, torch.finfo(total.dtype).tiny, normalizer)
        return total / normalizer
    if reduction == "sum":
        return total
    if mask is None:
        return total / (values.numel() if group is None else group.total)
    return total / (mask.sum() if group is None else group.sum(mask.sum())).clamp_min(1)


def number_of_rows(x, mask, group=None):
    """How many rows of x [n] or [n, C] count, on all ranks, as a tensor that nobody waits for."""
    if mask is None:
        return x.new_full((), len(x) if group is None else group.total)
    return (mask.sum() if group is None else group.sum(mask.sum())).to(x.dtype)


def mean_of_groups(values, mask, least: int, group=None):
    """Mean over the groups in which the mask leaves enough rows, 0 if none does; values [] or [G].

    With a process group: [] is of the rows of all ranks, [G] of this rank's samples, and the mean is one over all.
    """
    if group is None:
        if mask is None:
            return values.mean() if values.dim() else values
        enough = mask.sum(-1) >= least
        return torch.where(enough, values, 0).sum() / enough.sum().clamp_min(1)
    if values.dim() == 0:
        return values if mask is None else torch.where(group.sum(mask.sum()) >= least, values, 0)
    enough = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.sum(-1) >= least
    both = torch.stack([torch.where(enough, values, 0).sum(dtype=torch.float64), enough.sum().double()])
    total, count = group.sum(both)
    return (total / count.clamp_min(1)).to(values.dtype)


def has_samples(x, group, least: int) -> bool:
    """False for samples [G, n, d] of a rank that has none, or none with enough rows, where other ranks may."""
    return group is None or x.dim() == 2 or (len(x) > 0 and x.shape[1] >= least)


def nothing_of(x, y):
    """The values [0] of no samples, which take part in backward as those of the other ranks do."""
    return x.flatten()[:0].to(at_least_float32(x, y))
