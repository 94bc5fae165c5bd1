# SPDX-License-Identifier: Apache-2.0
"""Launches of the schedules above 1024 samples: prepared rows, banded sums, then flash-style or panel gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch.nn import functional

from .. import torch_impl
from ..call import Call
from ..torch_impl import panels
from ..torch_impl.combine import SIDE_ROWS, RowStats, combine, pack_rows, unpack_weights
from ..torch_impl.forms import sigma_gradient
from ..torch_impl.panels import Gradient, Pairs
from ..torch_impl.prepared import Tiled, unprepare_gradient
from .maps import constant, map_of, precision
from .tile_kernels import Asked, Side, gradient_rows, tile_sums, weight_panel

BAND_BYTES = 64 << 20  # workspace of one launch of tile_sums, and of one panel of V
FLASH_WIDTH = 256  # widest feature whose gradient tile stays in registers
# rows of the kernels' copy are as wide as a multiple of this: loads of them are wide, and can be asynchronous. without
# it the kernels of half inputs spill 800 to 1,300 bytes a thread
WIDTH = 16


class TileConfig(NamedTuple):
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# (half inputs on sm_80 and sm_90, float32 inputs, half inputs on sm_100); unmeasured: largest that spill <= 64 bytes
SUMS = (TileConfig(128, 128, 64, 8, 3), TileConfig(64, 64, 16, 8, 2), TileConfig(64, 64, 64, 4, 3))
PANEL = (TileConfig(128, 64, 64, 8, 3), TileConfig(64, 32, 32, 8, 2), TileConfig(64, 64, 64, 8, 3))
# (widest feature, half, float32)
FLASH = (
    (64, TileConfig(128, 32, 64, 8, 2), TileConfig(32, 16, 32, 4, 1)),
    (128, TileConfig(64, 32, 64, 8, 2), TileConfig(32, 16, 32, 8, 2)),
    (256, TileConfig(64, 16, 64, 8, 2), TileConfig(32, 16, 32, 8, 2)),
)


def _pick(table, half: bool, device) -> TileConfig:
    if half and len(table) > 2 and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10:
        return table[2]
    return table[0] if half else table[1]


class Operands(NamedTuple):
    """Both sides as the kernels take them; `half` is whether the products run on half-precision tensor cores."""

    pairs: Pairs
    x: Side
    y: Side
    keep: torch.Tensor | None
    asked: Asked
    half: bool


def _operands(pairs: Pairs, x, y, mask) -> Operands:
    half, problem = x.dtype != torch.float32 and y.dtype != torch.float32, pairs.problem
    sides = (
        _side(side, features.dtype if problem.stat == "mse" else torch.float16, half)
        for side, features in ((pairs.x, x), (pairs.y, y))
    )
    flags = (problem.stable, problem.unbiased, problem.stat == "mse", problem.rowwise, problem.row_normalize)
    asked = Asked(*map(constant, flags))
    return Operands(pairs, *sides, None if mask is None else mask.contiguous().view(torch.uint8), asked, half)


def _side(side: Tiled, dtype, half: bool) -> Side:
    """Prepared rows have norm about 1: float16 then holds them with 11 bits, whatever the half dtype of the input.

    Those of "mse" are the caller's own, of any size: their own dtype holds them exactly. Zeros fill up their width.
    """
    dense = lambda t: None if t is None else t.contiguous()  # noqa: E731
    z, square = side.P.z, side.P.square
    if half:
        z = z.to(dtype)
        square = z.float().square().sum(-1) if side.spec.of_distance else square
    kernel = map_of(side.spec, dense(side.P.par))
    vectors = (dense(t) for t in (square, side.u, side.P.alpha, side.P.typical))
    z = z.contiguous() if z.shape[2] % WIDTH == 0 else functional.pad(z, (0, -z.shape[2] % WIDTH))
    return Side(z, z.shape[2], kernel, *vectors)


def _with_means(side: Tiled, weight) -> Tiled:
    """Landmark means of all groups."""
    if not side.stable or side.spec.linear:
        return side
    weights = [None] * side.left.shape[0] if weight is None else weight
    means = [panels.landmark_means(side.group(g), w) for g, w in enumerate(weights)]
    return side._replace(u=torch.stack(means))


STEPS = torch_impl.STEPS._replace(rescale=True)  # rows are rounded to half precision


def forward(call: Call):
    problem, mask, x, y = call.problem, call.mask, call.x.features, call.y.features
    pairs = panels.build(call, torch.float32, STEPS)
    pairs = pairs._replace(x=_with_means(pairs.x, pairs.weight), y=_with_means(pairs.y, pairs.weight))
    rho = (panels.rho_of(pairs.x), panels.rho_of(pairs.y)) if problem.row_normalize else None
    stats = _banded_sums(_operands(pairs, x, y, mask), precision(x, y))
    count = x.shape[1] if mask is None else mask.sum(1)
    eps = torch.finfo(torch.float32).eps
    value, sides = combine(problem, stats, count, eps, (pairs.x.P.unit, pairs.y.P.unit), rho, call.sides_asked)
    value, rows = pack_rows(value, sides, (pairs.x.u, pairs.y.u), count, problem, call.need, torch.float32)
    return value, rows, value.new_empty(0)


def _banded_sums(operands: Operands, how: str) -> RowStats:
    """Bands of row tiles bound the workspace; every slot is written, so nothing is cleared."""
    z, rowwise = operands.x.z, operands.pairs.problem.rowwise
    G, n, _ = z.shape
    config = _pick(SUMS, operands.half, z.device)
    tiles = triton.cdiv(n, config.rows)
    band = max(1, min(tiles, BAND_BYTES // (2 * 5 * 4 * n * G)))
    stats = torch.zeros((5, G, n), dtype=torch.float64, device=z.device)
    row_slots = torch.empty((tiles, G, 5, band * config.rows), dtype=torch.float32, device=z.device)
    column_slots = torch.empty((band, G, 5, n), dtype=torch.float32, device=z.device)
    for first in range(0, tiles, band):
        used = min(band, tiles - first)
        tile_sums[(band * tiles * G,)](
            operands.x, operands.y, operands.keep, row_slots, column_slots, n, G, first, band, operands.asked,
            BM=config.rows, BK=config.depth, PRECISION=how, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        start, stop = first * config.rows, min(n, (first + used) * config.rows)
        rows = row_slots[..., : stop - start].sum(0, dtype=torch.float64)
        mirrored = 5 if rowwise else 2  # of the squares only totals are asked for, and the rows hold them
        columns = column_slots[:used, :, :mirrored].sum(0, dtype=torch.float64)
        stats[..., start:stop] += rows.movedim(1, 0)
        stats[:mirrored] += columns.movedim(1, 0)
    return RowStats(*stats)


def backward(call: Call, saved, grad):
    (rows, _), problem, mask, x, y = saved, call.problem, call.mask, call.x.features, call.y.features
    pairs = panels.build(call, torch.float32, STEPS)
    if problem.stable:
        means = rows[:, 0], rows[:, SIDE_ROWS]
        pairs = pairs._replace(x=pairs.x._replace(u=means[0]), y=pairs.y._replace(u=means[1]))
    grad = grad.float()
    out = [None] * 4
    for k, (features, spec, sigma) in enumerate(call.sides):
        if not call.sides_asked[k]:
            continue
        side = pairs if k == 0 else Pairs(problem.swapped(), pairs.y, pairs.x, pairs.weight)
        operands = _operands(side, *((x, y) if k == 0 else (y, x)), mask)
        want_sigma = bool(call.need & (0b100 << k))
        weights = unpack_weights(rows, grad, k, problem)
        gradient = _gradient(operands, weights, want_sigma, precision(x, y))
        if call.need & (1 << k):
            out[k] = unprepare_gradient(gradient.dz, gradient.row_sums, features, side.x.P, spec, mask)
        if want_sigma:
            out[2 + k] = sigma_gradient(gradient.dsigma * side.x.P.scale, sigma)
    return tuple(out)


def _scaled(weights, side: Tiled, teacher: Tiled, stat: str):
    """Weights as [G, 3, n] over their largest and the slope of a typical pair: V is then of order 1, fit for halves."""
    p, q, e = weights[:3]
    own, other = _typical_value(side, stat)[..., None], _typical_value(teacher, stat)[..., None]
    scale = (p.abs() * other + q.abs() * own + e.abs()).amax(-1) * 2
    scale = scale * _typical_slope(side)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    over = scale[:, None]
    return torch.stack([p, q, e], dim=1) / over[:, None], scale


def _typical_value(side: Tiled, stat: str):
    """[G]: the size of K^ for a typical pair: a wide kernel's k - exp(level) is as small as its exponent."""
    if stat == "mse":  # unscaled rows: the bound of |K_ij|
        return side.P.square.amax(-1)
    if not side.spec.of_distance:
        return torch.ones_like(side.P.scale)
    levels = torch.stack(side.levels())[..., 0, 0]
    return (levels.exp().clamp(min=1e-3) * levels.abs().clamp(max=1.0)).amax(0)


def _typical_slope(side: Tiled):
    """[G] or 1: the size of dK^/dg^ for a typical pair, so that V stays in float16's range at any bandwidth."""
    if side.spec.linear:
        return 1.0
    if side.spec.name == "polynomial":
        return side.P.par[:, 1].abs()
    order = 2 if side.spec.name == "rbf" else 1
    slopes = [
        level.exp().clamp(min=1e-3) / sigma**order
        for sigma, level in zip(side.parameters(), side.levels(), strict=True)
    ]
    return torch.stack(slopes).amax(0)[:, 0, 0]


def _gradient(operands: Operands, weights, want_sigma: bool, how: str) -> Gradient:
    side = operands.pairs.x
    scaled, scale = _scaled(weights, side, operands.pairs.y, operands.pairs.problem.stat)
    launch = _flash if side.P.z.shape[2] <= FLASH_WIDTH else _panels
    dz, sums, norms, dsigma = launch(operands, scaled, want_sigma, how)
    dz = dz[..., : side.P.z.shape[2]]
    if operands.pairs.problem.row_normalize and not side.spec.of_distance:
        dz, sums = panels.row_norm_diagonal(side, weights, norms, dz, sums)
    over = scale[:, None]
    return Gradient(dz * over[..., None], sums * over, dsigma.double() * scale)


def _flash(operands: Operands, scaled, want_sigma: bool, how: str):
    z = operands.x.z
    G, n, p = z.shape
    config = _pick(next(row for row in FLASH if p <= row[0])[1:], operands.half, z.device)
    dz = torch.empty((G, n, p), dtype=torch.float32, device=z.device)
    extra = torch.empty((G, 3, n), dtype=torch.float32, device=z.device)
    gradient_rows[(triton.cdiv(n, config.rows) * G,)](
        operands.x, operands.y, operands.keep, scaled, dz, extra, n, operands.asked,
        BM=config.rows, BN=config.columns, BK=config.depth, BP=max(16, triton.next_power_of_2(p)),
        OF_SIGMA=want_sigma, PRECISION=how, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    sums, norms, dsigma = extra.unbind(1)
    return dz, sums, norms, dsigma.sum(1)


def _panels(operands: Operands, scaled, want_sigma: bool, how: str):
    z = operands.x.z
    G, n, p = z.shape
    config = _pick(PANEL, operands.half, z.device)
    tiles = triton.cdiv(n, config.columns)
    height = max(config.rows, min(triton.cdiv(n, config.rows) * config.rows, BAND_BYTES // (n * z.element_size())))
    height -= height % config.rows
    dz = torch.empty((G, n, p), dtype=torch.float32, device=z.device)
    sums, norms, dsigma = (torch.zeros((G, n), dtype=torch.float32, device=z.device) for _ in range(3))
    panel = torch.empty((height, n), dtype=z.dtype, device=z.device)
    row_norm = operands.pairs.problem.row_normalize
    space = torch.empty(tiles * 3 * height, dtype=torch.float32, device=z.device)
    for g in range(G):
        x, y, keep = operands.x.group(g), operands.y.group(g), None if operands.keep is None else operands.keep[g:]
        for first in range(0, n, height):
            rows = min(height, n - first)  # the last panel may have fewer row blocks: its sums lie closer too
            extra = space[: tiles * 3 * rows].view(tiles, 3, rows)
            weight_panel[(triton.cdiv(rows, config.rows) * tiles,)](
                x, y, keep, scaled[g], panel, extra, n, first, rows, operands.asked,
                BM=config.rows, BN=config.columns, BK=config.depth, OF_SIGMA=want_sigma, PRECISION=how,
                num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip
            used = slice(first, first + rows)
            _product_into(dz[g, used], panel[:rows], z[g])
            sums[g, used] = extra[:, 0].sum(0)
            if row_norm:
                norms[g, used] = extra[:, 1].sum(0)
            if want_sigma:
                dsigma[g, used] = extra[:, 2].sum(0)
    return dz, sums, norms, dsigma.sum(1)


def _product_into(out, a, b):
    """out = a b with float32 accumulation and result, whatever the operands."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        out.copy_(torch.mm(a, b, out_dtype=torch.float32))
    else:  # the interpreter's tensors: no CPU product of halves gives float32
        torch.mm(a.float(), b.float(), out=out)
