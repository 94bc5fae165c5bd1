# SPDX-License-Identifier: Apache-2.0
"""Launches of the small schedule: from tensors and a problem to kernel arguments and a configuration."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton

from .. import call as calls
from ..call import Call, Problem
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


class Arguments(NamedTuple):
    """One side as the kernels take it: the caller's rows, or prepared ones where they need a pass first."""

    rows: Rows
    side: Side
    prepared: Prepared | None


def _arguments(side: calls.Side, mask, problem: Problem) -> Arguments:
    x, spec, sigma = side
    if max(128 * x.stride(1), 64 * x.stride(2)) >= 2**31:  # offsets inside a tile are 32-bit
        x = x.contiguous()
    prepared = alpha = typical = None
    # cosine needs norms and a polynomial its mean before any product: both sides are then prepared in PyTorch
    if any(of.name in ("cosine", "polynomial") for of in (problem.kx, problem.ky)):
        prepared = prepare(side._replace(features=x), mask, problem, torch.float32)
        x, typical = prepared.z, prepared.typical
        alpha = None if prepared.alpha is None else prepared.alpha.contiguous()
        kernel = map_of(spec, None if prepared.par is None else prepared.par.contiguous())
    elif len(spec.params) == 1 or not spec.of_distance:
        kernel = map_of(spec, None, spec.params)
    else:
        kernel = map_of(spec, bandwidths(spec, sigma, x.new_empty(0, dtype=torch.float32)).contiguous())
    shift = prepared is None and (problem.stable or spec.of_distance)
    rows = Rows(x, *x.stride(), x.shape[2], constant(shift))
    return Arguments(rows, Side(kernel, alpha, typical), prepared)


def _mask_arguments(mask):
    """The mask as bytes, and the first kept row of each group: the one that is subtracted from the others."""
    if mask is None:
        return None, None
    return mask.contiguous().view(torch.uint8), mask.to(torch.uint8).argmax(1)


def _asked(problem: Problem) -> Asked:
    flags = (problem.stable, problem.unbiased, problem.center, problem.row_normalize, problem.mean, problem.minimum)
    return Asked(STATS[problem.stat], *map(constant, flags))


def forward(call: Call):
    problem, need, x = call.problem, call.need, call.x.features
    G, n, _ = x.shape
    a, b = (_arguments(side, call.mask, problem) for side in call.sides)
    keep, ref = _mask_arguments(call.mask)
    part, square, splits = _launch_split(a.rows, b.rows, keep, ref)
    new = lambda *shape, dtype=torch.float32: x.new_empty(shape, dtype=dtype)  # noqa: E731
    value, saved, kept = new(G), new(G, SAVED.value, n) if need else None, new(2, G, n, width_of(n)) if need else None
    unit = None if a.prepared is None else torch.stack([a.prepared.unit, b.prepared.unit])
    fused, asked = n <= FUSED_ROWS, _asked(problem)
    stats = None if fused else new(G, STAT_ROWS.value, n, dtype=torch.float64)
    block = max(16, triton.next_power_of_2(n)) if fused else SUMS_BLOCK
    step, warps = FUSED_SUMS if fused else SPLIT_SUMS
    row_sums[(triton.cdiv(n, block) * G,)](
        a.side, b.side, part, square, keep, kept, stats, value, saved, unit, n, G, splits, asked,
        BM=block, BN=step, num_warps=warps,
    )  # fmt: skip
    if not fused:
        block = triton.next_power_of_2(n)
        finish[(G,)](stats, keep, value, saved, unit, n, G, asked, BLOCK=block, num_warps=4)
    return value, *((saved, kept) if need else (new(0), new(0)))


def _launch_split(x: Rows, y: Rows, keep, ref):
    """Splits fill the machine about twice; the partial sums are added in their order, so results repeat bit for bit."""
    G, n, _ = x.ptr.shape
    half = x.ptr.dtype != torch.float32 and y.ptr.dtype != torch.float32
    count, shared = machine(x.ptr.device)
    config = split_config(n, half, shared)
    blocks = triton.cdiv(n, config.tile)
    steps = triton.cdiv(max(x.width, y.width), config.depth)
    busy = blocks * (blocks + 1) // 2 * 2 * G
    splits = max(1, min(128, steps, 2 * count // busy))
    pers = (triton.cdiv(triton.cdiv(rows.width, config.depth), splits) * config.depth for rows in (x, y))
    part = x.ptr.new_empty((2, splits, G, n, width_of(n)), dtype=torch.float32)
    square = x.ptr.new_empty((2, splits, G, n), dtype=torch.float32)
    split_gram[(blocks * blocks * 2 * G, splits)](
        x.ptr, y.ptr, part, square, keep, ref, n, x.width, y.width, G, splits, *x[1:4], *y[1:4], *pers,
        BM=config.tile, BK=config.depth, SHIFT_X=x.shift, SHIFT_Y=y.shift, PRECISION=precision(x.ptr, y.ptr),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return part, square, splits


def backward(call: Call, saved, grad):
    problem, mask, need = call.problem, call.mask, call.need
    both = tuple(_arguments(side, mask, problem) for side in call.sides)
    masks = _mask_arguments(mask)
    grad = grad.float().contiguous()
    out = [None] * 4
    for own, (features, spec, sigma) in enumerate(call.sides):
        if not call.sides_asked[own]:
            continue
        prepared = both[own].prepared
        want_sigma = bool(need & (0b100 << own))
        dz, sums, dsigma = _launch_backward(call, grad, both, masks, saved, own, want_sigma)
        if need & (1 << own):
            out[own] = dz if prepared is None else unprepare_gradient(dz, sums, features, prepared, spec, mask)
        if want_sigma:
            per_group = dsigma.sum(1) if prepared is None else dsigma.sum(1) * prepared.scale
            out[2 + own] = sigma_gradient(per_group, sigma)
    return tuple(out)


def _launch_backward(call: Call, grad, both, masks, saved, own: int, want_sigma: bool):
    """dz or the gradient itself, row sums of V and the gradient of sigma, None where there is none."""
    a, b = both[own], both[1 - own]
    x, (keep, ref), (rows, kept) = a.rows.ptr, masks, saved
    G, n, p = x.shape
    prepared = a.prepared is not None
    new = lambda shape: torch.empty(shape, dtype=torch.float32, device=x.device)  # noqa: E731
    dx = new((G, n, p)) if prepared else torch.empty((G, n, p), dtype=x.dtype, device=x.device)
    sums, dsigma = new((G, n)) if prepared else None, new((G, n)) if want_sigma else None
    BM, BN, BP, warps, stages = BACKWARD_FLOAT if x.dtype == torch.float32 else BACKWARD_HALF
    weighted_rows[(triton.cdiv(n, BM) * G * triton.cdiv(p, BP),)](
        a.rows, a.side, b.side, grad, kept, rows, keep, ref, dx, sums, dsigma, n, G, own, _asked(call.problem),
        BM=BM, BN=BN, BP=BP, PRECISION=precision(x), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dx, sums, dsigma
