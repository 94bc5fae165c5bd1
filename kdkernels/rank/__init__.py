# SPDX-License-Identifier: Apache-2.0
"""Soft ranks, soft sorts, and the correlations of rows built on them."""

from . import batching  # noqa: F401  it registers
from .op import RankDiagnostics, pearson, rank_diagnostics, soft_rank, soft_sort, spearman, spearman_corr

__all__ = [
    "RankDiagnostics",
    "pearson",
    "rank_diagnostics",
    "soft_rank",
    "soft_sort",
    "spearman",
    "spearman_corr",
]
