# SPDX-License-Identifier: Apache-2.0
"""Soft ranks, soft sorts and rank correlations of rows, differentiable, O(n log n), any dtype, absent entries as -inf.

Read on in `reference.py` (what is computed), `torch_impl.py` and `isotonic.py` (how, in PyTorch), `csrc/rank/` (how,
compiled).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import backend as backends
from ..autograd import without_autocast
from . import (
    batching,  # noqa: F401  registers
    function,
    metrics,
    pairs,
    reference,
)
from .checks import check_pair, check_regularization, check_rows
from .strength import Strength, of_rows, parse

__all__ = ["RankDiagnostics", "pearson", "rank_diagnostics", "soft_rank", "soft_sort", "spearman", "spearman_corr"]


def soft_rank(
    x, regularization="l2", regularization_strength=1.0, *, dim=-1, descending=False, backend="auto"
) -> torch.Tensor:
    """Soft ranks along dim: the projection of x / eps on the permutahedron of (n, ..., 1).

    >>> kd.soft_rank(torch.tensor([5.0, 1.0, 2.0]), "l2", 2.0)
    tensor([3.0000, 1.2500, 1.7500])
    """
    return _along(_soft_rank, "soft_rank", x, regularization, regularization_strength, dim, descending, backend)


def soft_sort(
    x, regularization="l2", regularization_strength=1.0, *, dim=-1, descending=False, backend="auto"
) -> torch.Tensor:
    """Softly sorted values along dim: the projection of (n, ..., 1) / eps on the permutahedron of x.

    >>> kd.soft_sort(torch.tensor([5.0, 1.0, 2.0]), "l2", 2.0)
    tensor([2.1667, 2.6667, 3.1667])
    """
    return _along(_soft_sort, "soft_sort", x, regularization, regularization_strength, dim, descending, backend)


def _along(run, op, x, regularization, strength, dim, descending, backend):
    dim, kl = check_rows(x, dim), check_regularization(regularization)
    last = dim == x.dim() - 1
    rows = x if last else x.movedim(dim, -1)
    chosen = backends.resolve(op, backend, x.device.type, (x.dtype,))
    out = run(rows, parse(strength, rows), kl, bool(descending), chosen)
    return out if last else out.movedim(-1, dim)


def _eps(rows, strength):
    poisoned = ((rows == torch.inf) | rows.isnan()).any(-1)
    return of_rows(rows, rows != -torch.inf, poisoned, strength)


def _soft_rank(rows, strength, kl, descending, chosen):
    if chosen != "reference":
        return function.soft_rank(rows, strength, kl, descending, chosen)
    with without_autocast(rows.device.type):
        return reference.soft_rank(rows, _eps(rows, strength), kl, descending)[0]


def _soft_sort(rows, strength, kl, descending, chosen):
    if chosen != "reference":
        return function.soft_sort(rows, strength, kl, descending, chosen)
    with without_autocast(rows.device.type):
        return reference.soft_sort(rows, _eps(rows, strength), kl, descending)


class RankDiagnostics(NamedTuple):
    """Of each row: the fraction of elements pooled with others, and the number of blocks."""

    fraction_pooled: torch.Tensor
    blocks: torch.Tensor


def rank_diagnostics(x, regularization_strength=1.0, *, dim=-1, regularization="l2", backend="auto") -> RankDiagnostics:
    """How soft the ranks are.

    >>> kd.rank_diagnostics(torch.tensor([5.0, 1.0, 2.0]), 2.0)
    RankDiagnostics(fraction_pooled=tensor(0.6667), blocks=tensor(2))
    """
    dim, kl = check_rows(x, dim), check_regularization(regularization)
    rows = x.detach().movedim(dim, -1)
    strength = parse(regularization_strength, rows)
    strength = strength._replace(tensor=None if strength.tensor is None else strength.tensor.detach())
    chosen = backends.resolve("rank_diagnostics", backend, x.device.type, (x.dtype,))
    if chosen == "reference":
        ids = reference.soft_rank(rows, _eps(rows, strength), kl, False)[1]
    else:
        ids = function.blocks(rows, strength, kl, chosen)
    return RankDiagnostics(*metrics.diagnose(rows, ids))


def spearman(
    x, y, *, dim=-1, regularization="l2", regularization_strength="auto", hard_target=False, backend="auto"
) -> torch.Tensor:
    """Differentiable rank correlation of the rows of x and y.

    >>> x = torch.randn(4, 10)
    >>> kd.spearman(x, 2 * x + 1).allclose(torch.ones(4))
    True
    """
    dim, kl = check_pair(x, y, dim), check_regularization(regularization)
    x, y = x.movedim(dim, -1), y.movedim(dim, -1)
    strength = parse(regularization_strength, x)
    chosen = backends.resolve("spearman", backend, x.device.type, (x.dtype, y.dtype))
    if chosen in ("cpp", "cuda") and strength.tensor is None:
        return pairs.spearman(x, y, strength, kl, bool(hard_target), chosen)
    dtype = metrics.value_dtype(x, y)
    x, y, valid = metrics.drop_pairs(x, y)
    r = _soft_rank(x, strength, kl, False, chosen)
    t = _soft_rank(y, Strength(0.0, None, False) if hard_target else strength, kl, False, chosen)
    if chosen == "reference":
        return reference.correlation(r, t, valid).to(dtype)
    return metrics.of_ranks(r, t, valid, dtype)


def pearson(x, y, *, dim=-1, backend="auto") -> torch.Tensor:
    """Linear correlation of the rows of x and y.

    >>> x = torch.randn(4, 10)
    >>> kd.pearson(x, 2 * x + 1).allclose(torch.ones(4))
    True
    """
    dim = check_pair(x, y, dim)
    x, y = x.movedim(dim, -1), y.movedim(dim, -1)
    chosen = backends.resolve("pearson", backend, x.device.type, (x.dtype, y.dtype))
    if chosen == "reference":
        valid, dtype = (x != -torch.inf) & (y != -torch.inf), metrics.value_dtype(x, y)
        return reference.correlation(x.to(dtype), y.to(dtype), valid)
    return pairs.pearson(x, y)


def spearman_corr(x, y, *, dim=-1, backend="auto") -> torch.Tensor:
    """Rank correlation with hard ranks, ties averaged, as scipy's: a metric, without gradient.

    >>> kd.spearman_corr(torch.tensor([1.0, 2.0, 2.0, 4.0]), torch.tensor([1.0, 3.0, 2.0, 4.0]))
    tensor(0.9487)
    """
    dim = check_pair(x, y, dim)
    x, y = x.detach().movedim(dim, -1), y.detach().movedim(dim, -1)
    chosen = backends.resolve("spearman_corr", backend, x.device.type, (x.dtype, y.dtype))
    dtype = metrics.value_dtype(x, y)
    x, y, valid = metrics.drop_pairs(x, y)
    hard = Strength(0.0, None, False)
    r, t = (_soft_rank(side, hard, False, False, chosen) for side in (x, y))
    if chosen == "reference":
        return reference.correlation(r, t, valid).to(dtype)
    return metrics.of_ranks(r, t, valid, dtype)
