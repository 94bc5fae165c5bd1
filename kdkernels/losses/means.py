# SPDX-License-Identifier: Apache-2.0
"""Means over the rows, or over the samples made of rows, that count: of this process, or of all ranks of a group."""

from __future__ import annotations

import torch

from ..autograd import at_least_float32
from ..gram.kernels import spec_of


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


def zero_where_masked(x, mask):
    """x [..., d] with the masked rows 0: exact for what ignores zero rows, and their gradient is 0 even at NaN."""
    return x if mask is None else torch.where(mask[..., None], x, torch.zeros((), dtype=x.dtype, device=x.device))


def with_spread(kernel, mask, group, x, *alike):
    """The student's rows x, and what lies in their space, with the gradient of a bandwidth that follows from x.

    Such a kernel function does not change where all is scaled, but its rule has no gradient: descent then shrinks the
    features for what the next bandwidth takes back. Here everything is divided by the change of the spread of x: by 1.
    """
    if not spec_of(kernel)[0].has_rule:
        return x, *alike
    x = zero_where_masked(x, mask)  # NaN there would reach the gradient
    mean, apart, size = spread(x, mask, group)
    change = (size.detach() / size - 1).to(mean.dtype)
    return x + apart * change, *(t + (t - mean) * change for t in alike)


def spread(x, mask, group=None):
    """The mean of the rows that count, [..., 1, d], what they have beside it, and the root of its mean square,
    [..., 1, 1] in float64, 1 where it is 0; with a process group, of the rows of all ranks.
    """
    over = group.sum if group is not None else lambda own: own
    x, n = x.to(at_least_float32(x)), x.shape[-2] if group is None else group.total
    if mask is not None:
        n = over(mask.sum(-1)).clamp_min(1)[..., None, None]
    mean = over(zero_where_masked(x, mask).sum(-2, keepdim=True)) / n
    apart = zero_where_masked(x - mean, mask)
    largest = apart.detach().abs().amax((-2, -1), keepdim=True) if x.shape[-2] else x.new_ones(())
    unit = apart / torch.where(largest == 0, 1, largest)  # no square leaves float32
    total = torch.linalg.vecdot(unit, unit).sum(-1, dtype=torch.float64)[..., None, None]
    square = over(total * largest.double().square()) / n
    return mean, apart, torch.where(square == 0, 1, square).sqrt()


def has_samples(x, group, least: int) -> bool:
    """False for samples [G, n, d] of a rank that has none, or none with enough rows, where other ranks may."""
    return group is None or x.dim() == 2 or (len(x) > 0 and x.shape[1] >= least)


def nothing_of(x, y):
    """The values [0] of no samples, which take part in backward as those of the other ranks do."""
    return x.flatten()[:0].to(at_least_float32(x, y))
