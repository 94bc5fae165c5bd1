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
    """|X'Y|^2 for each pair; rows of a centred K sum to zero; the diagonal is subtracted where it is left out."""
    k, l = (torch.stack([s.P.square for s in sides]).double() for sides in (xs, ys))
    Y = torch.cat([s.P.z for s in ys], 1)
    # which columns of Y belong to which layer: a product with it adds them up in order
    owner = torch.block_diag(*(Y.new_ones(s.P.z.shape[1], 1) for s in ys)).double()
    for place, side in enumerate(xs):
        X = side.P.z
        sums.kl[place] = (X.mT @ Y).square_().sum(0, dtype=torch.float64) @ owner
    for sides, square in ((xs, sums.kk), (ys, sums.ll)):
        for place, side in enumerate(sides):
            square[place] = (side.P.z.mT @ side.P.z).square_().sum(dtype=torch.float64)
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


class Layers:
    """The layers of one network for one batch, each reduced as soon as it comes to the smaller of what it needs.

    A Gram matrix [n, n] replaces the rows where it is no larger than they are and all of them fit into `BYTES`; else
    prepared rows are kept, for feature space or for tiles. `put` leaves x to its owner: changing it in place later, or
    freeing it, does no harm.
    """

    def __init__(self, most: int, together: int, kernel: Kernel, problem: Problem, dtype, first: bool = True):
        # most: layers that may come; together: those of both networks
        self.most, self.together, self.kernel, self.problem = most, together, kernel, problem
        self.dtype, self.first = dtype, first
        # kept from batch to batch: fresh memory costs more than the product in it, and small tensors that outlive large
        # ones keep a heap from shrinking
        self.buffer, self.scales = None, None  # [most, n, n] and [most]
        self.clear()

    def clear(self):
        """Ready for the next batch."""
        self.n, self.grams = 0, None
        self.sides, self.widths = [], []

    def __len__(self) -> int:
        return len(self.widths)

    @property
    def units(self):
        """K = unit K^, [L] float64."""
        return self.scales[: len(self)]

    @property
    def spec(self):
        return self.problem.kx if self.first else self.problem.ky

    def put(self, x, place: int | None = None) -> int:
        """x [n, p] as the next layer, or in the place of one that is there; the place it has."""
        self.n = x.shape[0]
        side = side_of(x, self.kernel, self.problem, self.dtype, self.first)
        place = len(self) if place is None else place
        if place == len(self):
            self.sides.append(None)
            self.widths.append(None)
        if self.scales is None or self.scales.device != x.device:
            self.scales = side.P.unit.new_empty(self.most)
        self.scales[place], self.widths[place], self.sides[place] = side.P.unit, x.shape[1], side
        if self.fits and not (self.spec.linear and x.shape[1] < self.n):
            self.gram(place)
        return place

    @property
    def fits(self) -> bool:
        return edge(self.n, self.together, self.dtype.itemsize) == self.n

    def gram(self, place: int):
        """K of one layer takes the place of its rows."""
        if self.grams is None:
            like = self.sides[place].left
            if self.buffer is None or self.buffer.shape[1] != self.n or self.buffer.device != like.device:
                self.buffer = like.new_empty(self.most, self.n, self.n)
            self.grams = self.buffer
        self.grams[place] = whole(self.sides[place], self.problem)
        self.sides[place] = None

    def all_grams(self):
        for place, side in enumerate(self.sides):
            if side is not None:
                self.gram(place)
        return self.grams[: len(self)]

    def with_means(self) -> list[Side]:
        return [side._replace(u=panels.landmark_means(side, None)) for side in self.sides]


def hsics(A: Layers, B: Layers) -> Hsics:
    """HSIC of all pairs; B may be A."""
    n, problem, same = A.n, A.problem, B is A
    sums = Sums(len(A), len(B), n, A.units)
    kept = A.grams is None and B.grams is None
    if kept and in_feature_space(problem, n, A.widths, B.widths):
        feature_sums(sums, A.sides, B.sides, problem.unbiased)
    elif A.fits:
        everything, K = slice(0, n), A.all_grams()
        sums.add(K, K if same else B.all_grams(), everything, everything)
    else:
        tile_sums(sums, A.with_means(), None if same else B.with_means(), problem)
    return sums.finish(problem, n, (A.units, B.units), torch.finfo(A.dtype).eps, same)


def tile_sums(sums: Sums, xs: list[Side], ys: list[Side] | None, problem: Problem):
    """Each unordered pair of blocks once; ys None: those of xs."""
    n, item = xs[0].left.shape[0], xs[0].left.element_size()
    step = edge(n, len(xs) + len(ys or ()), item)
    blocks = [slice(start, min(start + step, n)) for start in range(0, n, step)]
    for place, i in enumerate(blocks):
        for j in blocks[place:]:
            K = torch.stack([tile(s, problem, i, j) for s in xs])
            sums.add(K, K if ys is None else torch.stack([tile(s, problem, i, j) for s in ys]), i, j)
