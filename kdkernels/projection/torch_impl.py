# SPDX-License-Identifier: Apache-2.0
"""Projected MSE in PyTorch: the difference of some samples is formed, projected once, and overwritten by the next.

Reads s and t in the layout they have, one product with the basis for both sides, sums in float64; saves [rows, k].
Backward writes the gradient in the layout of s: 2 w Q P', two products fewer than autograd of two projections.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..autograd import at_least_float32, device_type
from .layout import by_rows, planes, positions, write

# elements of a difference: 16 MiB on a CPU. Smaller ones fit a core's own cache and take the same time, but each block
# costs three meetings of the threads, which on a busy machine wait for each other
BLOCK = {"cpu": 1 << 22, "cuda": 1 << 25}


class Block(NamedTuple):
    first: int  # samples first .. last, positions start .. end
    last: int
    start: int
    end: int


def blocks(x) -> Iterator[Block]:
    """Blocks of planes x [B, c, p]: whole samples, or positions of one sample where it is larger than a block."""
    B, c, p = x.shape
    elements = BLOCK.get(device_type(x), BLOCK["cuda"])
    samples = max(1, elements // max(1, c * p))
    step = p if samples > 1 or c * p <= elements else max(1, elements // c)
    for first in range(0, B, samples):
        for start in range(0, p, step):
            yield Block(first, min(B, first + samples), start, min(p, start + step))


def _difference(S, T, mask, at: Block, rows: bool, dtype, buffer):
    """D of a block: [n, p, c] where channels are neighbours, else [n, c, p]; in `buffer`, rows that do not count 0."""
    s, t = (x[at.first : at.last, :, at.start : at.end] for x in (S, T))
    if rows:
        s, t = s.mT, t.mT
    D = buffer[: s.numel()].view(s.shape)
    if s.dtype == dtype and t.dtype == dtype:
        torch.sub(s, t, out=D)
    else:
        D.copy_(s).sub_(t)  # widened before they are subtracted
    if mask is not None:
        dropped = ~mask[at.first : at.last, at.start : at.end]
        D.masked_fill_(dropped[:, :, None] if rows else dropped[:, None, :], 0)
    return D


def _buffer(S, dtype):
    largest = next(blocks(S), None)
    if largest is None:
        return torch.empty(0, dtype=dtype, device=S.device)
    first, last, start, end = largest
    return torch.empty((last - first) * S.shape[1] * (end - start), dtype=dtype, device=S.device)


def _project(D, P, rows: bool, out):
    """Q = D P in `out`, a block of what is saved."""
    if rows:
        n, p, c = D.shape
        torch.mm(D.view(n * p, c), P, out=out.view(n * p, -1))
    else:
        torch.bmm(P.t().expand(D.shape[0], -1, -1), D, out=out)


def _saved_block(Q, at: Block, rows: bool):
    """The block of Q: [n, p, k] or [n, k, p]."""
    return Q[at.first : at.last, at.start : at.end] if rows else Q[at.first : at.last, :, at.start : at.end]


def shaped(projected, S, k: int, rows: bool):
    B, _, p = S.shape
    return projected.view((B, p, k) if rows else (B, k, p))


def divisors(mask, S, k: int, reduction: str):
    """What the square sums are divided by: a number, or [] or [B] in float64; rows that count, times k."""
    B, _, p = S.shape
    if reduction == "sum":
        return 1
    if mask is None:
        return max(1, (p if reduction == "none" else B * p) * k)
    count = mask.sum(1) if reduction == "none" else mask.sum()
    return (count * k).clamp(min=1).double()


def forward(s, t, basis, mask, channel_dim: int, reduction: str, keep: bool):
    """(value, Q): Q [rows * k] as backward wants it, empty unless `keep`."""
    dtype = at_least_float32(s, t)
    S, T, P = planes(s, channel_dim), planes(t, channel_dim), basis.to(dtype)
    (B, _, p), k, rows = S.shape, basis.shape[1], by_rows(S)
    projected = s.new_empty(B * p * k if keep else 0, dtype=dtype)
    Q = shaped(projected, S, k, rows) if keep else None
    sums = torch.zeros(B, dtype=torch.float64, device=s.device)
    buffer = _buffer(S, dtype)
    for at in blocks(S):
        D = _difference(S, T, mask, at, rows, dtype, buffer)
        n = at.last - at.first
        q = _saved_block(Q, at, rows) if keep else None
        if q is None or not q.is_contiguous():
            fresh = D.new_empty((n, at.end - at.start, k) if rows else (n, k, at.end - at.start))
            _project(D, P, rows, fresh)
            q = fresh if q is None else q.copy_(fresh)
        else:
            _project(D, P, rows, q)
        q = q.flatten(1)
        # float32 sums of one block, finished in float64
        sums[at.first : at.last] += torch.linalg.vecdot(q, q)
    total = sums if reduction == "none" else sums.sum()
    return (total / divisors(mask, S, k, reduction)).to(dtype), projected


def backward(grad, s, t, basis, mask, projected, channel_dim: int, reduction: str, need: int):
    """Gradients (ds, dt, dbasis); need has a bit for each, the others are empty."""
    dtype = at_least_float32(s, t)
    S, T = planes(s, channel_dim), planes(t, channel_dim)
    k, rows = basis.shape[1], by_rows(S)
    # value = sum of w_b |Q_b|^2: 2 w [] or [B]
    weight = (2 * grad.double() / divisors(mask, S, k, reduction)).to(dtype)
    Q = shaped(projected, S, k, rows)
    empty = s.new_empty(0)
    ds = torch.empty_like(s) if need & 1 else empty
    dt = torch.empty_like(t) if need & 2 else empty
    if need & 3:
        _features_gradient(Q, basis.to(dtype), weight, (S, T), (ds, dt), channel_dim, rows, need)
    return ds, dt, basis_gradient(Q, S, T, mask, weight, basis, dtype, rows) if need & 4 else empty


def _features_gradient(Q, P, weight, sides, gradients, channel_dim, rows, need):
    """ds = 2 w Q P', dt = - ds, each in the layout and dtype of its side."""
    if weight.dim() == 0:
        P, weight = P * weight, None  # c k products instead of rows k
    asked = [(i, gradients[i]) for i in (0, 1) if need >> i & 1]
    outs = [(i, *write(g, channel_dim)) for i, g in asked]
    for at in blocks(sides[0]):
        q = _saved_block(Q, at, rows)
        if weight is not None:
            q = q * weight[at.first : at.last, None, None]
        product = None
        for i, out, _ in outs:
            block = out[at.first : at.last, :, at.start : at.end]
            block = block.mT if rows else block
            if product is None and i == 0 and block.dtype == q.dtype and block.is_contiguous():
                product = _spread(q, P, rows, block)
            else:
                product = _spread(q, P, rows, None) if product is None else product
                block.copy_(product if i == 0 else -product)
    for _, _, finish in outs:
        finish()


def _spread(q, P, rows: bool, out):
    """Q P' of a block, [n, p, c] or [n, c, p]."""
    if rows:
        n, p, k = q.shape
        out = q.new_empty((n, p, P.shape[0])) if out is None else out
        torch.mm(q.reshape(n * p, k), P.t(), out=out.view(n * p, -1))
        return out
    return torch.bmm(P.expand(q.shape[0], -1, -1), q, out=out)


def basis_gradient(Q, S, T, mask, weight, basis, dtype, rows):
    """dP = 2 D' (w Q): the difference is formed again, a block at a time."""
    out = torch.zeros(basis.shape, dtype=torch.float64, device=basis.device)
    buffer = _buffer(S, dtype)
    for at in blocks(S):
        D = _difference(S, T, mask, at, rows, dtype, buffer)
        q = _saved_block(Q, at, rows)
        q = q * (weight if weight.dim() == 0 else weight[at.first : at.last, None, None])
        part = D.flatten(0, 1).mT @ q.flatten(0, 1) if rows else torch.bmm(D, q.mT).sum(0)
        out += part
    return out.to(basis.dtype)


def saved_size(s, basis, channel_dim: int, keep: bool) -> int:
    return s.shape[0] * positions(s, channel_dim) * basis.shape[1] if keep else 0
