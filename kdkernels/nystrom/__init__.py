# SPDX-License-Identifier: Apache-2.0
"""Nystrom landmarks: features, selection, and kernel statistics of many rows without n x n."""

from .op import (
    nystrom_cka,
    nystrom_features,
    nystrom_hsic,
    nystrom_transfer,
    select_landmarks,
    transfer_quality,
)

__all__ = [
    "nystrom_cka",
    "nystrom_features",
    "nystrom_hsic",
    "nystrom_transfer",
    "select_landmarks",
    "transfer_quality",
]
