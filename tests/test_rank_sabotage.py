# SPDX-License-Identifier: Apache-2.0
"""The contract of the ranking ops can fail: each of these breaks the torch backend in one way and must be noticed."""

import math

import pytest
import torch
from broken import rejects, without_last

from kdkernels.rank import isotonic, metrics, torch_impl

FORWARD, BACKWARD = torch_impl.rank_forward, torch_impl.rank_backward
SORT, SORT_BACKWARD, NEGATED = torch_impl.sort_forward, torch_impl.sort_backward, torch_impl.negated
BLOCKS, MERGE = torch_impl.sorted_blocks, isotonic._merge
STRENGTH, PEARSON = torch_impl.rank_strength_gradient, metrics.pearson_gradient


def ranks(change):
    def forward(*a):
        rank, blocks, eps = FORWARD(*a)
        return change(rank), blocks, eps

    return {"rank_forward": forward}


def block_ids(change):
    def forward(*a):
        rank, blocks, eps = FORWARD(*a)
        return rank, change(blocks) if blocks.numel() else blocks, eps

    return {"rank_forward": forward}


def gradient(change):
    return {"rank_backward": lambda *a: change(BACKWARD(*a))}


def sees(change):
    """The forward pass ranks other rows."""
    return {"rank_forward": lambda x, *rest: FORWARD(change(x), *rest)}


def without_mean(grad, x, rank, blocks, eps, kl, descending):
    """l2 without the mean over the block, kl with a plain one."""
    pooled = (blocks >= 0) & ~eps.isnan()[..., None]
    return torch.where(pooled, grad / eps[..., None] * (-1 if descending else 1), 0.0).to(x.dtype)


def one_pass_less(V, value, L):
    """The last merge of every row is left out."""
    return V.flatten(-2).unflatten(-1, (-1, 2 * L)) if V.shape[-2] == 1 else MERGE(V, value, L)


def singles(s, gone, eps, *rest):
    return BLOCKS(s, gone, eps * 1e-6, *rest)


def half_strength(*a):
    return STRENGTH(*a) * 0.5


def first_term(grad, x, y, moments, *needs):
    moments = moments.clone()
    moments[4] = 0  # rho
    return PEARSON(grad, x, y, moments, *needs)


def mean_of_all(r, t, valid, dtype):
    m = (r.shape[-1] + 1) / 2
    return metrics.correlation(r.double() - m, t.double() - m, valid).to(dtype)


SABOTAGE = {
    "ranks from 0": ("soft_rank", "value", ranks(lambda r: r - 1)),
    "descending for ascending": ("soft_rank", "value", ranks(lambda r: r.shape[-1] + 1 - r)),
    "rounded to half": ("soft_rank", "value", ranks(lambda r: r.half().to(r.dtype))),
    "wrong row": ("soft_rank", "value", ranks(lambda r: r.roll(1, 0))),
    "lost last column": ("soft_rank", "value", sees(without_last(-1))),
    "absent entries as numbers": ("soft_rank", "value", sees(lambda x: x.clamp(min=-1e30))),
    "poison spreads": ("soft_rank", "value", ranks(lambda r: r + r.sum() * 0)),
    "poison is cleaned": ("soft_rank", "value", ranks(lambda r: r.nan_to_num(0.0))),
    "no pooling": ("soft_rank", "value", {"sorted_blocks": singles}),
    "one level of merges missing": ("soft_rank", "value", {(isotonic, "_merge"): one_pass_less}),
    "gradient without its last column": ("soft_rank", "gradient x", gradient(without_last(-1))),
    "gradient of the wrong row": ("soft_rank", "gradient x", gradient(lambda g: g.roll(1, 0))),
    "gradient without the mean": ("soft_rank", "gradient x", {"rank_backward": without_mean}),
    "all in one block": ("soft_rank", "gradient x", block_ids(torch.zeros_like)),
    "elements of other blocks": ("soft_rank", "gradient x", block_ids(lambda b: b.clamp(max=3))),
    "gradient of the strength, half": ("soft_rank", "gradient strength", {"rank_strength_gradient": half_strength}),
    "sorted the other way": ("soft_sort", "value", {"negated": lambda x, gone=None: x}),
    "hard sort": ("soft_sort", "value", {"sort_forward": lambda s, *a: (s.to(SORT(s, *a)[0].dtype), *SORT(s, *a)[1:])}),
    "gradient not sorted back": (
        "soft_sort",
        "gradient x",
        {"sort_backward": lambda *a: SORT_BACKWARD(*a).roll(1, -1)},
    ),
    "ignored upstream": (
        "soft_sort",
        "gradient x",
        {"sort_backward": lambda g, *a: SORT_BACKWARD(torch.ones_like(g), *a)},
    ),
    "pairs not dropped": (
        "spearman",
        "value",
        {(metrics, "drop_pairs"): lambda x, y: (x, y, (x != -math.inf) & (y != -math.inf))},
    ),
    "pearson's gradient, first term only": ("pearson", "gradient x", {(metrics, "pearson_gradient"): first_term}),
    "mean of n, not of what is there": ("spearman_corr", "value", {(metrics, "of_ranks"): mean_of_all}),
}  # fmt: skip


@pytest.mark.parametrize("name", SABOTAGE)
def test_the_contract_rejects(name, monkeypatch):
    assert rejects(monkeypatch, *SABOTAGE[name], torch_impl)
