# SPDX-License-Identifier: Apache-2.0
"""Launches of the small schedule: from tensors and a problem to kernel arguments and a configuration."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton

from ..call import Call, Problem, Side
from ..torch_impl.forms import sigma_gradient
from ..torch_impl.prepared import bandwidths, prepare, unprepare_gradient
from .maps import KINDS, precision
from .small_kernels import STATS, finish, row_sums, split_gram, weighted_rows


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
def machine(index: int | None) -> tuple[int, int]:
    """How many there are, and the bytes of shared memory that a block may use."""
    device = torch.cuda.get_device_properties(index)
    return device.multi_processor_count, getattr(device, "shared_memory_per_block_optin", LARGE_SHARED)


class SideArguments(NamedTuple):
    """One side as the kernels take it: the caller's rows, or prepared ones where they need a pass first."""

    rows: torch.Tensor
    alpha: torch.Tensor
    par: torch.Tensor
    par_stride: int
    sigma: float
    typical: torch.Tensor
    prepared: object
    shift: bool
    kind: int
    degree: int
    bandwidths: int
    has_par: bool

    @property
    def halve(self) -> bool:
        return self.shift and self.rows.dtype == torch.float16


def needs_pass(problem: Problem) -> bool:
    """Cosine needs norms and a polynomial its mean before any product: both sides are then prepared in PyTorch."""
    return any(spec.name in ("cosine", "polynomial") for spec in (problem.kx, problem.ky))


def side_arguments(side: Side, mask, problem: Problem) -> SideArguments:
    x, spec, sigma = side
    if max(128 * x.stride(1), 64 * x.stride(2)) >= 2**31:  # offsets inside a tile are 32-bit
        x = x.contiguous()
    prepared, rows, alpha, typical = None, x, x, x
    par, stride, number, has_par, count = x, 0, 1.0, False, max(1, len(spec.params) if spec.of_distance else 1)
    if needs_pass(problem):
        prepared = prepare(Side(x, spec, sigma), mask, problem, torch.float32)
        rows, has_par = prepared.z, prepared.par is not None
        alpha = rows if prepared.alpha is None else prepared.alpha.contiguous()
        typical = rows if prepared.typical is None else prepared.typical
        par = rows if prepared.par is None else prepared.par.contiguous()
        stride = par.stride(0) if has_par else 0
    elif spec.of_distance:
        if len(spec.params) == 1:
            number = spec.params[0]
        else:
            par, has_par = bandwidths(spec, sigma, torch.empty(0, dtype=torch.float32, device=x.device)), True
            par = par.contiguous()
            stride = par.stride(0) if par.shape[0] > 1 else 0
    shift = prepared is None and (problem.stable or spec.of_distance)
    degree = int(spec.params[0]) if spec.name == "polynomial" else 1
    kind = KINDS[spec.name]
    return SideArguments(rows, alpha, par, stride, number, typical, prepared, shift, kind, degree, count, has_par)


def _mask_arguments(mask, x):
    """The mask as bytes, and the first kept row of each group: the one that is subtracted from the others."""
    if mask is None:
        return x, x
    return mask.contiguous().view(torch.uint8), mask.to(torch.uint8).argmax(1)


def _kernel_constants(name: str, side: SideArguments) -> dict:
    return {
        f"KIND_{name}": side.kind,
        f"DEGREE_{name}": side.degree,
        f"S_{name}": side.bandwidths,
        f"HAS_PAR_{name}": side.has_par,
    }


def forward(call: Call):
    problem, mask, need, x = call.problem, call.mask, call.need, call.x.features
    G, n, _ = x.shape
    a, b = (side_arguments(side, mask, problem) for side in call.sides)
    keep, ref = _mask_arguments(mask, x)
    part, square, splits = _launch_split(a, b, keep, ref, mask is not None)
    new = lambda *shape, dtype=torch.float32: x.new_empty(shape, dtype=dtype)  # noqa: E731
    value, rows = new(G), new(G, 14, n) if need else new(0)
    kept = new(2, G, n, n) if need else new(0)
    unit = x
    if a.prepared is not None:
        unit = torch.stack([a.prepared.unit, b.prepared.unit])
    fused = n <= FUSED_ROWS
    stats = x if fused else new(G, 7, n, dtype=torch.float64)
    shared = {
        "STAT": STATS[problem.stat],
        "STABLE": problem.stable,
        "UNBIASED": problem.unbiased,
        "CENTER": problem.center,
        "ROW_NORM": problem.row_normalize,
        "MEAN": problem.mean,
        "MASK": mask is not None,
        "PREPARED": a.prepared is not None,
        "KEEP": bool(need),
        "MINIMUM": problem.minimum,
    }
    block = max(16, triton.next_power_of_2(n)) if fused else SUMS_BLOCK
    step, warps = FUSED_SUMS if fused else SPLIT_SUMS
    row_sums[(triton.cdiv(n, block) * G,)](
        part, square, keep, a.alpha, b.alpha, a.par, b.par, a.typical, b.typical, kept, stats, value, rows, unit,
        n, G, splits, a.par_stride, b.par_stride, a.sigma, b.sigma,
        BM=block, BN=step, **_kernel_constants("X", a), **_kernel_constants("Y", b), **shared,
        FUSED=fused, num_warps=warps,
    )  # fmt: skip
    if not fused:
        finish[(G,)](stats, keep, value, rows, unit, n, G, BLOCK=triton.next_power_of_2(n), **shared, num_warps=4)
    return value, rows, kept


def _launch_split(a: SideArguments, b: SideArguments, keep, ref, masked: bool):
    """Splits fill the machine about twice; the partial sums are added in their order, so results repeat bit for bit."""
    x, y = a.rows, b.rows
    (G, n, p), q = x.shape, y.shape[2]
    half = x.dtype != torch.float32 and y.dtype != torch.float32
    count, shared = machine(x.device.index) if x.is_cuda else (1, LARGE_SHARED)
    config = split_config(n, half, shared)
    blocks = triton.cdiv(n, config.tile)
    steps = triton.cdiv(max(p, q), config.depth)
    busy = blocks * (blocks + 1) // 2 * 2 * G
    splits = max(1, min(128, steps, 2 * count // busy))
    per_x, per_y = (triton.cdiv(triton.cdiv(width, config.depth), splits) * config.depth for width in (p, q))
    part = x.new_empty((2, splits, G, n, n), dtype=torch.float32)
    square = x.new_empty((2, splits, G, n), dtype=torch.float32)
    split_gram[(blocks * blocks * 2 * G, splits)](
        x, y, part, square, keep, ref, n, p, q, G, splits, *x.stride(), *y.stride(), per_x, per_y,
        BM=config.tile, BK=config.depth, SHIFT_X=a.shift, SHIFT_Y=b.shift, MASK=masked,
        HALVE_X=a.halve, HALVE_Y=b.halve, PRECISION=precision(x, y),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return part, square, splits


def backward(call: Call, saved, grad):
    problem, mask, need = call.problem, call.mask, call.need
    a, b = (side_arguments(side, mask, problem) for side in call.sides)
    masks = _mask_arguments(mask, call.x.features)
    grad = grad.float().contiguous()
    out = [None] * 4
    for own, (features, spec, sigma) in enumerate(call.sides):
        if not call.sides_asked[own]:
            continue
        sides = (a, b) if own == 0 else (b, a)
        want_sigma = bool(need & (0b100 << own))
        dz, sums, dsigma = _launch_backward(call, grad, sides, masks, saved, own, want_sigma)
        prepared = sides[0].prepared
        if need & (1 << own):
            out[own] = dz if prepared is None else unprepare_gradient(dz, sums, features, prepared, spec, mask)
        if want_sigma:
            per_group = dsigma.sum(1) if prepared is None else dsigma.sum(1) * prepared.scale
            out[2 + own] = sigma_gradient(per_group, sigma)
    return tuple(out)


def _launch_backward(call: Call, grad, sides, masks, saved, own: int, want_sigma: bool):
    (a, b), (keep, ref), (rows, kept), problem = sides, masks, saved, call.problem
    x = a.rows
    G, n, p = x.shape
    prepared = a.prepared is not None
    dx = torch.empty((G, n, p), dtype=torch.float32 if prepared else x.dtype, device=x.device)
    sums = x.new_empty((G, n), dtype=torch.float32) if prepared else dx
    dsigma = x.new_empty((G, n), dtype=torch.float32) if want_sigma else dx
    BM, BN, BP, warps, stages = BACKWARD_FLOAT if x.dtype == torch.float32 else BACKWARD_HALF
    weighted_rows[(triton.cdiv(n, BM) * G * triton.cdiv(p, BP),)](
        x, grad, kept, rows, keep, ref, a.alpha, b.alpha, a.par, b.par, dx, sums, dsigma,
        n, p, G, *x.stride(), a.par_stride, b.par_stride, a.sigma, b.sigma, own,
        BM=BM, BN=BN, BP=BP, **_kernel_constants("X", a), **_kernel_constants("Y", b),
        STABLE=problem.stable, UNBIASED=problem.unbiased, ROWWISE=problem.rowwise, ROW_NORM=problem.row_normalize,
        MASK=call.mask is not None, PREPARED=prepared, SHIFT=a.shift, HALVE=a.halve, SIGMA=want_sigma,
        PRECISION=precision(x), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dx, sums, dsigma
