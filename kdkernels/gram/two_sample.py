# SPDX-License-Identifier: Apache-2.0
"""MMD as a member of the pair family: the three means are one weighted sum over the pairs of the joined samples."""

from __future__ import annotations

import torch

from ..autograd import at_least_float32
from . import reference
from .call import Question, Rows, check_features, check_mmd_masks
from .kernels import spec_of

LINEAR = spec_of("linear")[0]


def least_of(unbiased: bool) -> int:
    """The fewest samples of a side for which the estimator is defined."""
    return 2 if unbiased else 1


def as_sum(kernel, unbiased: bool):
    """MMD as a question about pairs of the joined samples and their labels, and its kernels."""
    kernels = kernel, LINEAR
    return Question("sum", kernels, unbiased, False, False, True), kernels


def promoted(x, y):
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


def check(samples: Rows, empty: bool = False):
    """The pair of masks. empty: no rows are enough, as on one of several ranks."""
    x, y, mask = samples
    check_features(x, y, same_rows=False, empty=empty)
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"y has {y.shape[-1]} features, x has {x.shape[-1]}: mmd compares samples of one space")
    return check_mmd_masks(mask, x, y)


def checked(samples: Rows, unbiased: bool) -> Rows:
    """With a pair of masks, and samples enough on either side."""
    masks, least = check(samples), least_of(unbiased)
    for name, n in (("x", samples.x.shape[-2]), ("y", samples.y.shape[-2])):
        if n < least:
            raise ValueError(f"{name} has {n} rows: mmd with unbiased={unbiased} needs at least {least}")
    return Rows(samples.x, samples.y, masks)


def joined(samples: Rows, unbiased: bool, over=lambda own: own) -> Rows:
    """The samples of both sides as rows, their labels, and which of them count."""
    return Rows(torch.cat(promoted(samples.x, samples.y), dim=-2), *labels(samples, unbiased, over))


def labels(samples: Rows, unbiased: bool, over=lambda own: own):
    """Label rows whose linear Gram matrix holds the weights of the three means: mmd is then sum_ij K_ij L_ij.

    The weight matrix [[a, -c], [-c, b]] has the Cholesky rows (sqrt a, 0) and (-c/sqrt a, sqrt(b - c^2/a)).
    over: from a count of these rows to that of all, where x and y are a part of them.
    """
    (x, y, masks), least, counts, keep = samples, least_of(unbiased), [], None
    for features, mask in zip((x, y), masks, strict=True):
        full = torch.full(
            features.shape[:-2], torch.sym_float(features.shape[-2]), dtype=torch.float64, device=x.device
        )
        counts.append(over(full if mask is None else mask.sum(-1).double()))
    if any(mask is not None for mask in masks):
        keep = [
            torch.ones(f.shape[:-1], dtype=torch.bool, device=x.device) if mask is None else mask
            for f, mask in zip((x, y), masks, strict=True)
        ]
        enough = ((counts[0] >= least) & (counts[1] >= least))[..., None]
        keep = torch.cat(keep, -1) & enough
    n, m = (c.clamp(min=least) for c in counts)
    a, b, c = (1 / (n * (n - 1)), 1 / (m * (m - 1)), 1 / (n * m)) if unbiased else (1 / n**2, 1 / m**2, 1 / (n * m))
    zero = torch.zeros_like(a)
    first = torch.stack([a.sqrt(), zero], -1)
    second = torch.stack([-c / a.sqrt(), (b - c * c / a).clamp(min=0).sqrt()], -1)
    shape = x.shape[:-2]
    rows = [row[..., None, :].expand(*shape, features.shape[-2], 2) for row, features in ((first, x), (second, y))]
    return torch.cat(rows, -2).to(at_least_float32(x, y)), keep


def reference_mmd(samples: Rows, kernel, unbiased: bool):
    (x, y, masks), least = samples, least_of(unbiased)
    if x.dim() == 2:
        masks = [None if mask is None else mask[None] for mask in masks]
        return reference_mmd(Rows(x[None], y[None], masks), kernel, unbiased)[0]
    dtype, values = at_least_float32(x, y), []
    x, y = x.double(), y.double()
    for g in range(x.shape[0]):
        xg, yg = (t[g] if mask is None else t[g][mask[g]] for t, mask in zip((x, y), masks, strict=True))
        enough = min(len(xg), len(yg)) >= least
        own = kernel.of_group(g)
        values.append(reference.mmd_one(xg, yg, own, unbiased) if enough else reference.zero_of(xg, yg, own.sigma))
    return torch.stack(values).to(dtype)
