# SPDX-License-Identifier: Apache-2.0
"""Landmark selection in O(n m) memory: randomly pivoted Cholesky, k-means++, uniform, and the greedy pivot rule.

One uniform number a landmark, drawn before the loop; each step turns cumulative weights into an index on the device,
so nothing is read on the host. `kdkernels::select_landmarks` is an operator: traced, the loop would be unrolled.
"""

from __future__ import annotations

import torch

from .. import checks
from ..autograd import at_least_float32, device_type, register, without_autocast
from ..gram.kernels import spec_from
from . import maps
from .landmarks import bandwidths


def draws(x, m: int, method: str, generator):
    """Uniform numbers [m] (for "uniform" [n]: the keys of a random order) on x's device, from the generator's."""
    count = x.shape[0] if method == "uniform" else m
    device, own = checks.source(generator, x.device)
    if method == "greedy":
        return torch.zeros(count, dtype=torch.float64, device=x.device)
    return torch.rand(count, dtype=torch.float64, device=device, **own).to(x.device)


def select(x, mask, sigma, u, m: int, method: str, kernel: str):
    return torch.ops.kdkernels.select_landmarks(x.detach(), mask, sigma, u, m, method, kernel)


def _select(x, mask, sigma, u, m, method, kernel):
    keep = torch.ones_like(x[:, 0], dtype=torch.bool) if mask is None else mask
    if method == "uniform":
        return (u + ~keep).topk(m, largest=False).indices
    with without_autocast(device_type(x)):
        x = x.to(at_least_float32(x))
        x = x if mask is None else torch.where(mask[:, None], x, torch.zeros_like(x))
        spec = spec_from("rbf:1.0" if method == "kmeans++" else kernel)
        rows = maps.prepared_rows(spec, x, x.mean(0), x.dtype)
        half = rows.square().sum(1).div_(2)
        if method == "kmeans++":
            return _kmeans(spec, rows, half, keep, u)
        return _pivots(spec, rows, half, bandwidths(spec, sigma, rows), keep, u, method == "greedy")


def _pick(weight, free, keep, floor, u, greedy: bool):
    """The next index [1], by weight among the free rows; where none has any, among the free ones alike."""
    free = torch.where(free.any(), free, keep)
    weight = torch.where(free & (weight > floor), weight, torch.zeros_like(weight)).double()
    weight = torch.where((weight > 0).any(), weight, free.double())
    if greedy:
        return weight.argmax(0, keepdim=True)
    cumulative = weight.cumsum(0)
    return torch.searchsorted(cumulative, u * cumulative[-1:], right=True).clamp_(max=len(weight) - 1)


def _pivots(spec, rows, half, par, keep, u, greedy: bool):
    """Pivoted Cholesky of k(X, X) ~ F'F, pivots drawn by the residual diagonal (arXiv 2207.06503) or its largest."""
    n, m = rows.shape[0], u.shape[0]
    residual = maps.kernel_diagonal(spec, rows, par)
    floor = n * torch.finfo(rows.dtype).eps * residual.max()
    F, free, chosen = rows.new_empty(m, n), keep.clone(), []  # rows of F are columns of the factor
    for k in range(m):
        i = _pick(residual, free, keep, floor, u[k : k + 1], greedy)
        t = maps.tile(spec, rows, rows[i], half, half[i])
        column = maps.kernel_value(spec, t, par)[:, 0]
        if k:
            column = column - F[:k, i][:, 0] @ F[:k]
        pivot = column[i].clamp(min=torch.finfo(column.dtype).tiny)
        # a pivot that is rounding is no direction of its own: its column is left out of the factor
        F[k] = torch.where(residual[i] > floor, column * pivot.rsqrt(), torch.zeros_like(column))
        residual = (residual - F[k].square()).clamp_(min=0)
        free = free.index_fill(0, i, False)
        chosen.append(i)
    return torch.cat(chosen)


def _kmeans(spec, rows, half, keep, u):
    """k-means++ seeding: the first row alike, then by the squared distance to the nearest chosen one."""
    nearest, free, chosen = torch.full_like(half, torch.inf), keep.clone(), []
    weight = torch.ones_like(half)
    for k in range(u.shape[0]):
        i = _pick(weight, free, keep, 0.0, u[k : k + 1], False)
        nearest = torch.minimum(nearest, maps.tile(spec, rows, rows[i], half, half[i])[:, 0] * -2)
        weight = nearest
        free = free.index_fill(0, i, False)
        chosen.append(i)
    return torch.cat(chosen)


def _fake(x, mask, sigma, u, m, method, kernel):
    return x.new_empty(m, dtype=torch.int64)


register(
    "select_landmarks",
    "(Tensor x, Tensor? mask, Tensor? sigma, Tensor u, int m, str method, str kernel) -> Tensor",
    _select,
    _fake,
)
