# SPDX-License-Identifier: Apache-2.0
"""HSIC of all layer pairs in one pass over tiles: a Gram tile is computed once a layer, not once a pair.

With K_l and L_m the centred Gram matrices of L and M layers, S_KL of all pairs is one product of their flattened tiles,
[L, tile] @ [tile, M]; every other sum belongs to one layer. Memory: prepared rows and (L + M) tiles, at most `BYTES` of
them at a time. Linear and cosine kernels take feature space, |X_l' Y_m|^2, where that is less work. The letters, and
what keeps float32 sums from cancelling, are those of gram/MATH.md; how memory stays bounded stands in MATH.md, 4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import backend as backends
from ..autograd import device_type
from ..gram.bandwidth import sigma_of
from ..gram.call import Problem, Question, Side, minimum_rows
from ..gram.kernels import Kernel
from ..gram.torch_impl import panels, prepared
from ..gram.torch_impl.combine import constant, estimator
from ..gram.torch_impl.panels import Pairs
from ..gram.torch_impl.prepared import Tiled, centre, prepare

BYTES = 64 << 20  # of the tiles of all layers that exist at a time
LEAST_TILE = 128  # edge below which a tile's products no longer fill the processor
LEAST_TIGHT = 32  # where memory is what counts
START = 4  # Gram matrices for which there is room at first
TOGETHER = 2  # layers whose rows meet those of another in one product
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


def problem_of(kernels: tuple[Kernel, Kernel], unbiased: bool) -> Problem:
    return Question("cka", kernels, unbiased, True, False, True).problem(kernels)


def centring(backend: str):
    """How a backend centres rows."""
    return backends.implementation("kdkernels.gram", backend).STEPS.centre


def side_of(x, kernel: Kernel, problem: Problem, dtype, first: bool = True, centre=centre) -> Tiled:
    """x [n, p] prepared: centred where the kernel allows, scaled, its bandwidth known."""
    spec = problem.kx if first else problem.ky
    P = prepare(Side(x[None], spec, sigma_of(kernel, x, None)), None, problem, dtype, centre)
    return prepared.side_of(P, spec, problem.stable).group(0)


def tile(side: Tiled, problem: Problem, i: slice, j: slice):
    """K^_ij - u_i - u_j, the diagonal 0 where the estimator leaves it out."""
    K = prepared.kernel(side, prepared.product(side, i, j), i, j)
    if side.u is not None:
        K = K.sub_(side.u[i][:, None]).sub_(side.u[j])
    return Pairs(problem, side, side, None).only_counted(K, i, j, False)


def whole(side: Tiled, problem: Problem):
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

    def __init__(self, layers: int, others: int, n: int, like, own=None):
        # own: kk and a, where they are known
        zeros = lambda *shape: torch.zeros(shape, dtype=torch.float64, device=like.device)  # noqa: E731
        self.known = own is not None
        self.kk, self.a = own if self.known else (zeros(layers), zeros(layers, n))
        self.kl, self.ll, self.b = zeros(layers, others), zeros(others), zeros(others, n)

    def add(self, K, L, i: slice, j: slice):
        """K [L, r, c], L [M, r, c], a tile that stands for its transpose too where i and j differ; L may be K."""
        twice = 1 if i == j else 2
        self.kl += twice * products(K, L)
        sides = ((K, None, self.a),) if L is K else ((K, self.kk, self.a), (L, self.ll, self.b))
        for tiles, square, row in sides[self.known :]:
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
        kk = form.c * (self.kk - form.r * row_squares(self.a) + form.s * A * A)
        ll = form.c * (self.ll - form.r * row_squares(self.b) + form.s * B * B)
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
    """Sums of squares along the last dimension, float64 from here on."""
    return torch.linalg.vector_norm(K, dim=-1).double().square()


def in_feature_space(problem: Problem, n: int, widths, others, tight: bool = False) -> bool:
    """Whether products of features are less work than tiles: the rule of the Gram family, for all pairs together.

    A tile's element costs its product, p, about 20 operations' worth of traffic, and its share of L M products; in the
    small tiles of a `tight` budget far more than the traffic is what each call costs.
    """
    if not (problem.kx.linear and problem.ky.linear):
        return False
    squares = sum(p * p for p in widths) + sum(q * q for q in others)
    features = sum(widths) * sum(others) + squares
    layers, cost = len(widths) + len(others), 400 if tight else 20
    return 2 * features < n * (sum(widths) + sum(others) + cost * layers + len(widths) * len(others))


def feature_sums(sums: Sums, xs: list[Tiled], ys: list[Tiled], unbiased: bool):
    """|X'Y|^2 for each pair; rows of a centred K sum to zero; the diagonal is subtracted where it is left out."""
    for start in range(0, len(ys), TOGETHER):
        part = slice(start, start + TOGETHER)
        Y = torch.cat([s.P.z for s in ys[part]], 1)
        # which rows of Y'X belong to which layer: a product with it adds them up in order
        owner = torch.block_diag(*(Y.new_ones(1, s.P.z.shape[1]) for s in ys[part])).double()
        for place, side in enumerate(xs):
            sums.kl[place, part] = owner @ row_squares(Y.mT @ side.P.z)
    for sides, square, row in ((xs, sums.kk, sums.a), (ys, sums.ll, sums.b))[sums.known :]:
        for place, side in enumerate(sides):
            square[place] = row_squares(side.P.z.mT @ side.P.z).sum()
            if unbiased:
                row[place] -= side.P.square
        square -= row_squares(row)
    sums.kl -= sums.a @ sums.b.mT


def edge(n: int, layers: int, item: int, budget: int | None = None) -> int:
    """The tile's edge, so that a tile of each layer fits into `budget` bytes; None: BYTES, in tiles not too small."""
    least, fits = (LEAST_TILE, BYTES) if budget is None else (LEAST_TIGHT, budget)
    return min(n, max(least, min(panels.TILE, int((fits / (layers * item)) ** 0.5) // 16 * 16)))


class Layers:
    """The layers of one network for one batch, each reduced as soon as it comes to the smaller of what it needs.

    A Gram matrix [n, n] replaces rows that are at least as wide, where those of all layers fit into `BYTES`; else
    prepared rows are kept, for feature space or for tiles. `put` leaves x to its owner: changing it in place later, or
    freeing it, does no harm.
    """

    def __init__(
        self, most: int, together: int, kernel: Kernel, problem: Problem, dtype, first: bool = True, centre=centre
    ):
        # most: layers that may come; together: those that are held at a time, of both networks
        self.most, self.together, self.kernel, self.problem = most, together, kernel, problem
        self.dtype, self.first, self.centre = dtype, first, centre
        self.expected = START  # Gram matrices there is room for at first
        # kept from batch to batch: fresh memory costs more than the product in it, and small tensors that outlive large
        # ones keep a heap from shrinking
        self.grams, self.scales, self.scratch = None, None, None  # [slots, n, n], [most], a tile of each layer
        self.clear()

    def clear(self):
        """Ready for the next batch."""
        self.n, self.own = 0, None
        self.sides, self.widths, self.slots = [], [], {}  # slots: where the Gram matrix of a place is

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
        side = side_of(x, self.kernel, self.problem, self.dtype, self.first, self.centre)
        place = len(self) if place is None else place
        if place == len(self):
            self.sides.append(None)
            self.widths.append(None)
        if self.scales is None or self.scales.device != x.device:
            self.scales = side.P.unit.new_empty(self.most)
        self.scales[place], self.widths[place] = side.P.unit, x.shape[1]
        if self.fits and x.shape[1] >= self.n:
            self.gram(place, side)
        else:
            self.sides[place] = light(side)
        return place

    @property
    def fits(self) -> bool:
        return edge(self.n, self.together, self.dtype.itemsize) == self.n

    def gram(self, place: int, side: Tiled):
        """K of one layer takes the place of its rows."""
        slot, like = self.slots.setdefault(place, len(self.slots)), side.left
        if self.grams is None or self.grams.shape[1] != self.n or self.grams.device != like.device:
            room = self.expected if self.grams is None else len(self.grams)
            self.grams = None  # gone before the next one comes
            self.grams = like.new_empty(min(max(room, 1), self.most), self.n, self.n)
        if slot == len(self.grams):  # layers that never come to this must not take its room
            more = like.new_empty(min(slot + (slot + 1) // 2, self.most), self.n, self.n)
            more[:slot] = self.grams
            self.grams = more
        self.grams[slot] = whole(side, self.problem)
        self.sides[place] = None

    def all_grams(self):
        for place, side in enumerate(self.sides):
            if side is not None:
                self.gram(place, ready(side))
        order = [self.slots[place] for place in range(len(self))]
        return self.grams[: len(self)] if order == sorted(order) else self.grams[order]

    def budget(self) -> int | None:
        """Bytes for tiles: half of what the rows of these layers take; None where a kernel has no feature space.

        There small tiles cost three times the time, and `BYTES` is what bounds them.
        """
        if not (self.problem.kx.linear and self.problem.ky.linear):
            return None
        return self.n * sum(self.widths) * self.dtype.itemsize // 2

    def find_means(self):
        """u of the layers that have no Gram matrix."""
        for place, side in enumerate(self.sides):
            if side is not None and side.u is None:
                self.sides[place] = side._replace(u=panels.landmark_means(ready(side), None))

    def tiles(self, i: slice, j: slice):
        """[L, r, c] of rows i and columns j, until the next call."""
        shape = (len(self), i.stop - i.start, j.stop - j.start)
        size = shape[0] * shape[1] * shape[2]
        if self.scratch is None or len(self.scratch) < size or self.scratch.device != self.scales.device:
            self.scratch = torch.empty(size, dtype=self.dtype, device=self.scales.device)
        K = self.scratch[:size].view(shape)
        for place, side in enumerate(self.sides):
            K[place] = self.grams[self.slots[place], i, j] if side is None else tile(ready(side), self.problem, i, j)
        return K


def light(side: Tiled) -> Tiled:
    """Without what `ready` makes again from the rows."""
    return side._replace(left=None, right=None)


def ready(side: Tiled) -> Tiled:
    return prepared.side_of(side.P, side.spec, side.stable)._replace(u=side.u)


class Groups:
    """The layers of the second network, contracted with those of the first in groups as they come.

    Half of their rows (or Gram matrices) exist at a time; what the other half would take leaves room for tiles.
    """

    def __init__(self, A: Layers, most: int, kernel: Kernel):
        self.A, self.most, half = A, most, group(most)
        self.part = Layers(half, A.most + half, kernel, A.problem, A.dtype, False, A.centre)
        self.clear()

    def clear(self):
        self.n, self.found, self.pending = 0, {}, []
        self.part.clear()

    def __len__(self) -> int:
        return len(set(self.found) | set(self.pending))

    def put(self, x, place: int | None = None) -> int:
        """As `Layers.put`."""
        place, self.n = len(self) if place is None else place, x.shape[0]
        if self.n != self.A.n or self.n < minimum_rows(self.A.problem.unbiased, True):  # the caller says so, later
            self.found[place] = None
            return place
        self.part.expected = -(-self.part.most * len(self.A.slots) // len(self.A))
        self.part.put(x, self.pending.index(place) if place in self.pending else None)
        if place not in self.pending:
            self.pending.append(place)
        # feature space computes nothing again for a further group, so a smaller one will do
        half = 2 * len(self.pending) >= self.part.most
        if len(self.pending) == self.part.most or (half and fits_features(self.A, self.part, True)):
            self.contract()
        return place

    def contract(self):
        h = hsics(self.A, self.part, self.part.budget())
        for at, place in enumerate(self.pending):
            self.found[place] = h.kl[:, at], h.kk, h.ll[at]
        self.pending = []
        self.part.clear()

    def hsics(self) -> Hsics:
        if self.pending:
            self.contract()
        kl, kk, ll = zip(*(self.found[place] for place in range(len(self))), strict=True)
        return Hsics(torch.stack(kl, 1), kk[0], torch.stack(ll))


def group(layers: int) -> int:
    """How many of the second network's layers are held at a time."""
    return (layers + 1) // 2


def hsics(A: Layers, B: Layers, budget: int | None = None) -> Hsics:
    """HSIC of all pairs; B may be A. `budget`: bytes for tiles, None for `BYTES` or the Gram matrices of all layers.

    What belongs to A alone is computed once, however many B it meets.
    """
    n, problem, same = A.n, A.problem, B is A
    sums = Sums(len(A), len(B), n, A.units, None if same else A.own)
    only_grams = len(A.slots) == len(A) and len(B.slots) == len(B)
    if only_grams or (budget is None and A.fits and not fits_features(A, B, False)):
        everything, K = slice(0, n), A.all_grams()
        sums.add(K, K if same else B.all_grams(), everything, everything)
    elif fits_features(A, B, budget is not None):
        feature_sums(sums, A.sides, B.sides, problem.unbiased)
    else:
        tile_sums(sums, A, B, budget)
    A.own = sums.kk, sums.a
    return sums.finish(problem, n, (A.units, B.units), torch.finfo(A.dtype).eps, same)


def fits_features(A: Layers, B: Layers, tight: bool) -> bool:
    """Whether feature space is open to all pairs, and less work."""
    return not (A.slots or B.slots) and in_feature_space(A.problem, A.n, A.widths, B.widths, tight)


def tile_sums(sums: Sums, A: Layers, B: Layers, budget: int | None):
    """Each unordered pair of blocks once."""
    n, same = A.n, B is A
    step = edge(n, len(A) + (0 if same else len(B)), A.dtype.itemsize, budget)
    blocks = [slice(start, min(start + step, n)) for start in range(0, n, step)]
    for layers in (A,) if same else (A, B):
        layers.find_means()
    for place, i in enumerate(blocks):
        for j in blocks[place:]:
            K = A.tiles(i, j)
            sums.add(K, K if same else B.tiles(i, j), i, j)
