# SPDX-License-Identifier: Apache-2.0
"""Bandwidth rules of the distance kernels: sigma^2 = factor^2 * (median or mean of the squared distances), detached.

"median" is NumPy's (the mean of the two middle values) over all n^2 ordered pairs, the zero diagonal included, as in
Kornblith et al. 2019: exact up to `EXACT` samples, above that over a fixed strided subset of `EXACT` rows. "mean" is
the closed form 2 (mean |x|^2 - |mean x|^2), O(n p). Per group; a median of 0 falls back to the mean, a mean of 0 to 1.
An operator of its own, `kdkernels::gram_bandwidth`: traced, its index arithmetic would compile again for every n.
"""

import math

import torch

from .. import checks
from ..autograd import at_least_float32, device_type, register, without_autocast
from ..checks import outside

EXACT = 1024
NEAR = 16  # a median this far below the mean is one of near pairs, whose digits float32 squares of far ones round away


def bandwidth(x, mask, rule: str, factor: float):
    """sigma [G] for x [G, n, p], in at least float32."""
    return torch.ops.kdkernels.gram_bandwidth(x.detach(), mask, rule, factor)


def sigma_of(kernel, x, mask=None, rule=bandwidth):
    """The bandwidth as a tensor [1] or [G], or None where the kernel has none or it is a number."""
    sigma = kernel.sigma
    if isinstance(sigma, torch.Tensor):
        check_place(sigma, x)
        return sigma.to(x.device).reshape(-1)
    if not kernel.has_rule:
        return None
    if x.dim() == 2:
        x, mask = x[None], None if mask is None else mask[None]
    return rule(x, mask, *sigma)


def check_place(sigma, x):
    """A tensor of one value may lie on any device that has values."""
    if sigma.device.type == "meta":
        checks.same_device(sigma, x, "sigma", "x")


def sampled(n: int, device=None) -> torch.Tensor:
    """Which of n rows the median reads."""
    few = min(n, EXACT)
    return torch.arange(few, device=device) * n // few


def bandwidth_over(x, mask, rule: str, factor: float, over=lambda total: total):
    """over: from a sum over these rows to the one over all rows, for a "mean" where x is a part of them."""
    dtype = at_least_float32(x)
    mean, found = _squares(x.to(dtype), mask, rule, over)
    if _rounded(mean, found):
        mean, found = _squares(x.double(), mask, rule, over)
    s2 = mean if found is None else torch.where(found > 0, found, mean)
    return (factor * torch.where(s2 == 0, torch.ones_like(s2), s2).sqrt()).to(dtype)


def _rounded(mean, median) -> bool:
    """Whether float32 squares have lost what is asked."""
    if outside(mean, 1e-30, 1e30):
        return True
    return median is not None and mean.is_cpu and outside(median / mean, 1 / NEAR, math.inf)


def _squares(x, mask, rule: str, over):
    """Mean [G] of the squared distances, and their median where that is the rule."""
    if rule == "median" and x.shape[1] > EXACT:
        rows = sampled(x.shape[1], x.device)
        x, mask = x[:, rows], None if mask is None else mask[:, rows]
    count = over(x.shape[1])
    if mask is not None:
        x = torch.where(mask[..., None], x, torch.zeros_like(x))
        count = over(mask.sum(1)).clamp(min=1)
    mean = over(x.sum(1, keepdim=True)) / (count if mask is None else count[:, None, None])
    x = x - mean if mask is None else torch.where(mask[..., None], x - mean, torch.zeros_like(x))
    square = x.square().sum(-1)
    s2 = 2 * over(square.sum(1)) / count
    return s2, _median(x, square, mask, None if mask is None else count) if rule == "median" else None


@torch.no_grad()
def bandwidth_of_all(x, mask, rule: str, factor: float, group):
    """`bandwidth` of the rows of all ranks, [G, n, p] on this one; group: a `distributed.Agreed`.

    The mean sends p + 1 numbers. The median reads at most `EXACT` rows, in one process too: those are gathered.
    """
    if rule == "mean":
        over = lambda own: group.total if isinstance(own, int) else group.sum(own)  # noqa: E731
        return bandwidth_over(x, mask, rule, factor, over)
    pair = group.rows_at(sampled(group.total), *(None if t is None else t.transpose(0, 1) for t in (x, mask)))
    return bandwidth(*(None if t is None else t.transpose(0, 1) for t in pair), rule, factor)


def _bandwidth(x, mask, rule, factor):
    with without_autocast(device_type(x)):
        return bandwidth_over(x, mask, rule, factor)


def _median(x, square, mask, count):
    """Of the n^2 values, n are the diagonal's zeros and every other one stands twice: one triangle is enough.

    Without a mask the two middle places are known and selected, O(n^2); with one they are read off a sort.
    """
    n = x.shape[1]
    i, j = torch.triu_indices(n, n, offset=1, device=x.device)
    d2 = (square[:, :, None] + square[:, None, :] - 2 * x @ x.mT)[:, i, j].clamp(min=0)
    if mask is not None:
        d2 = torch.where(mask[:, i] & mask[:, j], d2, torch.inf)
    if d2.shape[1] == 0:
        return torch.zeros_like(square[:, 0])
    if count is None:
        places = sorted({max(0, (place - n) // 2 + 1) for place in ((n * n - 1) // 2, n * n // 2)})
        values = [d2.kthvalue(place, 1).values if place else torch.zeros_like(d2[:, 0]) for place in places]
        return torch.stack(values).mean(0)
    ordered = torch.cat([torch.zeros_like(d2[:, :1]), d2.sort(1).values], 1)
    total = count * count
    lower, upper = (_place(position, count) for position in ((total - 1) // 2, total // 2))
    values = ordered.gather(1, torch.stack([lower, upper], 1).clamp(max=ordered.shape[1] - 1))
    return values.mean(1)


def _place(position, count):
    """Index into [0, sorted triangle] of the value at `position` among all count^2 sorted values."""
    return torch.where(position < count, 0, (position - count) // 2 + 1)


def _fake(x, mask, rule, factor):
    return x.new_empty(x.shape[0], dtype=at_least_float32(x))


register("gram_bandwidth", "(Tensor x, Tensor? mask, str rule, float factor) -> Tensor", _bandwidth, _fake)
