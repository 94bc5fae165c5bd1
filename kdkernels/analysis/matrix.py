# SPDX-License-Identifier: Apache-2.0
"""CKA of all layer pairs of two lists of features, in one pass over tiles of their Gram matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import checks
from .._types import Backend, Mask
from ..autograd import at_least_float32, device_type, without_autocast
from ..gram.call import check_bandwidths, minimum_rows
from ..gram.kernels import KernelLike, spec_of
from ..gram.op import cka
from . import masks, sums
from .sums import Hsics


@torch.no_grad()
def cka_matrix(
    xs: Sequence[torch.Tensor],
    ys: Sequence[torch.Tensor],
    *,
    mask: Mask = None,
    kernel: KernelLike = "linear",
    unbiased: bool = True,
    backend: Backend = "auto",
) -> torch.Tensor:
    """CKA of every layer of `xs` with every layer of `ys`: entry [l, m] is `kd.cka(xs[l], ys[m])`.

    A tile of a layer's Gram matrix is computed once, not once a pair, and the sums of all pairs are one matrix product
    of flattened tiles, [L, tile^2] @ [tile^2, M]; linear and cosine kernels take feature space, |X'Y|^2, where that is
    less work. Memory: a prepared copy of the features and tiles of at most 64 MB in all; no n x n.
    Source: Kornblith et al. 2019 (arXiv 1905.00414); unbiased estimator HSIC_1: Song et al. 2012.

    Args:
        xs: features of L layers, tensors [n, p_l]; float16, bfloat16, float32 or float64, each its own width and dtype.
        ys: features [n, q_m] of M layers for the same samples; `ys=xs` compares the layers of one network.
        mask: bool [n], which rows count; the others may hold NaN. On CUDA their number is waited for.
        kernel: as in `kd.cka`: a name, an object, or a pair (for xs, for ys); a bandwidth rule sees each layer alone.
        unbiased: HSIC_1 (n >= 4; may be negative), else HSIC_0.
        backend: "auto", "torch", "cpp" or "reference" (one `kd.cka` a pair). It runs in PyTorch on any device.

    Returns:
        [L, M]; float32, or float64 if any input is. No gradient: it is an analysis; `kd.cka` is the differentiable one.
        A constant layer has CKA 0 with all; a NaN in a layer makes its row (or column) NaN and no other.

    Raises:
        ValueError: empty lists, layers of different numbers of rows, too few rows. TypeError: what is no float tensor.

    >>> x = torch.randn(64, 8)
    >>> layers = [x, x * 2 + 1, torch.randn(64, 4)]
    >>> kd.cka_matrix(layers, layers[:2]).shape
    torch.Size([3, 2])
    >>> kd.cka_matrix(layers, layers[:2])[:2].allclose(torch.ones(2, 2))
    True
    """
    xs, ys = check_layers(xs, "xs"), check_layers(ys, "ys")
    kernels = spec_of(kernel)
    check_together(xs, ys)
    both = masks.counted([*xs, *ys], mask)
    xs, ys = both[: len(xs)], both[len(xs) :]
    checks.flags(unbiased=unbiased)
    least = minimum_rows(unbiased, True)
    if xs[0].shape[0] < least:
        which = "" if mask is None else " that count"
        raise ValueError(
            f"xs and ys have {xs[0].shape[0]} rows{which}: CKA with unbiased={unbiased} needs at least {least}"
        )
    for x in (*xs, *ys):
        check_bandwidths(kernels, x)
    dtype = at_least_float32(*xs, *ys)
    chosen = sums.choose_backend(backend, xs[0])
    if chosen == "reference":
        how = {"kernel": kernels, "unbiased": unbiased, "backend": chosen}
        return torch.stack([torch.stack([cka(x, y, **how).to(dtype) for y in ys]) for x in xs])
    with without_autocast(device_type(xs[0])):
        return ratio(hsics(xs, ys, kernels, unbiased, chosen, dtype)).to(dtype)


def hsics(xs, ys, kernels, unbiased: bool, backend: str, dtype) -> Hsics:
    """The three HSICs of all pairs; layers that are the same tensors on both sides are prepared once."""
    problem, centre = sums.problem_of(kernels, unbiased), sums.centring(backend)
    same = kernels[0] is kernels[1] and len(xs) == len(ys) and all(x is y for x, y in zip(xs, ys, strict=True))
    together = len(xs) if same else len(xs) + len(ys)
    A = B = sums.Layers(len(xs), together, kernels[0], problem, dtype, True, centre)
    for x in xs:
        A.put(x)
    if not same:
        B = sums.Layers(len(ys), together, kernels[1], problem, dtype, False, centre)
        for y in ys:
            B.put(y)
    return sums.hsics(A, B)


def ratio(h: Hsics) -> torch.Tensor:
    """h(K, L) / sqrt(h(K, K) h(L, L)), 0 where a side is constant."""
    kk, ll = (torch.where(side == 0, torch.ones_like(side), side).sqrt() for side in (h.kk, h.ll))
    return h.kl / kk[:, None] / ll


def check_layers(layers, name: str) -> list[torch.Tensor]:
    if isinstance(layers, torch.Tensor) or not isinstance(layers, Sequence):
        raise TypeError(f"{name} is a {type(layers).__name__}: give a list of feature tensors [n, p], one a layer")
    if not layers:
        raise ValueError(f"{name} is an empty list: it needs the features of at least one layer")
    for place, x in enumerate(layers):
        check_layer(x, f"{name}[{place}]")
    return list(layers)


def check_layer(x, name: str):
    checks.floating(x, name)
    if x.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: give [n, p], e.g. {name}.flatten(1)")
    checks.not_empty(x, name)
    checks.finite(x, name)


def check_together(xs, ys):
    """One device, one number of rows."""
    first, n = xs[0], xs[0].shape[0]
    for name, layers in (("xs", xs), ("ys", ys)):
        for place, x in enumerate(layers):
            checks.same_device(first, x, "xs[0]", f"{name}[{place}]")
            if x.shape[0] != n:
                raise ValueError(
                    f"{name}[{place}] has {x.shape[0]} rows, xs[0] has {n}: all layers must describe the same samples, "
                    "in one order"
                )
