# SPDX-License-Identifier: Apache-2.0
"""Statistics of the rows of all ranks with memory linear in a rank's own: blocks of rows go round a ring of the ranks.

Every rank keeps its rows and meets those of rank r - 1, r - 2, ... one block at a time, the next one on its way while
one is looked at. A round gives the row sums of the rank's own rows; the statistic needs nothing of the others' but
their totals. In backward a second round brings the rows again, with the coefficients of their pair weights: these are
symmetric, so a rank finds the gradient of its own rows by itself and no gradient travels (MATH.md, "More than one
GPU", with the bytes).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import distributed, rounds
from ..autograd import NoSecondDerivative, device_type, without_autocast
from . import bandwidth as rules
from . import maps, panels, two_sample
from .checks import check_bandwidths
from .combine import RowStats, combine, over_rows
from .kernels import spec_of
from .panels import Pairs
from .prepare import prepare, unprepare_gradient
from .problem import Problem, stated
from .torch_impl import SIDE_ROWS, compute_dtype, pack_rows, saved_dtype, sigma_gradient, unpack_weights

# Bytes of all ranks' features from which the ring pays. Below it gathering costs a rank less than 300 MiB (rows as they
# are, prepared, and a gradient) for two collectives and the fused kernels; from there on that memory grows with the
# number of ranks, and so do the pairs: all N^2 / 2 on every rank, where the ring has N^2 / W.
RING_FROM = 64 * 2**20


def chosen(x, y, group: distributed.Agreed) -> bool:
    """Whether rows go round the ring; the same answer on every rank, as ranks differ in their number of rows alone."""
    groups = x.shape[0] if x.dim() == 3 else 1
    row = x.shape[-1] * x.element_size() + y.shape[-1] * y.element_size()
    return len(group.rows) > 1 and groups * group.total * row >= RING_FROM


def statistic(stat, x, y, kernels, unbiased, center, row_normalize, mean, mask, group: distributed.Agreed):
    """The statistic of the rows of all ranks; arguments as `op._statistic` has them."""
    check_bandwidths(kernels, x)
    grouped = x.dim() == 3
    if not grouped:
        x, y, mask = x[None], y[None], None if mask is None else mask[None]
    problem = stated(stat, *kernels, unbiased, center, row_normalize, mean, "torch")
    ring = Ring(problem, group, saved_dtype(problem, x, y))
    with torch.no_grad(), without_autocast(device_type(x)):
        if mask is not None:
            # a group left with too few rows is one with none: what those rows hold, even NaN, reaches no gradient
            mask = mask & (group.sum(mask.sum(1)) >= ring.problem.minimum)[:, None]
    sigma_x, sigma_y = (ring.sigma(kernel, side, mask) for kernel, side in zip(kernels, (x, y), strict=True))
    value = _Statistic.apply(x, y, mask, sigma_x, sigma_y, ring)
    return value if grouped else value[0]


def joined(groups) -> distributed.Agreed:
    """The ranks with their rows of both samples."""
    return groups[0]._replace(rows=[sum(of) for of in zip(*(group.rows for group in groups), strict=True)])


def mmd(x, y, kernel, unbiased, masks, groups):
    """MMD^2 between the rows x and y of all ranks: each rank holds its rows of both, joined, and their labels."""
    handle, least = groups[0].handle, 2 if unbiased else 1
    if isinstance(kernel.sigma, tuple) and kernel.sigma[0] == "median":
        kernel = type(kernel)(_median_of_both(x, y, masks, kernel.sigma[1], groups))
    rows = torch.cat(two_sample.promoted(x, y), dim=-2)
    with torch.no_grad():
        marks, keep = two_sample.labels(x, y, masks, unbiased, least, lambda own: distributed.sum_over(own, handle))
    kernels = (kernel, spec_of("linear")[1])
    return statistic("sum", rows, marks, kernels, unbiased, False, False, True, keep, joined(groups))


def _median_of_both(x, y, masks, factor, groups):
    """The rule of one process on x and then y: their rows stand in another order here."""
    total, parts = sum(group.total for group in groups), []
    places = rules.sampled(total)
    if x.dim() == 2:
        x, y, masks = x[None], y[None], [None if mask is None else mask[None] for mask in masks]
    if any(mask is not None for mask in masks):
        full = (t.new_ones(t.shape[:2], dtype=torch.bool) for t in (x, y))
        masks = [every if mask is None else mask for mask, every in zip(masks, full, strict=True)]
    for side, mask, group, start in zip(two_sample.promoted(x, y), masks, groups, (0, groups[0].total), strict=True):
        own = places[(places >= start) & (places < start + group.total)] - start
        parts.append(_rows_at(own, group, side, mask))
    few, keep = (None if one is None else torch.cat([one, other], 1) for one, other in zip(*parts, strict=True))
    return rules.bandwidth(few, keep, "median", factor)


def _rows_at(places, group, *tensors):
    """`Agreed.rows_at` of [G, n, ...]."""
    found = group.rows_at(places, *(None if t is None else t.transpose(0, 1) for t in tensors))
    return [None if t is None else t.transpose(0, 1) for t in found]


class _Statistic(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, mask, sigma_x, sigma_y, ring):
        with without_autocast(device_type(x)):
            value, rows, sums = ring.forward(x, y, mask, (sigma_x, sigma_y))
        ctx.ring, ctx.sums_of_x = ring, len(sums[0])
        ctx.save_for_backward(x, y, mask, sigma_x, sigma_y, rows, *sums[0], *sums[1])
        return value

    @staticmethod
    def backward(ctx, grad):
        *features, rows = ctx.saved_tensors[:6]
        sums = ctx.saved_tensors[6 : 6 + ctx.sums_of_x], ctx.saved_tensors[6 + ctx.sums_of_x :]
        need = sum(ctx.needs_input_grad[place] << bit for bit, place in enumerate((0, 1, 3, 4)))
        run = _Gradient.apply if torch.is_grad_enabled() else _Gradient.forward
        dx, dy, *dsigma = run(grad, *features, rows, sums, ctx.ring, need)
        return dx, dy, None, *dsigma, None


class _Gradient(NoSecondDerivative):
    @staticmethod
    def forward(grad, x, y, mask, sigma_x, sigma_y, rows, sums, ring, need):
        with without_autocast(device_type(x)):
            return ring.backward(grad, x, y, mask, (sigma_x, sigma_y), rows, sums, need)


class _Sums:
    """Sums over the rows of all ranks, asked for in a fixed order: the ranks are asked once, later blocks are told."""

    def __init__(self, group: distributed.Agreed):
        self.group, self.known = group, []

    def ask(self, own):
        if isinstance(own, int):
            return self.group.total
        self.known.append(self.group.sum(own))
        return self.known[-1]


def _told(total: int, known):
    answers = iter(known)
    return lambda own: total if isinstance(own, int) else next(answers)


class Ring(NamedTuple):
    """What the ranks of a group compute together, of [G, n, p] and [G, n, q]; `dtype` of the work."""

    problem: Problem
    group: distributed.Agreed
    dtype: torch.dtype

    @property
    def specs(self):
        return self.problem[1:3]

    def with_means(self, k: int) -> bool:
        """Whether row means are taken out of the kernel matrix of side k; rows of a centred linear one have none."""
        return self.problem.stable and not self.specs[k].linear

    def sigma(self, kernel, x, mask):
        """The bandwidth as a tensor [1] or [G], None where it is a number or none; a rule sees all ranks' rows."""
        sigma = kernel.sigma
        if isinstance(sigma, torch.Tensor):
            return sigma.to(x.device).reshape(-1)
        if sigma is None or not isinstance(sigma[0], str):
            return None
        with without_autocast(device_type(x)):
            return rules.bandwidth_of_all(x, mask, *sigma, self.group)

    def pairs(self, x, y, mask, sigmas, sums, rows=None) -> Pairs:
        """Both sides of these rows prepared; rows: their vectors, as `spread` gives them."""
        sides = []
        for k, features in enumerate((x, y)):
            over = _told(self.group.total, sums[k])
            P = prepare(features, mask, self.specs[k], sigmas[k], self.problem, self.dtype, over)
            u = rows[:, SIDE_ROWS * k] if rows is not None and self.with_means(k) else None
            sides.append(maps.side_of(P, self.specs[k], self.problem.stable)._replace(u=u))
        return Pairs(self.problem, *sides, None if mask is None else mask.to(self.dtype))

    def row_means(self, x, y, mask, sigmas, sums):
        """u [G, n] of each side, None where it has none, from rows that all ranks know."""
        u = [x.new_zeros(x.shape[:2], dtype=self.dtype) if self.with_means(k) else None for k in (0, 1)]
        if u == [None, None]:
            return u
        known = _rows_at(panels.landmarks(self.group.total, "cpu"), self.group, x, y, mask)
        for i in _panels(x):
            joined = [
                None if t is None else torch.cat([t[:, i], some], 1)
                for t, some in zip((x, y, mask), known, strict=True)
            ]
            pairs, own = self.pairs(*joined, sigmas, sums), i.stop - i.start
            subset = torch.arange(own, joined[0].shape[1], device=x.device)
            for means, side in zip(u, (pairs.x, pairs.y), strict=True):
                if means is not None:
                    means[:, i] = panels.landmark_means(side, pairs.weight, subset)[:, :own]
        return u

    def travelling(self, need: int) -> list[int]:
        """Which of the 12 vectors of a row the others need: its means, and for a gradient its pair weights."""
        places = [SIDE_ROWS * k for k in (0, 1) if self.with_means(k)]
        for k in (0, 1):
            if need & (0b101 << k):
                last = 5 if self.problem.row_normalize else 3
                places += range(SIDE_ROWS * k + 1, SIDE_ROWS * k + 1 + last)
        return places

    def tiles(self, x, y, mask, rows, need: int):
        """Tiles of all pairs (i of this rank, j of any): (i, what `pairs` takes of their rows together, a, b).

        i is a slice of this rank's rows; a and b are those of i and of j among the rows together, both the same on the
        diagonal. rows [G, 12, n], of which `travelling(need)` come along.
        """
        places, rank = self.travelling(need), torch.distributed.get_rank(self.group.handle)
        fields = [x, y, *(() if mask is None else (mask,)), rows[:, places].mT]
        for owner, block in rounds.around(fields, self.group.rows, self.group.handle):
            for i in _panels(x):
                for j in _panels(block[0]):
                    a = b = slice(0, i.stop - i.start)
                    if owner == rank and i == j:
                        together = [t[:, i] for t in fields]
                    else:
                        together = [torch.cat([t[:, i], v[:, j]], 1) for t, v in zip(fields, block, strict=True)]
                        b = slice(a.stop, a.stop + j.stop - j.start)
                    vectors = rows.new_zeros(rows.shape[0], 2 * SIDE_ROWS, together[0].shape[1])
                    vectors[:, places] = together[-1].mT
                    yield i, (*together[:2], None if mask is None else together[2]), vectors, a, b

    def forward(self, x, y, mask, sigmas):
        """value [G], the vectors u, p, q, e, f, h of both sides [G, 12, n], and what `prepare` asked the ranks."""
        problem, (G, n), sums, units, rho = self.problem, x.shape[:2], [], [], []
        for k, features in enumerate((x, y)):
            shared = _Sums(self.group)
            P = prepare(features, mask, self.specs[k], sigmas[k], problem, self.dtype, shared.ask)
            sums.append(shared.known)
            units.append(P.unit)
            if problem.row_normalize:
                rho.append(panels.rho_of(maps.side_of(P, self.specs[k], problem.stable)))
        del P
        u = self.row_means(x, y, mask, sigmas, sums)
        rows = x.new_zeros(G, 2 * SIDE_ROWS, n, dtype=self.dtype)
        for k in (0, 1):
            if u[k] is not None:
                rows[:, SIDE_ROWS * k] = u[k]
        columns = problem.row_normalize and problem.center
        total = x.new_zeros(7 if columns else 5, G, n, dtype=torch.float64)
        for i, block, vectors, a, b in self.tiles(x, y, mask, rows, 0):
            pairs = self.pairs(*block, sigmas, sums, vectors)
            sides = (pairs.x, pairs.y)
            K, L = (pairs.gram(side, maps.product(side, a, b), a, b) for side in sides)
            total[:5, :, i] += panels.moments(K, L, problem, False)[0]
            if columns:  # K is symmetric: the sum of a column weighted by rho is that of the row
                for k, matrix in enumerate((K, L)):
                    total[5 + k, :, i] += (matrix.double() * panels.rho_of(sides[k])[:, None, b]).sum(-1)
        count = self.group.total if mask is None else self.group.sum(mask.sum(1))
        eps, over = torch.finfo(self.dtype).eps, lambda t: self.group.sum(over_rows(t))
        value, sides = combine(problem, RowStats(*total), count, eps, units, rho or None, (True, True), over)
        value, rows = pack_rows(value, sides, u, count, problem, 0b11, self.dtype)
        return value.to(compute_dtype(x, y)), rows, sums

    def backward(self, grad, x, y, mask, sigmas, rows, sums, need: int):
        """dx, dy, dsigma_x, dsigma_y (None where bit 0, 1, 2, 3 of `need` is not set); grad [G]."""
        problem, (G, n), asked = self.problem, x.shape[:2], [k for k in (0, 1) if need & (0b101 << k)]
        grad = self.group.sum(grad.to(self.dtype))  # all ranks have one value, and each its own use for it
        dz = {k: torch.zeros_like((x, y)[k], dtype=self.dtype) for k in asked}
        row_sums = {k: x.new_zeros(G, n, dtype=self.dtype) for k in asked}
        norms = {k: x.new_zeros(G, n, dtype=self.dtype) for k in asked}
        dsigma = {k: x.new_zeros(G, dtype=torch.float64) for k in asked}
        for i, block, vectors, a, b in self.tiles(x, y, mask, rows, need):
            pairs = self.pairs(*block, sigmas, sums, vectors)
            for k in asked:
                side, weights = _seen_from(pairs, k), unpack_weights(vectors, grad, k, problem)
                norm = torch.zeros_like(side.x.P.square)
                V, part = panels.weighted_slopes(side, weights, None, a, b, norm, bool(need & (0b100 << k)))
                dz[k][:, i] += V @ side.x.P.z[:, b]
                row_sums[k][:, i] += V.sum(-1)
                norms[k][:, i] += norm[:, a]
                if part is not None:
                    dsigma[k] += part
        out = [None] * 4
        for k in asked:
            if need & (1 << k):
                out[k] = torch.empty_like((x, y)[k])
            for i in _panels(x):
                block = [None if t is None else t[:, i] for t in (x, y, mask)]
                side = _seen_from(self.pairs(*block, sigmas, sums), k).x
                gradient = dz[k][:, i], row_sums[k][:, i]
                if problem.row_normalize and not side.spec.of_distance:
                    weights = unpack_weights(rows[..., i], grad, k, problem)
                    gradient = panels.row_norm_diagonal(side, weights, norms[k][:, i], *gradient)
                if need & (1 << k):
                    out[k][:, i] = unprepare_gradient(*gradient, block[k], side.P, side.spec, block[2])
            if need & (0b100 << k):
                # every pair was seen from both ends; each rank gets the mean over the ranks
                scale = self.pairs(*(None if t is None else t[:, :0] for t in (x, y, mask)), sigmas, sums)
                total = self.group.sum(dsigma[k]) / (2 * len(self.group.rows)) * _seen_from(scale, k).x.P.scale
                out[2 + k] = sigma_gradient(total, sigmas[k])
        return tuple(out)


def _seen_from(pairs: Pairs, k: int) -> Pairs:
    """With side k first."""
    return pairs if k == 0 else Pairs(pairs.problem.swapped(), pairs.y, pairs.x, pairs.weight)


def _panels(x):
    """The rows of a block in slices: the tiles of all groups together are as large as one tile of `panels.py`."""
    edge = max(1, int(panels.TILE / x.shape[0] ** 0.5))
    return [slice(i, min(i + edge, x.shape[1])) for i in range(0, x.shape[1], edge)]
