# SPDX-License-Identifier: Apache-2.0
"""Launches of the small schedule: the shapes of a call and its problem make a plan, tensors go through it."""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import NamedTuple

import torch

from ...triton_launch import PLANS, Launch, Layout, cdiv, layout, power_of_2
from ..call import Call, Problem
from ..call import Side as GivenSide
from ..kernels import KernelSpec
from ..torch_impl.forms import sigma_gradient
from ..torch_impl.prepared import Prepared, bandwidths, prepare, unprepare_gradient
from .maps import constant, map_of, precision
from .matrices import width_of
from .small_gradient import pair_rows, weighted_rows
from .small_kernels import SAVED, STATS, Asked, Rows, Side, split_gram
from .small_sums import STAT_ROWS, finish, row_sums


class Config(NamedTuple):
    tile: int  # edge of a Gram tile in split_gram
    depth: int  # columns of x a step
    warps: int
    stages: int


# (largest n, half inputs, float32 inputs); unmeasured: chosen for 64 bytes of spills at most on sm_80, sm_90 and sm_100
SPLIT_CONFIGS = (
    (64, Config(64, 64, 8, 3), Config(64, 32, 4, 3)),
    (1024, Config(128, 32, 8, 3), Config(128, 32, 8, 3)),
)
# bytes a block may use from which on the large tile is taken: that of halves needs 98688, as sm_86 and sm_89 have; that
# of float32 needs 165632, with which sm_80 would spill 184
LARGE_SHARED = (101376, 200000)
FUSED_ROWS = 128  # up to here one program may hold all rows of a group
# row_sums in float64: (columns a step, warps)
FUSED_SUMS, SPLIT_SUMS = (32, 8), (32, 4)
FINISH_WARPS = 8
SUMS_BLOCK, SUMS_COLUMNS = 16, 128  # rows and columns of a program where there are several
BACKWARD_HALF = (64, 32, 64, 4, 3)  # BM, BN, BP, warps, stages
BACKWARD_FLOAT = (64, 32, 64, 4, 3)
PAIRS = (8, 64, 4)  # rows and columns at a time of pair_rows, warps
TERMS = "tf32x3"  # float32 products of two terms each
# cycles of the model in bench/model: a step of split_gram; bytes that a multiprocessor reads in one; another launch
STEP, READ, LAUNCH = 900, 16, 6000


class Split(NamedTuple):
    """How the forward pass is divided."""

    config: Config
    splits: int  # a power of two
    fused: bool  # row_sums finishes


def split_of(n: int, G: int, width: int, half: bool, count: int, shared: int) -> Split:
    """The least of what the products of a split take, and of what it takes to add the splits up."""
    config = _config(n, G, half, count, shared)
    steps, tiles = cdiv(width, config.depth), _tiles(n, config.tile)
    found = []
    for fused in (True, False) if n <= FUSED_ROWS else (False,):
        programs = 1 if fused else cdiv(n, SUMS_BLOCK) * cdiv(n, SUMS_COLUMNS)
        splits = 1
        while splits <= max(1, min(steps, (2 if config.tile == 64 else 1) * count // (2 * G * tiles))):
            reading = splits * n * n * 8 / READ / min(programs, max(1, count // G))
            found.append((cdiv(steps, splits) * STEP + reading + LAUNCH * (not fused), Split(config, splits, fused)))
            splits *= 2
    return min(found)[1]


def _config(n: int, G: int, half: bool, count: int, shared: int) -> Config:
    """The largest tile that is not larger than the matrix, and that leaves no more than half of the machine idle."""
    *small, large = (of_half if half else of_float for _, of_half, of_float in SPLIT_CONFIGS)
    fits = shared >= LARGE_SHARED[0 if half else 1] and 4 * G * _tiles(n, large.tile) >= count
    return small[0] if small and (n <= SPLIT_CONFIGS[0][0] or not fits) else large


def _tiles(n: int, tile: int) -> int:
    """On and above the diagonal."""
    blocks = cdiv(n, tile)
    return blocks * (blocks + 1) // 2


@cache
def machine(device: torch.device) -> tuple[int, int]:
    """How many multiprocessors it has, and the bytes of shared memory that a block may use; a CPU: one."""
    if device.type == "cpu":
        return 1, LARGE_SHARED[0]
    of = torch.cuda.get_device_properties(device)
    return of.multi_processor_count, getattr(of, "shared_memory_per_block_optin", LARGE_SHARED[0])


class _Plan:
    """What the shapes of a call decide: launches, the numbers they take, and the sizes of what is allocated."""

    def __init__(self, problem: Problem, how: str, need: int, x: Layout, y: Layout):
        n, p, q = *x.shape[-2:], y.shape[-1]
        G = x.shape[0] if len(x.shape) == 3 else 1
        half = x.dtype != torch.float32 and y.dtype != torch.float32
        count, shared = machine(x.device)
        (config, splits, fused), width = split_of(n, G, max(p, q), half, count, shared), width_of(n)
        # the partial sums are added in an order of their own, so results repeat bit for bit
        pers = (cdiv(cdiv(of, config.depth), splits) * config.depth for of in (p, q))
        shifts = [constant(not problem.prepared and (problem.stable or spec.of_distance)) for spec in problem.specs]
        steps = [side.stride if len(side.shape) == 3 else (0, *side.stride) for side in (x, y)]
        asked, rows = _asked(problem), max(16, power_of_2(n))
        self.split = Launch(
            split_gram, (_tiles(n, config.tile) * 2 * G, splits), BM=config.tile, BK=config.depth, SHIFT_X=shifts[0],
            SHIFT_Y=shifts[1], PRECISION=how, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        self.of_split = (n, p, q, G, splits, *steps[0], *steps[1], *pers)
        step, warps = FUSED_SUMS if fused else SPLIT_SUMS
        block, columns = (rows, max(step, rows)) if fused else (SUMS_BLOCK, SUMS_COLUMNS)
        across = cdiv(n, columns)
        self.sums = Launch(
            row_sums, (cdiv(n, block) * across * G,), BM=block, BN=step, COLUMNS=columns, ROWS=rows, SPLITS=splits,
            num_warps=warps,
        )  # fmt: skip
        self.finish = None if fused else Launch(finish, (G,), BLOCK=rows, COLUMNS=columns, num_warps=FINISH_WARPS)
        self.of_sums = (n, G, asked)
        self.gradients = [_Gradient(own, problem, how, (x, y)[own], shifts[own], steps[own], asked) for own in (0, 1)]
        self.lead, self.device, self.need = x.shape[:-2], x.device, need
        self.saved, self.kept = ((G, SAVED.value, n), (2, G, n, width)) if need else ((0,), (0,))
        # one allocation for what the launches tell each other: partial products, squares, statistics in float64; a
        # single split is where it is kept
        self.in_place = bool(need) and splits == 1
        self.squares = 0 if self.in_place else 2 * splits * G * n * width
        self.stats = self.squares + cdiv(2 * splits * G * n, 4) * 4
        self.workspace = self.stats + (0 if fused else 2 * across * G * STAT_ROWS.value * n)

    def forward(self, x, y, of_x: Side, of_y: Side, keep, ref, unit):
        device = self.device
        work = torch.empty(self.workspace, dtype=torch.float32, device=device)
        value = torch.empty(self.lead, dtype=torch.float32, device=device)
        saved = torch.empty(self.saved, dtype=torch.float32, device=device)
        kept = torch.empty(self.kept, dtype=torch.float32, device=device)
        part, square = kept if self.in_place else work, work[self.squares :]
        self.split(x, y, part, square, keep, ref, *self.of_split)
        stats = None if self.finish is None else work[self.stats :].view(torch.float64)
        to_keep, to_save = (kept, saved) if self.need else (None, None)
        self.sums(of_x, of_y, part, square, keep, to_keep, stats, value, to_save, unit, *self.of_sums)
        if stats is not None:
            self.finish(stats, keep, value, to_save, unit, *self.of_sums)
        return value, saved, kept

    def backward(self, own: int, x, of_x: Side, of_y: Side, grad, saved, keep, ref, prepared: bool):
        """The gradient of side `own`, or of its prepared rows, beside the row sums of V; that of sigma, row by row."""
        dsigma = None
        if self.need & (0b100 << own):
            dsigma = torch.empty(x.shape[:-1], dtype=torch.float32, device=self.device)
        return *self.gradients[own](x, of_x, of_y, grad, saved, keep, ref, prepared, dsigma), dsigma


plan_of = lru_cache(PLANS)(_Plan)
masked_plan_of = lru_cache(PLANS)(_Plan)  # a settled launch keeps which arguments are None: a mask has plans of its own


class _Gradient:
    """The launches of one side: V = (c_ij + c_ji) dK/dg, then its product with the rows."""

    def __init__(self, own: int, problem: Problem, how: str, side: Layout, shift, steps, asked: Asked):
        half, (*lead, n, p) = side.dtype != torch.float32, side.shape
        G = math.prod(lead)
        how = TERMS if half else how
        BM, BN, warps = PAIRS
        self.pairs = Launch(pair_rows, (cdiv(n, BM) * G,), BM=BM, BN=BN, PRECISION=how, num_warps=warps)
        self.of_pairs = (n, G, own, asked)
        BM, BN, BP, warps, stages = BACKWARD_HALF if half else BACKWARD_FLOAT
        self.product = Launch(
            weighted_rows, (cdiv(n, BM) * G * cdiv(p, BP),), BM=BM, BN=BN, BP=BP, PRECISION=how, num_warps=warps,
            num_stages=stages,
        )  # fmt: skip
        self.of_product = (n, G, own)
        self.rows, self.device, self.lead, self.weights = (
            (*steps, p, shift),
            side.device,
            (*lead, n),
            (G, n, width_of(n)),
        )
        # whether z_i itself takes part: of distances, and where its norm moves with it
        distance = problem.specs[own].of_distance
        self.moves = not problem.prepared if distance else problem.row_normalize

    def __call__(self, x, of_x: Side, of_y: Side, grad, saved, keep, ref, prepared: bool, dsigma):
        new = lambda shape: torch.empty(shape, dtype=torch.float32, device=self.device)  # noqa: E731
        weights, of_own = new(self.weights), new(self.lead) if self.moves else None
        sums = new(self.lead) if prepared else None
        dx = torch.empty(x.shape, dtype=x.dtype, device=self.device)
        rows, kept = saved
        self.pairs(of_x, of_y, grad, kept, rows, keep, weights, of_own, sums, dsigma, *self.of_pairs)
        self.product(Rows(x, *self.rows), grad, weights, of_own, rows, keep, ref, dx, *self.of_product)
        return dx, sums


def fits(*strides: int) -> bool:
    """Whether offsets inside a tile, which are 32-bit, reach rows with these strides."""
    return 128 * max(strides) < 2**31


class Given(NamedTuple):
    """One side as the kernels take it: the caller's rows, or prepared ones where they need a pass first."""

    rows: torch.Tensor
    side: Side
    prepared: Prepared | None


def _given(given: GivenSide, mask, problem: Problem) -> Given:
    x, spec, sigma = given
    x = x if fits(*x.stride()[1:]) else x.contiguous()
    # cosine needs norms and a polynomial its mean before any product: both sides are then prepared in PyTorch
    if problem.prepared:
        P = prepare(given._replace(features=x), mask, problem, torch.float32)
        alpha = None if P.alpha is None else P.alpha.contiguous()
        return Given(P.z, Side(map_of(spec, None if P.par is None else P.par.contiguous()), alpha, P.typical), P)
    return Given(x, side_of(spec, sigma, x), None)


def side_of(spec: KernelSpec, sigma, x) -> Side:
    if sigma is None and len(spec.params) <= 1:
        return _of_numbers(spec)
    return Side(map_of(spec, bandwidths(spec, sigma, x.new_empty(0, dtype=torch.float32)).contiguous()), None, None)


@lru_cache(PLANS)
def _of_numbers(spec: KernelSpec) -> Side:
    return Side(map_of(spec, None, spec.params), None, None)


def _planned(call: Call):
    """The plan of a call, its sides as the kernels take them, and the mask as bytes, beside the first kept row of each
    group: the one that is subtracted from the others."""
    problem, mask = call.problem, call.mask
    a, b = _given(call.x, mask, problem), _given(call.y, mask, problem)
    of = plan_of if mask is None else masked_plan_of
    plan = of(problem, precision(a.rows, b.rows, exact=TERMS), call.need, layout(a.rows), layout(b.rows))
    keep, ref = (None, None) if mask is None else (mask.contiguous().view(torch.uint8), mask.to(torch.uint8).argmax(1))
    return plan, a, b, keep, ref


@lru_cache(PLANS)
def _asked(problem: Problem) -> Asked:
    flags = (problem.stable, problem.unbiased, problem.center, problem.row_normalize, problem.mean, problem.minimum)
    return Asked(STATS[problem.stat], *map(constant, flags))


def forward(call: Call):
    plan, a, b, keep, ref = _planned(call)
    unit = None if a.prepared is None else torch.stack([a.prepared.unit, b.prepared.unit])
    return plan.forward(a.rows, b.rows, a.side, b.side, keep, ref, unit)


def backward(call: Call, saved, grad):
    plan, *both, keep, ref = _planned(call)
    grad = grad.float().contiguous()
    out = [None] * 4
    for own, (features, spec, sigma) in enumerate(call.sides):
        if not call.sides_asked[own]:
            continue
        (z, side, prepared), (_, other, _) = both[own], both[1 - own]
        dx, sums, dsigma = plan.backward(own, z, side, other, grad, saved, keep, ref, prepared is not None)
        if call.need & (1 << own):
            out[own] = dx if prepared is None else unprepare_gradient(dx, sums, features, prepared, spec, call.mask)
        if dsigma is not None:
            per_group = dsigma.sum(1) if prepared is None else dsigma.sum(1) * prepared.scale
            out[2 + own] = sigma_gradient(per_group, sigma)
    return tuple(out)
