# SPDX-License-Identifier: Apache-2.0
"""What the Gram ops require of their tensors, with the family's own wording."""

from __future__ import annotations

import torch

from .. import checks


def check_features(x, y, same_rows: bool = True, empty: bool = False):
    """empty: no rows are enough, as on one of several ranks."""
    checks.floating(x, "x")
    checks.floating(y, "y")
    checks.same_device(x, y, "x", "y")
    if x.dim() not in (2, 3):
        raise ValueError(f"x has shape {tuple(x.shape)}: give [n, p], or [G, n, p] for G groups")
    if y.dim() != x.dim():
        raise ValueError(
            f"y has shape {tuple(y.shape)}, x has {tuple(x.shape)}: give both with the same number of dims"
        )
    for side, name in ((x, "x"), (y, "y")):
        if not (empty and side.shape[-2] == 0 and side.shape[-1] > 0):
            checks.not_empty(side, name)
    if x.dim() == 3 and y.shape[0] != x.shape[0]:
        raise ValueError(f"y has {y.shape[0]} groups, x has {x.shape[0]}: groups are compared one to one")
    if same_rows and x.shape[-2] != y.shape[-2]:
        raise ValueError(
            f"y has {y.shape[-2]} rows, x has {x.shape[-2]}: both sides must describe the same samples, in one order"
        )
    checks.finite(x, "x")
    checks.finite(y, "y")


def check_mask(mask, x, name):
    checks.is_tensor(mask, name)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} is {mask.dtype}: pass a bool tensor, True for the rows that count")
    if mask.shape != x.shape[:-1]:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}: one entry a row of x is {tuple(x.shape[:-1])}")
    checks.same_device(mask, x, name, "x")


def check_mmd_masks(mask, x, y):
    if mask is None:
        return None, None
    if not isinstance(mask, (tuple, list)) or len(mask) != 2:
        raise ValueError(
            "mask: mmd takes a pair (mask_x, mask_y), each a bool tensor or None, as x and y are different rows"
        )
    for one, features, name in ((mask[0], x, "mask[0]"), (mask[1], y, "mask[1]")):
        if one is not None:
            check_mask(one, features, name)
    return tuple(mask)


def check_bandwidths(kernels, x):
    for kernel in kernels:
        sigma = kernel.sigma
        if not isinstance(sigma, torch.Tensor):
            continue
        groups = x.shape[0] if x.dim() == 3 else 1
        if sigma.dim() == 1 and len(sigma) not in (1, groups):
            raise ValueError(f"sigma has {len(sigma)} values: give one, or one for each of the {groups} groups")
        if checks.may_read(sigma) and not bool((sigma > 0).all()):
            raise ValueError("sigma holds a value that is not positive: a bandwidth must be > 0")
