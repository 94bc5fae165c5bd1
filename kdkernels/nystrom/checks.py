# SPDX-License-Identifier: Apache-2.0
"""What the Nystrom ops require of their arguments, with the family's own wording."""

from __future__ import annotations

import torch

from .. import checks

WHITENINGS = ("cholesky", "sqrt")
METHODS = ("rpcholesky", "uniform", "kmeans++", "greedy")


def check_rows(x, name: str, empty: bool = False):
    """empty: whether no rows at all are fine, those of one rank."""
    checks.floating(x, name)
    if x.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: give rows [n, d] (flatten or pool other layouts first)")
    if not empty or x.shape[1] == 0:
        checks.not_empty(x, name)
    checks.finite(x, name)


def check_side(x, landmarks, name: str, landmarks_name: str, empty: bool = False):
    check_rows(x, name, empty)
    check_rows(landmarks, landmarks_name)
    checks.same_device(x, landmarks, name, landmarks_name)
    if x.shape[1] != landmarks.shape[1]:
        raise ValueError(
            f"{landmarks_name} has width {landmarks.shape[1]}, {name} has {x.shape[1]}: "
            f"landmarks live in the space of {name}, e.g. {name}[kd.select_landmarks({name}, m)]"
        )


def check_same_rows(x, y, name_x: str, name_y: str):
    checks.same_device(x, y, name_x, name_y)
    if x.shape[0] != y.shape[0]:
        raise ValueError(
            f"{name_y} has {y.shape[0]} rows, {name_x} has {x.shape[0]}: both sides must describe the same samples"
        )


def check_mask(mask, x, name_x: str):
    if mask is None:
        return
    checks.boolean(mask, x, name_x, what="the rows that count")
    if mask.shape != x.shape[:1]:
        raise ValueError(f"mask has shape {tuple(mask.shape)}: one entry a row of {name_x} is {tuple(x.shape[:1])}")


def check_whitening(whiten, jitter) -> float:
    if whiten not in WHITENINGS:
        raise ValueError(f"whiten is {whiten!r}: give one of {WHITENINGS}")
    return check_jitter(jitter)


def check_jitter(jitter) -> float:
    if not checks.is_number(jitter):
        raise TypeError(f"jitter is {jitter!r}: give a number, relative to the mean diagonal of W")
    if not 0 <= jitter < float("inf"):  # math.isfinite would be a graph break where jitter is a symbol
        raise ValueError(f"jitter is {jitter!r}: it is added to the diagonal of W, give a finite number >= 0")
    return float(jitter)


def check_bandwidths(kernels):
    for kernel in kernels:
        sigma = kernel.sigma
        if not isinstance(sigma, torch.Tensor):
            continue
        if sigma.numel() != 1:
            raise ValueError(f"sigma has {sigma.numel()} values: a Nystrom op has no groups, give one")
        if checks.may_read(sigma) and not bool((sigma > 0).all()):
            raise ValueError("sigma holds a value that is not positive: a bandwidth must be > 0")


def check_selection(x, m, method):
    check_rows(x, "x")
    checks.integer(m, "m", None, ", the number of landmarks")
    if not 1 <= m <= x.shape[0]:
        raise ValueError(f"m is {m}: x has {x.shape[0]} rows, give 1 <= m <= {x.shape[0]}")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}: give one of {METHODS}")


def one_kernel(pair):
    if pair[0] is not pair[1]:
        raise ValueError("kernel is a pair: there is one side here, give one kernel function")
    return pair[0]
