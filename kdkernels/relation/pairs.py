# SPDX-License-Identifier: Apache-2.0
"""From features to the n x n products of samples and their distances, in float64, reading the features in blocks.

Every distance is a function of the Gram matrix of the centred rows. In float32 that difference of three products
would lose pairs closer than 1e-3 of their norm; in float64 it loses those closer than 1e-7, which float32 features
cannot hold apart from each other anyway. n x n float64 numbers cost little beside n x p features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# numbers of a float64 block of features: it stays in cache; it fills the device
COLUMNS = {"cpu": 1 << 18, "cuda": 1 << 24}
# squared distances below this share of the norms are rounding: the samples are one
SAME = 64 * torch.finfo(torch.float64).eps


class Distances(NamedTuple):
    square: torch.Tensor  # [G, n, n] (d_ik / mu)^2, float64; 0 where a sample is masked
    scale: torch.Tensor  # [G] 1 / mu, mu the mean of the distances that are not 0; 1 if there is none
    pairs: torch.Tensor  # [G] how many distances are not 0, at least 1


def rows_kept(x, mask):
    """How many rows count, [G] float64, at least 1."""
    if mask is None:
        return torch.full((x.shape[0],), x.shape[1], dtype=torch.float64, device=x.device)
    return mask.sum(-1).clamp(min=1).double()


def masked(z, mask):
    return z if mask is None else z.masked_fill(~mask[..., None], 0)


def blocks(x):
    """Slices of columns, few enough for a float64 copy."""
    n, p = x.shape[-2:]
    width = max(1, COLUMNS.get(x.device.type, COLUMNS["cuda"]) // n)
    return [slice(begin, min(p, begin + width)) for begin in range(0, p, width)]


def rows(x, mask, count):
    """A block of rows in float64, 0 where masked, less their mean if there is a count."""
    z = masked(x.double(), mask)
    return z if count is None else masked(z - z.sum(1, keepdim=True) / count[:, None, None], mask)


def pairs_masked(square, mask):
    """[G, n, n] with 0 where either sample is masked, in place."""
    return square if mask is None else square.masked_fill_(~(mask[..., None] & mask[..., None, :]), 0)


def gram(x, mask, count=None):
    """[G, n, n] float64 products of the rows, centred if there is a count."""
    total = x.new_zeros((x.shape[0], x.shape[1], x.shape[1]), dtype=torch.float64)
    for columns in blocks(x):
        z = rows(x[..., columns], mask, count)
        total.baddbmm_(z, z.mT)
    return total


def distances(x, mask, count) -> Distances:
    square = gram(x, mask, count)
    norms = square.diagonal(dim1=-2, dim2=-1).clone()
    size = norms[..., None] + norms[..., None, :]
    square = torch.sub(size, square, alpha=2, out=square)
    # NaN is a distance: it shows
    square = pairs_masked(square.masked_fill_(square <= size.mul_(SAME), 0), mask)
    pairs = torch.count_nonzero(square, (-2, -1)).double()
    mean = torch.sqrt(square, out=size).sum((-2, -1)) / pairs.clamp(min=1)
    scale = torch.where(pairs > 0, 1 / mean, torch.ones_like(mean))
    return Distances(square.mul_(scale.square()[:, None, None]), scale, pairs.clamp(min=1))


def inverse(square):
    """1 / d, 0 where d = 0."""
    return square.rsqrt().masked_fill_(square == 0, 0)


def laplacian(V):
    """diag(V 1) - V, in place: its product with rows z is sum_k V_ik (z_i - z_k)."""
    V.diagonal(dim1=-2, dim2=-1).zero_()
    V.neg_().diagonal(dim1=-2, dim2=-1).sub_(V.sum(-1))
    return V
