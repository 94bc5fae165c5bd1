# SPDX-License-Identifier: Apache-2.0
"""Bases for `kd.projected_mse` beside principal directions: random orthonormal columns, a trained linear encoder."""

from __future__ import annotations

import torch

from .. import checks
from .._types import Device
from .checks import check_count


def random_basis(
    num_channels: int,
    k: int,
    *,
    generator: torch.Generator | None = None,
    device: Device | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """k random orthonormal columns [num_channels, k], uniform over all of them (QR of Gaussian columns, signs fixed).

    Drawn on the generator's device (the CPU without one), so that a seed gives the same basis everywhere;
    `device` and `dtype` are those of the result.

    >>> P = kd.random_basis(16, 4, generator=torch.Generator().manual_seed(0))
    >>> torch.allclose(P.T @ P, torch.eye(4), atol=1e-6)
    True
    """
    checks.integer(num_channels, "num_channels")
    check_count(k, num_channels)
    if dtype not in checks.FLOATS:
        raise TypeError(f"dtype is {dtype!r}: give a float dtype, e.g. torch.float32")
    where, by = checks.source(generator, "cpu")
    Q, R = torch.linalg.qr(torch.randn(num_channels, k, dtype=torch.float64, device=where, **by))
    # without this the distribution depends on the sign rule of the factorisation
    sign = torch.where(R.diagonal() < 0, -1.0, 1.0)
    return (Q * sign).to(device=device, dtype=dtype).contiguous()


def autoencoder_basis(
    covariance: torch.Tensor,
    k: int,
    *,
    steps: int = 200,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The encoder [c, k] of a linear autoencoder x -> x E D trained on features of this covariance.

    The loss that one trains on batches, mean |x - x E D|^2 of centred features, is tr((I - ED)' C (I - ED)) with C
    their covariance: so it is trained on C, exactly and without another pass over the data. L-BFGS from a random start,
    in float64, `steps` iterations at most. The encoder spans (at the optimum) what the principal directions span, but
    its columns are neither orthonormal nor ordered. The paper's training recipe is not public: optimiser, steps and
    start are ours.

    Args:
        covariance: C [c, c], symmetric, e.g. `kd.StreamingPCA.covariance()`; it is divided by its mean variance.
        k: width of the code. generator: for the start. dtype: of the result.

    >>> pca = kd.StreamingPCA(8)
    >>> pca.update(torch.randn(256, 8))
    >>> kd.autoencoder_basis(pca.covariance(), 2).shape
    torch.Size([8, 2])
    """
    checks.floating(covariance, "covariance")
    if covariance.dim() != 2 or covariance.shape[0] != covariance.shape[1]:
        raise ValueError(f"covariance has shape {tuple(covariance.shape)}: give [c, c]")
    c = covariance.shape[0]
    check_count(k, c)
    if not bool(torch.isfinite(covariance).all()):
        raise ValueError("covariance holds NaN or infinity")
    checks.integer(steps, "steps")
    C = covariance.detach().double()
    variance = C.diagonal().mean()
    C = C / torch.where(variance > 0, variance, 1.0)
    start = random_basis(c, k, generator=generator, device=C.device, dtype=torch.float64)
    with torch.enable_grad():
        E, D = start.clone().requires_grad_(), start.T.clone(memory_format=torch.contiguous_format).requires_grad_()
        how = {"tolerance_grad": 1e-9, "tolerance_change": 1e-14, "line_search_fn": "strong_wolfe"}
        optimiser = torch.optim.LBFGS([E, D], max_iter=steps, **how)

        def error():
            optimiser.zero_grad()
            R = torch.eye(c, dtype=C.dtype, device=C.device) - E @ D
            loss = ((C @ R) * R).sum()
            loss.backward()
            return loss

        optimiser.step(error)
    return E.detach().to(dtype)
