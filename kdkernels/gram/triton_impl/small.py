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
from .small_gradient import weighted_rows
from .small_kernels import SAVED, STAT_ROWS, STATS, Asked, Rows, Side, finish, row_sums, split_gram


class Config(NamedTuple):
    tile: int  # edge of a Gram tile in split_gram
    depth: int  # columns of x a step
    warps: int
    stages: int


# (largest n, half inputs, float32 inputs); unmeasured: chosen for 64 bytes of spills at most on sm_80, sm_90 and sm_100
SPLIT_CONFIGS = (
    (64, Config(64, 64, 8, 3), Config(64, 32, 4, 2)),
    (1024, Config(128, 32, 8, 3), Config(64, 32, 4, 2)),
)
LARGE_SHARED = 101376  # bytes a block may use on sm_86 and sm_89; the 128 x 128 tile needs 98560
FUSED_ROWS = 128  # up to here one program holds all rows of a group
# row_sums in float64: (columns a step, warps)
FUSED_SUMS, SPLIT_SUMS = (32, 8), (32, 4)
SUMS_BLOCK = 16  # rows of a program above FUSED_ROWS
BACKWARD_HALF = (64, 32, 64, 4, 3)  # BM, BN, BP, warps, stages
BACKWARD_FLOAT = (32, 32, 64, 4, 2)


def split_config(n: int, half: bool, shared: int = LARGE_SHARED) -> Config:
    limit, of_half, of_float = next(row for row in SPLIT_CONFIGS if n <= row[0] or shared < LARGE_SHARED)
    return of_half if half else of_float


@cache
def machine(device: torch.device) -> tuple[int, int]:
    """How many multiprocessors it has, and the bytes of shared memory that a block may use; a CPU: one."""
    if device.type == "cpu":
        return 1, LARGE_SHARED
    of = torch.cuda.get_device_properties(device)
    return of.multi_processor_count, getattr(of, "shared_memory_per_block_optin", LARGE_SHARED)


class _Plan:
    """What the shapes of a call decide: launches, the numbers they take, and the sizes of what is allocated."""

    def __init__(self, problem: Problem, how: str, need: int, x: Layout, y: Layout):
        n, p, q = *x.shape[-2:], y.shape[-1]
        G = x.shape[0] if len(x.shape) == 3 else 1
        half = x.dtype != torch.float32 and y.dtype != torch.float32
        count, shared = machine(x.device)
        config, width = split_config(n, half, shared), width_of(n)
        blocks = cdiv(n, config.tile)
        # splits fill the machine about twice; their sums are added in their order, so results repeat bit for bit
        busy = blocks * (blocks + 1) // 2 * 2 * G
        splits = max(1, min(128, cdiv(max(p, q), config.depth), 2 * count // busy))
        pers = (cdiv(cdiv(of, config.depth), splits) * config.depth for of in (p, q))
        shifts = [constant(not problem.prepared and (problem.stable or spec.of_distance)) for spec in problem.specs]
        steps = [side.stride if len(side.shape) == 3 else (0, *side.stride) for side in (x, y)]
        asked, fused = _asked(problem), n <= FUSED_ROWS
        self.split = Launch(
            split_gram, (blocks * blocks * 2 * G, splits), BM=config.tile, BK=config.depth, SHIFT_X=shifts[0],
            SHIFT_Y=shifts[1], PRECISION=how, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        self.of_split = (n, p, q, G, splits, *steps[0], *steps[1], *pers)
        block = max(16, power_of_2(n)) if fused else SUMS_BLOCK
        step, warps = FUSED_SUMS if fused else SPLIT_SUMS
        self.sums = Launch(row_sums, (cdiv(n, block) * G,), BM=block, BN=step, num_warps=warps)
        self.of_sums = (n, G, splits, asked)
        self.finish = None if fused else Launch(finish, (G,), BLOCK=power_of_2(n), num_warps=4)
        self.of_finish = (n, G, asked)
        self.gradients = [_gradient(side, how) for side in (x, y)]
        self.of_gradient = [(n, G, own, asked) for own in (0, 1)]
        self.rows = [(*step, side.shape[-1], shift) for side, step, shift in zip((x, y), steps, shifts, strict=True)]
        self.lead, self.device, self.need = x.shape[:-2], x.device, need
        self.saved, self.kept = ((G, SAVED.value, n), (2, G, n, width)) if need else ((0,), (0,))
        # one allocation for what the launches tell each other: partial products, squares, statistics in float64
        self.squares = 2 * splits * G * n * width
        self.stats = self.squares + cdiv(2 * splits * G * n, 4) * 4
        self.workspace = self.stats + (0 if fused else 2 * G * STAT_ROWS.value * n)

    def forward(self, x, y, of_x: Side, of_y: Side, keep, ref, unit):
        device = self.device
        part = torch.empty(self.workspace, dtype=torch.float32, device=device)
        square = part[self.squares :]
        value = torch.empty(self.lead, dtype=torch.float32, device=device)
        saved = torch.empty(self.saved, dtype=torch.float32, device=device)
        kept = torch.empty(self.kept, dtype=torch.float32, device=device)
        self.split(x, y, part, square, keep, ref, *self.of_split)
        stats = None if self.finish is None else part[self.stats :].view(torch.float64)
        to_keep, to_save = (kept, saved) if self.need else (None, None)
        self.sums(of_x, of_y, part, square, keep, to_keep, stats, value, to_save, unit, *self.of_sums)
        if stats is not None:
            self.finish(stats, keep, value, to_save, unit, *self.of_finish)
        return value, saved, kept

    def backward(self, own: int, x, of_x: Side, of_y: Side, grad, saved, keep, ref, prepared: bool):
        """The gradient of side `own`, or of its prepared rows, beside the row sums of V; that of sigma, row by row."""
        dx, sums, dsigma = torch.empty(x.shape, dtype=x.dtype, device=self.device), None, None
        if prepared:
            sums = torch.empty(x.shape[:-1], dtype=torch.float32, device=self.device)
        if self.need & (0b100 << own):
            dsigma = torch.empty(x.shape[:-1], dtype=torch.float32, device=self.device)
        rows, kept = saved
        self.gradients[own](
            Rows(x, *self.rows[own]), of_x, of_y, grad, kept, rows, keep, ref, dx, sums, dsigma, *self.of_gradient[own]
        )
        return dx, sums, dsigma


plan_of = lru_cache(PLANS)(_Plan)


def _gradient(side: Layout, how: str) -> Launch:
    half, (*G, n, p) = side.dtype != torch.float32, side.shape
    BM, BN, BP, warps, stages = BACKWARD_HALF if half else BACKWARD_FLOAT
    return Launch(
        weighted_rows, (cdiv(n, BM) * math.prod(G) * cdiv(p, BP),), BM=BM, BN=BN, BP=BP,
        PRECISION="ieee" if half else how, num_warps=warps, num_stages=stages,
    )  # fmt: skip


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
    plan = plan_of(problem, precision(a.rows, b.rows), call.need, layout(a.rows), layout(b.rows))
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
