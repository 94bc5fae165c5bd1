# SPDX-License-Identifier: Apache-2.0
"""Soft ranks, soft sorts and rank correlations of rows, differentiable, O(n log n), any dtype, with absent entries.

Read on in `reference.py` (what is computed), `torch_impl.py` and `isotonic.py` (how, in PyTorch), `csrc/rank/` (how,
compiled).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import backend as backends
from .. import checks
from .._types import Backend, Mask, Regularization, StrengthLike
from ..autograd import at_least_float32, device_name, device_type, without_autocast
from . import correlation, metrics, operator, reference
from .checks import absent, check_pair, check_regularization, check_rows, present
from .strength import Strength, of_rows, parse

__all__ = ["RankDiagnostics", "pearson", "rank_diagnostics", "soft_rank", "soft_sort", "spearman", "spearman_corr"]


def soft_rank(
    x: torch.Tensor,
    regularization: Regularization = "l2",
    regularization_strength: StrengthLike = 1.0,
    *,
    dim: int = -1,
    descending: bool = False,
    mask: Mask = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Differentiable ranks along dim: the projection of x / eps on the permutahedron, the hull of all ranks 1..n.

    Source: Blondel, Teboul, Berthet, Djolonga 2020 (arXiv 2002.08871). With x sorted descending and pooled into blocks
    of neighbours, l2: r_i = mean_B w + (x_i - mean_B x) / eps, kl: r_i = R_B exp(x_i / eps) / sum_B exp(x / eps), where
    w = n, ..., 1 and R_B = sum_B w. An element alone in its block has its hard rank, and gradient 0.

    Args:
        x: [..., n] along dim; float16, bfloat16, float32 or float64, any strides. An entry is absent where it is
            -inf or `torch.finfo(x.dtype).min`, by which masked logits are padded. The least number of a narrower dtype
            (half logits padded, then widened) and -1e4 are numbers like `finfo.max`: as a padding they stretch the
            spread that "auto" goes by until the ranks of the others are one block, so mask them.
        regularization: "l2", or "kl" (entropic; neighbours at w pool within eps log(w / (w - 1)), so it is harder).
        regularization_strength: eps, in the unit of x. A number; 0 gives hard ranks with zero gradient. A tensor, 0-d
            or one value a row, all > 0; it may have a gradient. "auto" is ("auto", 1.0), and ("auto", c) is
            eps = c std(x) sqrt(12) / n of the row's present entries, detached: softness then does not depend on the
            scale of x or on n. Under eps = 1 rows of unit scale and n >= 100 are one block, and r is affine in x.
        descending: the largest gets rank 1 (x is negated; what is absent stays so).
        mask: bool, of the shape of x or one that broadcasts to it, True for what is there: False is absent, like -inf,
            whatever x holds.
        backend: "auto", "cuda", "triton" (not of soft_sort; rows of up to 2,048), "cpp", "torch" or "reference" (which
            also gives higher derivatives).

    Returns:
        Ranks from 1 (smallest) to n, float32 for half inputs (float16 has no rank 2049), else x's dtype, like x. Blocks
        and means are found in float64. Gradients to x, in its dtype, and to a strength tensor. Ties share their rank;
        they pool always. Absent entries: rank 0, gradient 0, the others are ranked as if they were not there; a row
        of nothing else is 0. A row with NaN or +inf is NaN, and so is its gradient; no other row is. A constant row
        has ranks (n + 1) / 2 and, as its "auto" strength is c, a gradient.

    Raises:
        TypeError: x or a strength that is not floating. ValueError: a dim out of range, an unknown regularization, a
        strength that is negative or not finite (of a CUDA tensor nothing is read: the row is then NaN or undefined),
        more than 2^31 - 1 entries along dim.

    >>> kd.soft_rank(torch.tensor([5.0, 1.0, 2.0]), "l2", 2.0)
    tensor([3.0000, 1.2500, 1.7500])
    """
    return _along(_soft_rank, "soft_rank", x, regularization, regularization_strength, dim, descending, mask, backend)


def soft_sort(
    x: torch.Tensor,
    regularization: Regularization = "l2",
    regularization_strength: StrengthLike = 1.0,
    *,
    dim: int = -1,
    descending: bool = False,
    mask: Mask = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Differentiable sorting along dim: the projection of (n, ..., 1) / eps on the permutahedron of x.

    Source: as `soft_rank`. With s = x sorted descending, l2: v_i = mean_B s + ((a + b - 1) / 2 - i) / eps in block
    [a, b), kl: v_i = z_i - LSE_B z + LSE_B s with z_i = (n - i) / eps. Here a large eps pools everything (l2: to the
    mean of x) and a small one sorts. Unlike in `soft_rank`, ties may fall into different blocks: they are told apart
    by their position (stable). Under l2 ascending is descending backwards; under kl it is -f(-x), f the descending one,
    as in torchsort.

    Arguments, errors and NaN as in `soft_rank`; eps has the unit of 1 / x, and "auto" is no natural choice. Absent
    entries come last, as -inf, in either direction. The dtype is that of `soft_rank`. Ascending by default.

    >>> kd.soft_sort(torch.tensor([5.0, 1.0, 2.0]), "l2", 2.0)
    tensor([2.1667, 2.6667, 3.1667])
    """
    return _along(_soft_sort, "soft_sort", x, regularization, regularization_strength, dim, descending, mask, backend)


def _along(run, op, x, regularization, strength, dim, descending, mask, backend):
    dim, kl = check_rows(x, dim), check_regularization(regularization)
    checks.flags(descending=descending)
    rows = _last(present(x, mask), dim)
    long = backends.is_long(op, backend, device_type(x), rows.shape[-1])
    chosen = backends.resolve(op, backend, device_name(x), (x.dtype,), long)
    out = run(rows, parse(strength, rows), kl, descending, chosen)
    return out if dim == x.dim() - 1 else out.movedim(-1, dim)


def _last(t, dim):
    """t with dim last; where it is, a view that moves nothing would still be a node of the graph."""
    return t if dim == t.dim() - 1 else t.movedim(dim, -1)


def _eps(rows, strength):
    poisoned = ((rows == torch.inf) | rows.isnan()).any(-1)
    return of_rows(rows, ~absent(rows), poisoned, strength)


def _soft_rank(rows, strength, kl, descending, chosen):
    if chosen != "reference":
        return operator.soft_rank.value(rows, *strength, kl, descending, chosen)
    with without_autocast(device_type(rows)):
        wide = reference.soft_rank(rows, _eps(rows, strength), kl, descending)[0]
        return wide.to(at_least_float32(rows))


def _soft_sort(rows, strength, kl, descending, chosen):
    if chosen != "reference":
        return operator.soft_sort.value(rows, *strength, kl, descending, chosen)
    with without_autocast(device_type(rows)):
        wide = reference.soft_sort(rows, _eps(rows, strength), kl, descending)
        return wide.to(at_least_float32(rows))


class RankDiagnostics(NamedTuple):
    """Of each row: `fraction_pooled` of its present entries with others (float32), and the number of `blocks`."""

    fraction_pooled: torch.Tensor
    blocks: torch.Tensor


def rank_diagnostics(
    x: torch.Tensor,
    regularization_strength: StrengthLike = 1.0,
    *,
    dim: int = -1,
    regularization: Regularization = "l2",
    backend: Backend = "auto",
) -> RankDiagnostics:
    """How soft the ranks of x are: 0 pooled are hard ranks without gradient; one block of all is no ranking any more.

    In one block an l2 rank is affine in x: "Spearman" is then Pearson (STRENGTH.md). Arguments as in `soft_rank`.
    Entries alone in their block, all under strength 0, and those of NaN rows are not pooled. Without gradient.

    >>> kd.rank_diagnostics(torch.tensor([5.0, 1.0, 2.0]), 2.0)
    RankDiagnostics(fraction_pooled=tensor(0.6667), blocks=tensor(2))
    """
    dim, kl = check_rows(x, dim), check_regularization(regularization)
    rows = _last(x.detach(), dim)
    strength = parse(regularization_strength, rows)
    strength = strength._replace(tensor=None if strength.tensor is None else strength.tensor.detach())
    chosen = backends.resolve("rank_diagnostics", backend, device_name(x), (x.dtype,))
    if chosen == "reference":
        ids = reference.soft_rank(rows, _eps(rows, strength), kl, False)[1]
    else:
        ids = operator.soft_rank.forward(rows, *strength, kl, False, chosen, operator.X)[1]
    return RankDiagnostics(*metrics.diagnose(rows, ids))


def spearman(
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    dim: int = -1,
    regularization: Regularization = "l2",
    regularization_strength: StrengthLike = "auto",
    hard_target: bool = False,
    mask: Mask = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Differentiable rank correlation, one value a row: rho = <r - m, t - m> / (|r - m| |t - m|), m = (n + 1) / 2.

    r and t are the soft ranks of x and y (`soft_rank`), each with an eps of its own under "auto"; the mean m is exact.

    Args:
        x, y: [..., n] along dim, of one shape, each with a float dtype of its own.
        regularization, regularization_strength: as in `soft_rank`; the default adapts to each row's spread and n.
        hard_target: y's ranks are hard, ties averaged, and y's gradient is 0.
        mask: as in `soft_rank`, of pairs: False drops one.
        backend: as in `soft_rank`; all but "reference" find the gradient with the value (not under a strength tensor).

    Returns:
        [...] without dim, float32, float64 if either input is. Gradients to x, y and a strength tensor. A pair absent
        on either side is dropped from both, whatever its other half holds. Fewer than two pairs, or a side
        whose ranks are all equal: 0 with zero gradient, so a mean of 1 - rho had better leave out rows that have no two
        pairs, as below. NaN or +inf: value and gradients NaN in that row only.

    Raises: as `soft_rank`, and ValueError for two shapes or two devices.

    >>> x, mask = torch.randn(4, 10), torch.arange(10) < torch.tensor([[10], [5], [1], [0]])
    >>> rho, counted = kd.spearman(x, 2 * x + 1, mask=mask), mask.sum(-1) > 1
    >>> rho.allclose(counted.float())
    True
    >>> bool(torch.where(counted, 1 - rho, 0).sum() / counted.sum().clamp(min=1) < 1e-6)
    True
    """
    dim, kl = check_pair(x, y, dim), check_regularization(regularization)
    checks.flags(hard_target=hard_target)
    x, y = _last(present(x, mask), dim), _last(y, dim)  # what the mask takes out of x is out of y too
    strength = parse(regularization_strength, x)
    long = backends.is_long("spearman", backend, device_type(x), x.shape[-1])
    chosen = backends.resolve("spearman", backend, device_name(x), (x.dtype, y.dtype), long)
    if chosen != "reference" and strength.tensor is None:
        return correlation.spearman(x, y, strength.number, strength.relative, kl, hard_target, chosen)
    dtype = at_least_float32(x, y)
    x, y, valid = metrics.drop_pairs(x, y)
    if chosen != "reference":
        # soft ranks may all lie near their mean: rounded to float32, their differences would be lost
        x, y = x.double(), y.double()
    r = _soft_rank(x, strength, kl, False, chosen)
    t = _soft_rank(y, Strength(None, 0.0, False) if hard_target else strength, kl, False, chosen)
    if chosen == "reference":
        return reference.correlation(r, t, valid).to(dtype)
    return metrics.of_ranks(r, t, valid, dtype)


def pearson(
    x: torch.Tensor, y: torch.Tensor, *, dim: int = -1, mask: Mask = None, backend: Backend = "auto"
) -> torch.Tensor:
    """Linear correlation, one value a row: <x - mean x, y - mean y> / (|x - mean x| |y - mean y|).

    Sums are float64. Arguments, masks, absent pairs, constant rows (0 with zero gradient), NaN and dtypes as in
    `spearman`; the gradient is written out. backend: "auto", "torch" or "reference".

    >>> x = torch.randn(4, 10)
    >>> kd.pearson(x, 2 * x + 1).allclose(torch.ones(4))
    True
    """
    dim = check_pair(x, y, dim)
    x, y = _last(present(x, mask), dim), _last(y, dim)
    chosen = backends.resolve("pearson", backend, device_type(x), (x.dtype, y.dtype))
    if chosen == "reference":
        valid, dtype = ~(absent(x) | absent(y)), at_least_float32(x, y)
        return reference.correlation(x, y, valid).to(dtype)
    return correlation.pearson(x, y)


def spearman_corr(
    x: torch.Tensor, y: torch.Tensor, *, dim: int = -1, mask: Mask = None, backend: Backend = "auto"
) -> torch.Tensor:
    """Rank correlation of hard ranks, ties averaged, equal to scipy.stats.spearmanr: a metric, without gradient.

    Of finite values, that is: scipy ranks infinities, where here a pair with -inf is absent and +inf gives NaN.
    Arguments, masks, absent pairs, constant rows (0, where scipy has NaN), NaN and dtypes as in `spearman`.

    >>> kd.spearman_corr(torch.tensor([1.0, 2.0, 2.0, 4.0]), torch.tensor([1.0, 3.0, 2.0, 4.0]))
    tensor(0.9487)
    """
    dim = check_pair(x, y, dim)
    x, y = _last(present(x.detach(), mask), dim), _last(y.detach(), dim)
    chosen = backends.resolve("spearman_corr", backend, device_name(x), (x.dtype, y.dtype))
    dtype = at_least_float32(x, y)
    x, y, valid = metrics.drop_pairs(x, y)
    hard = Strength(None, 0.0, False)
    r, t = (_soft_rank(side, hard, False, False, chosen) for side in (x, y))
    if chosen == "reference":
        return reference.correlation(r, t, valid).to(dtype)
    return metrics.of_ranks(r, t, valid, dtype)
