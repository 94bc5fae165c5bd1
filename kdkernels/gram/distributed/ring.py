# SPDX-License-Identifier: Apache-2.0
"""Statistics of the rows of all ranks with memory linear in a rank's own: blocks of rows go round a ring of the ranks.

Every rank keeps its rows and meets those of rank r - 1, r - 2, ... one block at a time, the next one on its way while
one is looked at. A round gives the row sums of the rank's own rows; the statistic needs nothing of the others' but
their totals. In backward a second round brings the rows again, with the coefficients of their pair weights: these are
symmetric, so a rank finds the gradient of its own rows by itself and no gradient travels (MATH.md, "More than one
GPU", with the bytes).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from ... import distributed
from ...autograd import NoSecondDerivative, at_least_float32, device_type, without_autocast
from .. import bandwidth as rules
from .. import two_sample
from ..call import Call, Problem, Question, Rows, call_of, check_bandwidths, working_dtype
from ..torch_impl import panels, prepared
from ..torch_impl.combine import SIDE_ROWS, RowStats, combine, over_rows, pack_rows, unpack_weights
from ..torch_impl.forms import sigma_gradient
from ..torch_impl.panels import Pairs
from ..torch_impl.prepared import centre, prepare, unprepare_gradient
from . import rounds

# Bytes of all ranks' features from which the ring is taken. There gathering needs three to six times as much on every
# rank (bench/distributed_rows.py), and from there on that grows with the ranks; so do the pairs, N^2 / 2 on every rank,
# where the ring has N^2 / W. Below, one collective and the fused kernels are quicker. Set it on all ranks alike.
RING_FROM = 64 * 2**20


def chosen(x, y, group: distributed.Agreed) -> bool:
    """Whether rows go round the ring; the same answer on every rank, as ranks differ in their number of rows alone."""
    groups = x.shape[0] if x.dim() == 3 else 1
    row = x.shape[-1] * x.element_size() + y.shape[-1] * y.element_size()
    return len(group.rows) > 1 and groups * group.total * row >= RING_FROM


def statistic(question: Question, kernels, rows: Rows, group: distributed.Agreed):
    """The statistic of the rows of all ranks."""
    x, y, mask = rows
    check_bandwidths(kernels, x)
    grouped = x.dim() == 3
    if not grouped:
        x, y, mask = x[None], y[None], None if mask is None else mask[None]
    problem = question.problem(kernels)
    ring = Ring(problem, group, working_dtype(problem, x, y))
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


def mmd(kernel, unbiased, samples: Rows, groups):
    """MMD^2 between the rows x and y of all ranks: each rank holds its rows of both, joined, and their labels."""
    handle = groups[0].handle
    if isinstance(kernel.sigma, tuple) and kernel.sigma[0] == "median":
        kernel = type(kernel)(_median_of_both(samples, kernel.sigma[1], groups))
    rows = two_sample.joined(samples, unbiased, lambda own: distributed.sum_over(own, handle))
    return statistic(*two_sample.as_sum(kernel, unbiased), rows, joined(groups))


def _median_of_both(samples: Rows, factor, groups):
    """The rule of one process on x and then y: their rows stand in another order here."""
    x, y, masks = samples
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
            value, rows, sums = ring.forward(ring.call(x, y, mask, sigma_x, sigma_y))
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
    def forward(grad, *features_and_more):
        *features, rows, sums, ring, need = features_and_more
        with without_autocast(device_type(grad)):
            return ring.backward(grad, ring.call(*features, need), rows, sums)


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
        return self.problem.specs

    def with_means(self, k: int) -> bool:
        """Whether row means are taken out of the kernel matrix of side k; rows of a centred linear one have none."""
        return self.problem.stable and not self.specs[k].linear

    def call(self, x, y, mask, sigma_x, sigma_y, need: int = 0) -> Call:
        return call_of(self.problem, x, y, mask, (sigma_x, sigma_y), need)

    def sigma(self, kernel, x, mask):
        """`sigma_of`, where a rule sees all ranks' rows."""
        with without_autocast(device_type(x)):
            return rules.sigma_of(kernel, x, mask, partial(rules.bandwidth_of_all, group=self.group))

    def pairs(self, call: Call, overs, rows=None) -> Pairs:
        """Both sides of a block of rows prepared, to be multiplied by `_between`; rows: their vectors [G, 12, n]."""
        sides, mask = [], call.mask
        for k, side in enumerate(call.sides):
            of_all = partial(centre, over=overs[k])
            P = prepare(side, mask, self.problem, self.dtype, of_all, rescale=True)
            u = rows[:, SIDE_ROWS * k] if rows is not None and self.with_means(k) else None
            sides.append(prepared.Tiled(P, side.spec, self.problem.stable, None, None, u))
        return Pairs(self.problem, *sides, None if mask is None else mask.to(self.dtype))

    def told(self, sums):
        """What `prepare` asks the ranks, from their answers."""
        return [_told(self.group.total, known) for known in sums]

    def row_means(self, own: Pairs, call: Call, sums):
        """u [G, n] of each side, None where it has none, from rows that all ranks know."""
        sides = [side for k, side in enumerate((own.x, own.y)) if self.with_means(k)]
        if not sides:
            return [None, None]
        places = panels.landmarks(self.group.total, "cpu")
        x = call.x.features
        known = self.pairs(_of_block(call, *_rows_at(places, self.group, *_tensors(call))), self.told(sums))
        few = slice(0, len(places))
        within, own_square = _between(known, known, few, few)[1], torch.zeros_like(own.x.P.square)
        u = [own_square.clone() if self.with_means(k) else None for k in (0, 1)]
        for i in _panels(x):
            pairs, products, a, b = _between(own, known, i, few)
            subset = torch.arange(b.start, b.stop, device=x.device)
            for k, side in enumerate((pairs.x, pairs.y)):
                if u[k] is not None:
                    t = torch.cat([products[k], within[k]], -2)
                    u[k][:, i] = panels.landmark_means(side, pairs.weight, subset, t)[:, a]
        return u

    def travelling(self, need: int) -> list[int]:
        """Which of the 12 vectors of a row the others need: its means, and for a gradient its pair weights."""
        places = [SIDE_ROWS * k for k in (0, 1) if self.with_means(k)]
        for k in (0, 1):
            if need & (0b101 << k):
                last = 5 if self.problem.row_normalize else 3
                places += range(SIDE_ROWS * k + 1, SIDE_ROWS * k + 1 + last)
        return places

    def tiles(self, own: Pairs, call: Call, sums, rows):
        """Tiles of all pairs (i of this rank, j of any): i, their `Pairs`, vectors, products, the prepared rows j of
        both sides, and where i and j are in the pairs and the vectors: the same places on the diagonal.

        rows [G, 12, n], of which `travelling(call.need)` come along.
        """
        places, rank = self.travelling(call.need), torch.distributed.get_rank(self.group.handle)
        fields = [*(t for t in _tensors(call) if t is not None), rows[:, places].mT]
        for owner, (x_j, y_j, *mask_j, some) in rounds.around(fields, self.group.rows, self.group.handle):
            if owner == rank:
                other, vectors = own, rows
            else:
                vectors = rows.new_zeros(*rows.shape[:2], some.shape[1])
                vectors[:, places] = some.mT
                other = self.pairs(_of_block(call, x_j, y_j, *(mask_j or [None])), self.told(sums), vectors)
            for i in _panels(call.x.features):
                for j in _panels(x_j):
                    pairs, products, a, b = _between(own, other, i, j)
                    both = rows[..., i] if a is b else torch.cat([rows[..., i], vectors[..., j]], -1)
                    yield i, pairs, both, products, (other.x.P.z[:, j], other.y.P.z[:, j]), a, b

    def forward(self, call: Call):
        """value [G], the vectors u, p, q, e, f, h of both sides [G, 12, n], and what `prepare` asked the ranks."""
        problem, (x, y, mask), asking = self.problem, _tensors(call), [_Sums(self.group) for _ in range(2)]
        G, n = x.shape[:2]
        own = self.pairs(call, [shared.ask for shared in asking])
        sums, sides = [shared.known for shared in asking], (own.x, own.y)
        u = self.row_means(own, call, sums)
        rows = x.new_zeros(G, 2 * SIDE_ROWS, n, dtype=self.dtype)
        for k in (0, 1):
            if u[k] is not None:
                rows[:, SIDE_ROWS * k] = u[k]
        own = own._replace(x=own.x._replace(u=u[0]), y=own.y._replace(u=u[1]))
        columns = problem.row_normalize and problem.center
        total = x.new_zeros(7 if columns else 5, G, n, dtype=torch.float64)
        for i, pairs, _, products, _, a, b in self.tiles(own, call, sums, rows):
            matrices = [pairs.gram(side, t, a, b) for side, t in zip((pairs.x, pairs.y), products, strict=True)]
            total[:5, :, i] += panels.moments_of(problem, *matrices, False)[0]
            if columns:  # K is symmetric: the sum of a column weighted by rho is that of the row
                for k, side in enumerate((pairs.x, pairs.y)):
                    total[5 + k, :, i] += (matrices[k].double() * panels.rho_of(side)[:, None, b]).sum(-1)
        count = self.group.total if mask is None else self.group.sum(mask.sum(1))
        rho = [panels.rho_of(side) for side in sides] if problem.row_normalize else None
        eps, over = torch.finfo(self.dtype).eps, lambda t: self.group.sum(over_rows(t))
        units = [side.P.unit for side in sides]
        value, weights = combine(problem, RowStats(*total), count, eps, units, rho, (True, True), over)
        value, rows = pack_rows(value, weights, u, count, problem, 0b11, self.dtype)
        return value.to(at_least_float32(x, y)), rows, sums

    def backward(self, grad, call: Call, rows, sums):
        """dx, dy, dsigma_x, dsigma_y (None where bit 0, 1, 2, 3 of `need` is not set); grad [G]."""
        problem, need, (x, y, mask) = self.problem, call.need, _tensors(call)
        (G, n), asked = x.shape[:2], [k for k in (0, 1) if call.sides_asked[k]]
        grad = self.group.sum(grad.to(self.dtype))  # all ranks have one value, and each its own use for it
        own = self.pairs(call, self.told(sums), rows)
        dz = {k: torch.zeros_like((x, y)[k], dtype=self.dtype) for k in asked}
        row_sums = {k: x.new_zeros(G, n, dtype=self.dtype) for k in asked}
        norms = {k: x.new_zeros(G, n, dtype=self.dtype) for k in asked}
        dsigma = {k: x.new_zeros(G, dtype=torch.float64) for k in asked}
        for i, pairs, vectors, products, z, a, b in self.tiles(own, call, sums, rows):
            for k in asked:
                side, weights = _seen_from(pairs, k), unpack_weights(vectors, grad, k, problem)
                norm = torch.zeros_like(side.x.P.square)
                kept = products[:: 1 - 2 * k]
                V, part = panels.weighted_slopes(side, weights, kept, a, b, norm, bool(need & (0b100 << k)))
                dz[k][:, i] += V @ z[k]
                row_sums[k][:, i] += V.sum(-1)
                norms[k][:, i] += norm[:, a]
                if part is not None:
                    dsigma[k] += part
        out = [None] * 4
        for k in asked:
            side = _seen_from(own, k).x
            if need & (1 << k):
                gradient = dz.pop(k), row_sums[k]
                if problem.row_normalize and not side.spec.of_distance:
                    gradient = panels.row_norm_diagonal(
                        side, unpack_weights(rows, grad, k, problem), norms[k], *gradient
                    )
                out[k] = unprepare_gradient(*gradient, (x, y)[k], side.P, side.spec, mask)
            if need & (0b100 << k):
                # every pair was seen from both ends; each rank gets the mean over the ranks
                total = self.group.sum(dsigma[k]) / (2 * len(self.group.rows))
                out[2 + k] = sigma_gradient(total * side.P.scale, call.sides[k].sigma)
        return tuple(out)


def _tensors(call: Call):
    return call.x.features, call.y.features, call.mask


def _of_block(call: Call, x, y, mask) -> Call:
    """The same call of other rows."""
    return call._replace(x=call.x._replace(features=x), y=call.y._replace(features=y), mask=mask)


def _seen_from(pairs: Pairs, k: int) -> Pairs:
    """With side k first."""
    return pairs if k == 0 else Pairs(pairs.problem.swapped(), pairs.y, pairs.x, pairs.weight)


def _panels(x):
    """The rows of a block in slices: the tiles of all groups together are as large as one tile of `panels.py`."""
    edge = max(1, int(panels.TILE / x.shape[0] ** 0.5))
    return [slice(i, min(i + edge, x.shape[1])) for i in range(0, x.shape[1], edge)]


def _between(own: Pairs, other: Pairs, i, j):
    """(`Pairs` of the vectors of rows i and j alone, the products t of both sides, where i and j are among them)."""
    a = b = slice(0, i.stop - i.start)
    same = own is other and i == j
    if not same:
        b = slice(a.stop, a.stop + j.stop - j.start)

    def joined(mine, theirs):
        return mine if mine is None else mine[:, i] if same else torch.cat([mine[:, i], theirs[:, j]], 1)

    sides, products = [], []
    for mine, theirs in ((own.x, other.x), (own.y, other.y)):
        P, Q = mine.P, theirs.P
        vectors = P._replace(z=None, square=joined(P.square, Q.square), alpha=joined(P.alpha, Q.alpha))
        sides.append(mine._replace(P=vectors, u=joined(mine.u, theirs.u)))
        products.append(prepared.product_of(sides[-1], P.z[:, i], Q.z[:, j], a, b))
    return Pairs(own.problem, *sides, joined(own.weight, other.weight)), products, a, b
