# SPDX-License-Identifier: Apache-2.0
"""Gram space in tiles: K and L exist one tile at a time, and each pair (i, j) is visited once.

A tile of K^ costs one matrix product; its row sums serve (i, j), its column sums (j, i). Up to `SMALL` samples the
whole matrix is one tile for all groups together and its products t are kept for the backward pass; above that nothing
n x n exists, and the backward pass computes the tiles again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..call import SMALL, Call, Problem, Steps
from . import prepared
from .combine import RowStats, Weights
from .prepared import Tiled, diagonal, prepare

LANDMARKS = 64  # rows whose mean stands in for the row mean of K^ above SMALL
TILE = 1024  # edge of a tile above SMALL: 4 MB in float32, so a tile and its temporaries stay in cache


class Pairs(NamedTuple):
    """Both sides and which pairs count."""

    problem: Problem
    x: Tiled
    y: Tiled
    weight: torch.Tensor | None  # [..., n] 1 for a row that counts, 0 for a masked one

    @property
    def n(self) -> int:
        return self.x.left.shape[-2]

    @property
    def small(self) -> bool:
        return self.n <= SMALL

    def group(self, g: int) -> Pairs:
        weight = None if self.weight is None else self.weight[g]
        return self._replace(x=self.x.group(g), y=self.y.group(g), weight=weight)

    def gram(self, side: Tiled, t, i, j):
        """K^ - u_i - u_j on a tile, zero for the pairs that do not count."""
        K = prepared.kernel(side, t, i, j)
        if side.u is not None:
            K = K - side.u[..., i][..., None] - side.u[..., j][..., None, :]
        return self.only_counted(K, i, j, K is t)

    def only_counted(self, K, i, j, shared: bool):
        if self.weight is not None:
            K = K * self.weight[..., i][..., None] * self.weight[..., j][..., None, :]
        elif self.problem.unbiased and i == j and shared:
            K = K.clone()
        if self.problem.unbiased and i == j:
            K.diagonal(dim1=-2, dim2=-1).zero_()
        return K


def tiles(n: int, small: bool):
    """Row and column slices that cover each unordered pair of blocks once."""
    edge = n if small else TILE
    starts = range(0, n, edge)
    for k, i in enumerate(starts):
        for j in starts[k:]:
            yield slice(i, min(i + edge, n)), slice(j, min(j + edge, n))


def build(call: Call, dtype, steps: Steps, kept_only=(False, False)) -> Pairs:
    """Both sides prepared; one that is `kept_only`, linear with its products kept, is never looked at again."""
    problem, mask, sides = call.problem, call.mask, []
    for side, skip in zip(call.sides, kept_only, strict=True):
        if skip:
            sides.append(Tiled(None, side.spec, problem.stable, None, None))
        else:
            P = prepare(side, mask, problem, dtype, steps.centre, steps.rescale)
            sides.append(prepared.side_of(P, side.spec, problem.stable))
    return Pairs(problem, *sides, None if mask is None else mask.to(dtype))


def landmarks(n: int, device) -> torch.Tensor:
    """Which of n rows stand in for all of them: a fixed strided subset."""
    return torch.arange(0, n, max(1, n // LANDMARKS), device=device)


def landmark_means(side: Tiled, weight, subset=None, t=None) -> torch.Tensor | None:
    """u_i = mean_{j in S} K^_ij - mean/2 over a fixed subset S of rows: takes most of what cancels out of K^.

    t: the products of all rows and those of S, where they are at hand.
    """
    if not side.stable or side.spec.linear:
        return None
    everything = slice(0, side.P.square.shape[-1])
    if t is None:
        subset = landmarks(everything.stop, side.left.device)
        t = prepared.product(side, everything, subset)
    K = prepared.kernel(side, t, everything, subset)
    w = torch.ones_like(side.P.square) if weight is None else weight
    w = w.index_select(-1, subset)
    total = w.sum(-1, keepdim=True).clamp(min=1)
    row = (K * w[..., None, :]).sum(-1) / total
    return row - (row.index_select(-1, subset) * w).sum(-1, keepdim=True) / (2 * total)


def exact_means(K, weight):
    """u_i = mean_j K_ij - mean/2 of a kept K^ whose uncounted pairs are zero."""
    total = K.shape[-1] if weight is None else weight.sum(-1, keepdim=True).clamp(min=1)
    row = K.sum(-1) / total
    return row - row.sum(-1, keepdim=True) / (2 * total)


def moments(K, L, columns: bool):
    """float64 sums a, b, kk, kl, ll over rows (and columns) of a tile: [5, ..., r], [5, ..., c]."""
    if K.shape[-1] <= SMALL:
        K, L = K.double(), L.double()
    terms = (K, L, K * K, K * L, L * L)
    rows = torch.stack([t.sum(-1, dtype=torch.float64) for t in terms])
    return rows, torch.stack([t.sum(-2, dtype=torch.float64) for t in terms]) if columns else None


def moments_of(problem: Problem, K, L, columns: bool, run=moments):
    """The same by `run`, where the one statistic of K - L takes the place of kl for "mse"."""
    if problem.stat != "mse":
        return run(K, L, columns)
    rows, cols = run(K, K - L, columns)
    rows[3] = rows[4]
    if columns:
        cols[3] = cols[4]
    return rows, cols


class Sums(NamedTuple):
    """What a pass over all pairs found."""

    stats: RowStats
    u: tuple = (None, None)  # the row means of both sides, [G, n]
    products: list | None = None  # t of both sides, where they are kept
    scale: torch.Tensor | None = None  # [2, G] a power of two by which K and L were multiplied here


def row_sums(pairs: Pairs, run=moments) -> Sums:
    """The sums over all pairs; run: the moments of a tile."""
    if pairs.small:
        i = slice(0, pairs.n)
        t, u, grams = [prepared.product(side, i, i) for side in (pairs.x, pairs.y)], [], []
        scale = _scaled(t) if pairs.problem.stat == "row_mse" else None
        for side, products in zip((pairs.x, pairs.y), t, strict=True):
            K, means = prepared.kernel(side, products, i, i), None
            K = pairs.only_counted(K, i, i, K is products)
            if side.stable and not side.spec.linear:  # rows of a centred linear K sum to about zero by themselves
                means = exact_means(K, pairs.weight)
                K = pairs.only_counted(K.sub_(means[..., None]).sub_(means[..., None, :]), i, i, False)
            u.append(means)
            grams.append(K)
        K, L = grams
        rows, _ = moments_of(pairs.problem, K, L, False, run)
        extra = _column_sums(pairs, K, L) if _needs_columns(pairs.problem) else (None, None)
        return Sums(RowStats(*rows, *extra), u, t, scale)
    groups, u = [], [[], []]
    for g in range(pairs.x.left.shape[0]):
        one = pairs.group(g)
        one = one._replace(
            x=one.x._replace(u=landmark_means(one.x, one.weight)), y=one.y._replace(u=landmark_means(one.y, one.weight))
        )
        groups.append(_tiled_stats(one, run))
        u[0].append(one.x.u)
        u[1].append(one.y.u)
    stats = [None if field[0] is None else torch.stack(field) for field in zip(*groups, strict=True)]
    return Sums(RowStats(*stats), [None if side[0] is None else torch.stack(side) for side in u])


def _scaled(t):
    """Powers of two that bring the mean diagonal of K and of L to about 1; both are multiplied in place.

    0 where the products have underflowed: what is left of them has no direction, and no power would bring it to 1.
    """
    mean = torch.stack([K.diagonal(dim1=-2, dim2=-1).mean(-1) for K in t])
    lost = mean < torch.finfo(mean.dtype).tiny
    scale = torch.exp2(torch.log2(torch.where(lost, 1, mean)).round_().neg_()).masked_fill_(lost, 0)
    for K, factor in zip(t, scale, strict=True):
        K.mul_(factor[:, None, None])
    return scale


def _needs_columns(problem: Problem) -> bool:
    return problem.row_normalize and problem.center


def rho_of(side: Tiled) -> torch.Tensor:
    """1 / sqrt(K^_ii), 0 for a zero row."""
    k = diagonal(side.P, side.spec)
    return torch.where(k == 0, torch.zeros_like(k), torch.where(k == 0, torch.ones_like(k), k).rsqrt()).double()


def _column_sums(pairs, K, L):
    """Column sums of the row-normalised matrices: aw_j = sum_i rho_i K_ij."""
    out = []
    for side, matrix in ((pairs.x, K), (pairs.y, L)):
        out.append((matrix.double() * rho_of(side)[..., None]).sum(-2))
    return out


def _tiled_stats(pairs: Pairs, run):
    n = pairs.n
    total = torch.zeros(7, n, dtype=torch.float64, device=pairs.x.left.device)
    rho = [rho_of(side) for side in (pairs.x, pairs.y)] if _needs_columns(pairs.problem) else None
    for i, j in tiles(n, False):
        K, L = (pairs.gram(side, prepared.product(side, i, j), i, j) for side in (pairs.x, pairs.y))
        rows, columns = moments_of(pairs.problem, K, L, i != j, run)
        total[:5, i] += rows
        if i != j:
            total[:5, j] += columns
        for k, matrix in enumerate((K, L) if rho else ()):
            total[5 + k, j] += rho[k][i] @ matrix.double()
            if i != j:
                total[5 + k, i] += matrix.double() @ rho[k][j]
    return [*total[:5], *(total[5:] if rho else (None, None))]


class Gradient(NamedTuple):
    dz: torch.Tensor  # [..., n, p] sum_j V_ij z_j
    row_sums: torch.Tensor  # [..., n] sum_j V_ij (left 0 for linear kernels, which do not use it)
    dsigma: torch.Tensor  # [...] with respect to sigma^


def apply(pairs: Pairs, weights: Weights, kept, want_sigma: bool) -> Gradient:
    """The gradient with respect to the x side: V = (c + c') dK^/dg^ times the rows (MATH.md, "Gradient")."""
    if pairs.small:
        return _apply_tiles(pairs, weights, kept, want_sigma)
    parts = []
    for g in range(pairs.x.left.shape[0]):
        parts.append(_apply_tiles(pairs.group(g), Weights(*(v[g] for v in weights)), None, want_sigma))
    return Gradient(*(torch.stack(field) for field in zip(*parts, strict=True)))


def _apply_tiles(pairs, weights, kept, want_sigma):
    x, z = pairs.x, pairs.x.P.z
    dz, row_sums = None if pairs.small else torch.zeros_like(z), torch.zeros_like(x.P.square)
    dsigma = torch.zeros(z.shape[:-2], dtype=torch.float64, device=z.device)
    row_norm = torch.zeros_like(x.P.square) if pairs.problem.row_normalize else None
    for i, j in tiles(pairs.n, pairs.small):
        V, sigma_sum = weighted_slopes(pairs, weights, kept, i, j, row_norm, want_sigma)
        if pairs.small:
            dz = V @ z
        else:
            dz[..., i, :] += V @ z[..., j, :]
        if not x.spec.linear:
            row_sums[..., i] += V.sum(-1)
        if want_sigma:
            dsigma += sigma_sum / 2 if i == j else sigma_sum
        if i != j:
            dz[..., j, :] += V.mT @ z[..., i, :]
            if not x.spec.linear:
                row_sums[..., j] += V.sum(-2)
    if row_norm is not None and not x.spec.of_distance:
        dz, row_sums = row_norm_diagonal(x, weights, row_norm, dz, row_sums)
    return Gradient(dz, row_sums, dsigma)


def weighted_slopes(pairs: Pairs, weights: Weights, kept, i, j, row_norm, want_sigma: bool):
    """V on a tile, and sum_ij W_ij dK^_ij/dsigma^ where it is wanted; sum_j c_ij K_ij is added to `row_norm`."""
    x = pairs.x
    t_x, t_y = kept if kept is not None else (prepared.product(side, i, j) for side in (pairs.x, pairs.y))
    K, L = pairs.gram(x, t_x, i, j), pairs.gram(pairs.y, t_y, i, j)
    W = _pair_weights(pairs, weights, K, L, i, j, row_norm)
    sigma_sum = None
    if want_sigma:
        sigma_sum = (W * prepared.sigma_slope(x.spec, t_x, x.parameters())).sum((-2, -1), dtype=torch.float64)
    V = prepared.slope(x, t_x, i, j)
    V = W if V is None else V.mul_(W)
    if x.spec.of_distance and i == j:  # a point has no distance to itself: keep its large k_ii out of the sums
        V.diagonal(dim1=-2, dim2=-1).zero_()
    return V, sigma_sum


def _pair_weights(pairs, weights, K, L, i, j, row_norm):
    """W_ij = c_ij + c_ji on a tile, zero for the pairs that do not count."""
    p, q, e, f, h = weights
    if not pairs.problem.rowwise:
        W = (L * (2 * p[..., :1, None])).addcmul_(K, 2 * q[..., :1, None])
        W += e[..., i][..., None]
        W += e[..., j][..., None, :]
        return pairs.only_counted(W, i, j, False)
    forward = p[..., i][..., None] * L + q[..., i][..., None] * K + e[..., i][..., None]
    backward = p[..., j][..., None, :] * L + q[..., j][..., None, :] * K + e[..., j][..., None, :]
    if f.shape[-1]:
        forward = forward + f[..., i][..., None] * h[..., j][..., None, :]
        backward = backward + h[..., i][..., None] * f[..., j][..., None, :]
        row_norm[..., i] += (forward * K).sum(-1)
        if i != j:
            row_norm[..., j] += (backward * K).sum(-2)
    return pairs.only_counted(forward + backward, i, j, False)


def row_norm_diagonal(x: Tiled, weights, row_norm, dz, row_sums):
    """1/sqrt(K_ii) also moves: an extra diagonal weight -rho_i^2 sum_j c_ij K_ij, times dK_ii/dg_ii."""
    d = -weights.f.square() * row_norm
    if x.spec.name == "polynomial":
        degree, (t0, a) = int(x.spec.params[0]), x.P.par.unbind(-1)
        d = d * degree * a[..., None] * (t0[..., None] + a[..., None] * x.P.square) ** (degree - 1)
    return dz + d[..., None] * x.P.z, row_sums + d
