# SPDX-License-Identifier: Apache-2.0
"""HSIC of all layer pairs in one pass over tiles: a Gram tile is computed once a layer, not once a pair.

With K_l and L_m the centred Gram matrices of L and M layers, S_KL of all pairs is one product of their flattened tiles,
[L, tile] @ [tile, M]; every other sum belongs to one layer. Memory: prepared rows and (L + M) tiles, at most `BYTES` of
them at a time. Linear and cosine kernels take feature space, |X_l' Y_m|^2, where that is less work. The letters, and
what keeps float32 sums from cancelling, are those of gram/MATH.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import backend as backends
from ..autograd import device_type
from ..gram import maps, panels
from ..gram.combine import constant, estimator
from ..gram.kernels import Kernel
from ..gram.maps import Side
from ..gram.op import sigma_of
from ..gram.panels import Pairs
from ..gram.prepare import prepare
from ..gram.problem import Problem, decode, encode

BYTES = 64 << 20  # of the tiles of all layers that exist at a time
LEAST_TILE = 128  # edge below which a tile's products no longer fill the processor
BACKENDS = ("torch", "cpp", "reference")
PRODUCTS = 1 << 22  # entries of the row-wise products S_KL, before they are summed in float64


class Hsics(NamedTuple):
    """h(K_l, L_m) of all pairs and h of each layer with itself, float64; 0 for a layer that is constant."""

    kl: torch.Tensor  # [L, M]
    kk: torch.Tensor  # [L]
    ll: torch.Tensor  # [M]


def choose_backend(requested: str, tensor) -> str:
    """The family's plain ways only: there is no Triton kernel for many layers at once."""
    if requested == "auto":
        return "torch" if backends.obstacle("cpp", device_type(tensor), (), "cka") else "cpp"
    if requested not in BACKENDS:
        raise ValueError(f"backend is {requested!r}: comparing layers has {('auto', *BACKENDS)}")
    why = backends.obstacle(requested, device_type(tensor), (), "cka")
    if why is not None:
        raise RuntimeError(f"backend={requested!r} cannot compare layers here: {why}")
    return requested


def problem_of(kernels: tuple[Kernel, Kernel], unbiased: bool, backend: str) -> Problem:
    return decode(encode("cka", *kernels, unbiased, True, False, True, backend))


def side_of(x, kernel: Kernel, problem: Problem, dtype, first: bool = True) -> Side:
    """x [n, p] prepared: centred where the kernel allows, scaled, its bandwidth known."""
    spec = problem.kx if first else problem.ky
    P = prepare(x[None], None, spec, sigma_of(kernel, x, None), problem, dtype)
    return maps.side_of(P, spec, problem.stable).group(0)


def tile(side: Side, problem: Problem, i: slice, j: slice):
    """K^_ij - u_i - u_j, the diagonal 0 where the estimator leaves it out."""
    K = maps.kernel(side, maps.product(side, i, j), i, j)
    if side.u is not None:
        K = K.sub_(side.u[i][:, None]).sub_(side.u[j])
    return Pairs(problem, side, side, None).only_counted(K, i, j, False)


def whole(side: Side, problem: Problem):
    """The same for all n x n pairs, u the exact row means."""
    everything = slice(0, side.left.shape[0])
    K = tile(side, problem, everything, everything)
    if side.spec.linear:  # rows of a centred linear K sum to about zero by themselves
        return K
    u = panels.exact_means(K, None)
    K = K.sub_(u[:, None]).sub_(u)
    if problem.unbiased:
        K.diagonal().zero_()
    return K


class Sums:
    """Sums over pairs of all layers, added up tile by tile in float64."""

    def __init__(self, layers: int, others: int, n: int, like):
        zeros = lambda *shape: torch.zeros(shape, dtype=torch.float64, device=like.device)  # noqa: E731
        self.kl, self.kk, self.ll = zeros(layers, others), zeros(layers), zeros(others)
        self.a, self.b = zeros(layers, n), zeros(others, n)

    def add(self, K, L, i: slice, j: slice):
        """K [L, r, c], L [M, r, c], a tile that stands for its transpose too where i and j differ; L may be K."""
        twice = 1 if i == j else 2
        self.kl += twice * products(K, L)
        sides = ((K, None, self.a),) if L is K else ((K, self.kk, self.a), (L, self.ll, self.b))
        for tiles, square, row in sides:
            if square is not None:
                square += twice * row_squares(tiles).sum(-1)
            # a row of a tile is summed in its own dtype, pairwise, rows of tiles in float64
            row[:, i] += tiles.sum(-1)
            if i != j:
                row[:, j] += tiles.sum(-2)

    def finish(self, problem: Problem, n: int, units, eps: float, same: bool) -> Hsics:
        """The estimator, its last steps in float64; `units` [L] and [M]: K = unit K^."""
        ux, uy = units
        if same:
            self.kk = self.ll = self.kl.diagonal()
            self.b = self.a
        form = estimator(problem, float(n))
        A, B = self.a.sum(-1), self.b.sum(-1)
        kk = form.c * (self.kk - form.r * self.a.square().sum(-1) + form.s * A * A)
        ll = form.c * (self.ll - form.r * self.b.square().sum(-1) + form.s * B * B)
        kl = form.c * (self.kl - form.r * (self.a @ self.b.mT) + form.s * A[:, None] * B)
        flat_x, flat_y = constant(kk, self.kk, form, eps), constant(ll, self.ll, form, eps)
        kl = torch.where(flat_x[:, None] | flat_y, 0, kl)
        kk, ll = torch.where(flat_x, 0, kk), torch.where(flat_y, 0, ll)
        return Hsics(kl * ux[:, None] * uy, kk * ux * ux, ll * uy * uy)


def products(K, L):
    """S_KL [L, M] of tiles [L, r, c] and [M, r, c]: in the tiles' dtype along a row, in float64 over rows."""
    total = 0
    step = max(1, PRODUCTS // (len(K) * len(L)))
    for part in (slice(start, start + step) for start in range(0, K.shape[1], step)):
        each = torch.bmm(K[:, part].transpose(0, 1), L[:, part].permute(1, 2, 0))
        total = total + each.sum(0, dtype=torch.float64)
    return total


def row_squares(K):
    """sum_j K_ij^2 [L, r], float64 from here on."""
    return torch.linalg.vector_norm(K, dim=-1).double().square()


def in_feature_space(problem: Problem, n: int, widths, others) -> bool:
    """Whether products of features are less work than tiles: the rule of the Gram family, for all pairs together.

    A tile's element costs its product, p, about 20 operations' worth of traffic, and its share of L M products.
    """
    if not (problem.kx.linear and problem.ky.linear):
        return False
    squares = sum(p * p for p in widths) + sum(q * q for q in others)
    features = sum(widths) * sum(others) + squares
    layers = len(widths) + len(others)
    return 2 * features < n * (sum(widths) + sum(others) + 20 * layers + len(widths) * len(others))


def feature_sums(sums: Sums, xs: list[Side], ys: list[Side], unbiased: bool):
    """|X'Y|^2 for each pair; row sums x_i'(sum_j x_j); the diagonal |x_i|^2 |y_i|^2 subtracted where it is left out."""
    k, l = (torch.stack([s.P.square for s in sides]).double() for sides in (xs, ys))
    Y = torch.cat([s.P.z for s in ys], 1)
    # which columns of Y belong to which layer: a product with it adds them up in order
    owner = torch.block_diag(*(Y.new_ones(s.P.z.shape[1], 1) for s in ys)).double()
    for place, side in enumerate(xs):
        X = side.P.z
        sums.kl[place] = (X.mT @ Y).square_().sum(0, dtype=torch.float64) @ owner
    for sides, square, row in ((xs, sums.kk, sums.a), (ys, sums.ll, sums.b)):
        for place, side in enumerate(sides):
            Z = side.P.z
            square[place] = (Z.mT @ Z).square_().sum(dtype=torch.float64)
            row[place] = Z @ Z.sum(0)
    if unbiased:
        sums.kl -= k @ l.mT
        sums.kk -= k.square().sum(-1)
        sums.ll -= l.square().sum(-1)
        sums.a -= k
        sums.b -= l


def edge(n: int, layers: int, item: int) -> int:
    """The tile's edge, so that a tile of each layer fits into `BYTES`."""
    fits = int((BYTES / (layers * item)) ** 0.5) // 32 * 32
    return min(n, max(LEAST_TILE, min(panels.TILE, fits)))


def tile_sums(sums: Sums, xs: list[Side], ys: list[Side], problem: Problem, same: bool):
    n, item = xs[0].left.shape[0], xs[0].left.element_size()
    step = edge(n, len(xs) + (0 if same else len(ys)), item)
    if step == n:
        everything = slice(0, n)
        K = torch.stack([whole(s, problem) for s in xs])
        sums.add(K, K if same else torch.stack([whole(s, problem) for s in ys]), everything, everything)
        return
    xs = [s._replace(u=panels.landmark_means(s, None)) for s in xs]
    ys = xs if same else [s._replace(u=panels.landmark_means(s, None)) for s in ys]
    for i in (slice(start, min(start + step, n)) for start in range(0, n, step)):
        for j in (slice(start, min(start + step, n)) for start in range(i.start, n, step)):
            K = torch.stack([tile(s, problem, i, j) for s in xs])
            sums.add(K, K if same else torch.stack([tile(s, problem, i, j) for s in ys]), i, j)


def units_of(sides: list[Side]):
    return torch.stack([s.P.unit for s in sides])


def of_sides(xs: list[Side], ys: list[Side], problem: Problem, same: bool) -> Hsics:
    """HSIC of all pairs of prepared layers; `same`: ys are xs under one kernel function."""
    n = xs[0].left.shape[0]
    sums = Sums(len(xs), len(ys), n, xs[0].left)
    widths, others = ([s.P.z.shape[1] for s in sides] for sides in (xs, ys))
    if in_feature_space(problem, n, widths, others):
        feature_sums(sums, xs, ys, problem.unbiased)
    else:
        tile_sums(sums, xs, ys, problem, same)
    return sums.finish(problem, n, (units_of(xs), units_of(ys)), torch.finfo(xs[0].left.dtype).eps, same)
