# SPDX-License-Identifier: Apache-2.0
"""Mean and covariance of features over any number of batches, machines and layouts; principal directions at the end.

Kept: count, mean and centred scatter, [c, c] in float64. Batches and whole accumulators are joined by the pairwise
formulas of Chan, Golub & LeVeque 1983, which do not cancel however large the mean is.
"""

from __future__ import annotations

import torch

from .. import checks
from .._types import Mask
from ..accumulator import Accumulator, summed
from ..distributed import GroupLike
from .checks import check_channel_dim, check_count, check_mask, mask_of_positions
from .layout import planes

CHUNK = 1 << 22  # elements of a batch that are widened to float64 at once


class StreamingPCA(Accumulator):
    """Streaming principal component analysis of channels: `update` with batches, `merge` accumulators, `components`.

    Args:
        num_channels: c.

    `update(x, *, channel_dim=1, mask=None)`: each position of each sample is a row; layouts and mask as in
    `kd.projected_mse`. No gradient; half inputs are widened first. A NaN that counts stays: the components then raise.
    `merge(other)`: adds what another accumulator has seen; both orders give the same up to rounding. Several processes:
    each updates its own, and `components(k, group="world")`, called by all, is of what all of them have seen.
    Buffers `count` (int64), `mean` [c], `scatter` [c, c] (float64 always: casting the module leaves them so).

    >>> pca = kd.StreamingPCA(3)
    >>> pca.update(torch.randn(64, 3) * torch.tensor([5.0, 1.0, 0.1]))
    >>> pca.components(1).abs().argmax().item()
    0
    """

    count: torch.Tensor
    mean: torch.Tensor
    scatter: torch.Tensor

    def __init__(self, num_channels: int):
        super().__init__()
        checks.integer(num_channels, "num_channels")
        self.num_channels = num_channels
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(num_channels, dtype=torch.float64))
        self.register_buffer("scatter", torch.zeros(num_channels, num_channels, dtype=torch.float64))

    @torch.no_grad()
    def update(self, x: torch.Tensor, *, channel_dim: int = 1, mask: Mask = None) -> None:
        """Adds the rows of one batch."""
        checks.floating(x, "x")
        dim = check_channel_dim(x, channel_dim, "x")
        if x.shape[dim] != self.num_channels:
            raise ValueError(f"x has {x.shape[dim]} channels in dimension {dim}: this StreamingPCA has "
                             f"{self.num_channels}")  # fmt: skip
        if x.device != self.mean.device:
            raise ValueError(f"x is on {x.device}, the accumulator on {self.mean.device}: move one, e.g. pca.to(...)")
        if mask is not None:
            check_mask(mask, x, dim)
            mask = mask_of_positions(mask, x, dim)
        X = planes(x.detach(), dim)
        samples = max(1, CHUNK // max(1, X[:1].numel()))
        for first in range(0, X.shape[0], samples):
            keep = None if mask is None else mask[first : first + samples].reshape(-1)
            self._add(X[first : first + samples].mT.reshape(-1, self.num_channels).double(), keep)

    def _add(self, rows, keep):
        if rows.shape[0] == 0:
            return
        if keep is None:
            n, mean = torch.full_like(self.count, rows.shape[0]), rows.mean(0)
            centred = rows - mean
        else:
            rows = torch.where(keep[:, None], rows, 0)
            n = keep.sum()
            mean = rows.sum(0) / n.clamp(min=1)
            centred = torch.where(keep[:, None], rows - mean, 0)
        self._join(n, mean, centred.T @ centred)  # float64, which autocast leaves alone

    def _join(self, n, mean, scatter):
        """Chan: M = M_a + M_b + d d' n_a n_b / n, d = mean_b - mean_a."""
        total = self.count + n
        share = n / total.clamp(min=1).double()
        d = mean - self.mean
        self.scatter += scatter + torch.outer(d, d) * (self.count * share)
        self.mean += d * share
        self.count.copy_(total)

    @torch.no_grad()
    def merge(self, other: StreamingPCA) -> None:
        """Adds everything that `other` has seen; `other` stays as it is."""
        if not isinstance(other, StreamingPCA):
            raise TypeError(f"other is a {type(other).__name__}: merge takes a StreamingPCA")
        if other.num_channels != self.num_channels:
            raise ValueError(f"other has {other.num_channels} channels, this StreamingPCA {self.num_channels}")
        device = self.mean.device
        self._join(other.count.to(device), other.mean.to(device), other.scatter.to(device))

    @torch.no_grad()
    def merged(self, group: GroupLike, options: object = None) -> StreamingPCA:
        """A new accumulator that has seen what the ranks of `group` ("world" or a process group) have; this one stays.

        Every rank calls it, also one that saw nothing, and gets the same bits. Two messages a rank, 8 (c + 1) and 8 c^2
        bytes, whatever the number of batches, and 224 bytes to agree. options: what else the ranks are to have alike,
        for a caller who computes on with the result: a module, or a dict of numbers and texts.
        """
        handle = self._over_ranks(group, ("mean",), options=options)
        out = StreamingPCA(self.num_channels).to(self.mean.device)
        count, total = summed([self.count, self.count * self.mean], handle)
        out.count.copy_(count)
        out.mean.copy_(total / count.clamp(min=1))
        d = self.mean - out.mean
        out.scatter.copy_(summed([self.scatter + self.count * torch.outer(d, d)], handle)[0])
        return out

    def covariance(self, *, group: GroupLike = None) -> torch.Tensor:
        """Unbiased covariance [c, c] in float64; with a group, of what all its ranks have seen (see `merged`)."""
        if group is not None:
            return self.merged(group).covariance()
        self._enough()
        return self.scatter / (self.count - 1)

    def components(self, k: int, *, dtype: torch.dtype = torch.float32, group: GroupLike = None) -> torch.Tensor:
        """The k principal directions [c, k], orthonormal columns by falling variance; the largest entry is positive.

        scikit-learn's components_ are their transpose, in the dtype of the features; here float32 is the default.
        Directions of equal variance are any orthonormal basis of their span. Reads values: not for CUDA graphs. With a
        group, of what all its ranks have seen: the same on each, up to how their processors round.
        """
        covariance = self.covariance(group=group)
        check_count(k, self.num_channels)  # after the ranks have met: one that raises alone would leave the others
        if not bool(torch.isfinite(covariance).all()):
            raise ValueError("the features seen hold NaN or infinity: their covariance has no principal directions")
        P = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :k]
        sign = P.gather(0, P.abs().argmax(0, keepdim=True)).sign()
        return (P * sign).to(dtype)

    def variances(self) -> torch.Tensor:
        """Variance along each principal direction [c], falling, in float64; their sum is the total variance."""
        return torch.linalg.eigvalsh(self.covariance()).flip(0).clamp(min=0)

    def explained_variance_ratio(self) -> torch.Tensor:
        """The share of each principal direction in the total variance [c], falling, in float64; 0 if all is constant.

        `explained_variance_ratio().cumsum(0)` says how much k directions keep.
        """
        variances = self.variances()
        total = variances.sum()
        return variances / torch.where(total > 0, total, 1.0)

    def _enough(self):
        if int(self.count) < 2:
            raise ValueError(f"{int(self.count)} rows were seen: a covariance needs two, call update(features) first")

    def extra_repr(self) -> str:
        return f"num_channels={self.num_channels}, count={int(self.count)}"
