# SPDX-License-Identifier: Apache-2.0
"""Seeded inputs: a student x and a teacher y with a common signal, drawn in float64, rounded once to the case's dtype.

relu, mean m, scale s: a latent h ~ N(0, 1) [n, 32] common to both sides; z = (h A / sqrt(32) + noise) / sqrt(2), A and
noise ~ N(0, 1) and each side's own; r = max(z, 0); r is shifted and scaled by two numbers so that the mean over all
its entries is m and their standard deviation is 1, then multiplied by s. So an entry is what a ReLU layer gives, on a
pedestal that dwarfs its spread when m = 30.

randn: z itself. logits: 4 z.
"""

from __future__ import annotations

import math

import torch

LATENT = 32
REGIMES = ("randn", "logits", "relu:3:1", "relu:30:1", "relu:3:1000", "relu:30:1000")


def features(n: int, p: int, q: int, regime: str, seed: int, device="cpu", groups: int = 0):
    """x [n, p] and y [n, q] (or [G, n, ...]) in float64, the same numbers on every device of one kind."""
    generator = torch.Generator(device).manual_seed(seed)
    lead = (groups,) if groups else ()

    def randn(*shape):
        return torch.randn(*lead, *shape, dtype=torch.float64, device=device, generator=generator)

    latent = randn(n, LATENT)
    return tuple(
        _regime((latent @ randn(LATENT, d) / math.sqrt(LATENT) + randn(n, d)) / 2**0.5, regime) for d in (p, q)
    )


def _regime(z, regime: str):
    if regime == "randn":
        return z
    if regime == "logits":
        return 4 * z
    kind, mean, scale = regime.split(":")
    if kind != "relu":
        raise ValueError(f"regime is {regime!r}: give randn, logits or relu:MEAN:SCALE")
    r = z.clamp_(min=0)
    return (r - r.mean()).div_(r.std()).add_(float(mean)).mul_(float(scale))


def median_sigma(x) -> float:
    """sigma^2 = median of the squared distances of at most 1024 rows, zero diagonal included, in float64."""
    x = x.detach().double().reshape(-1, x.shape[-1])
    x = x[torch.arange(min(len(x), 1024), device=x.device) * len(x) // min(len(x), 1024)]
    x = x - x.mean(0)
    s = x.square().sum(1)
    d2 = (s[:, None] + s - 2 * x @ x.T).clamp(min=0).fill_diagonal_(0).flatten().sort().values
    return float(((d2[(len(d2) - 1) // 2] + d2[len(d2) // 2]) / 2).sqrt())
