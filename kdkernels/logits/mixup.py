# SPDX-License-Identifier: Apache-2.0
"""What mixup returns, and how its random part is drawn: the share from Beta(alpha, alpha), then the permutation."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .. import checks


class MixupBatch(NamedTuple):
    """A mixed batch: x~_i = lam_i x_i + (1 - lam_i) x_permutation(i), both labels of each row, and how it was made.

    x [B, ...]: the mixed samples; labels, permuted_labels: those of sample i and of sample permutation(i); lam: a
    scalar, or [B]; permutation [B], int64.
    """

    x: torch.Tensor
    labels: torch.Tensor
    permuted_labels: torch.Tensor
    lam: torch.Tensor  # [], or [B] with a share for each sample
    permutation: torch.Tensor  # int64 [B]


def check_alpha(alpha) -> float:
    if not (checks.is_number(alpha) and 0 <= alpha < math.inf):
        raise ValueError(f"alpha is {alpha!r}: the parameter of Beta(alpha, alpha) is a number >= 0")
    return float(alpha)


def draw_lam(alpha: float, shape, device, dtype, generator) -> torch.Tensor:
    """Beta(alpha, alpha) in float64, rounded; alpha = 0 is no mixing, lam = 1."""
    if alpha == 0:
        return torch.ones(shape, dtype=dtype, device=device)
    at, by = checks.source(generator, device)
    # lam = g / (g + h), g, h ~ Gamma(alpha) = Gamma(alpha + 1) U^(1 / alpha), in logs: for small alpha both underflow.
    # torch.distributions takes no generator; _standard_gamma is what it calls
    above = torch._standard_gamma(torch.full((2, *shape), alpha + 1, dtype=torch.float64, device=at), generator)
    uniform = torch.rand((2, *shape), dtype=torch.float64, device=at, **by)
    log_g, log_h = above.log() + uniform.log() / alpha
    return (log_g - log_h).sigmoid().to(device, dtype)


def draw_permutation(rows: int, device, generator) -> torch.Tensor:
    at, by = checks.source(generator, device)
    return torch.randperm(rows, device=at, **by).to(device)
