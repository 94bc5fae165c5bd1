# SPDX-License-Identifier: Apache-2.0
"""Relations among the samples of a batch, student against teacher, from n x n products of samples alone.

Read on in `reference.py` (what is computed), `torch_impl.py` (how, in PyTorch), `triton_impl.py` (how, on a GPU) and
`csrc/relation/` (how, on a CPU).
"""

from __future__ import annotations

import torch

from .. import backend as backends
from .._types import Backend, Mask
from ..autograd import at_least_float32, device_type, in_pytorch
from ..distributed import GroupLike, agreed, rows_first
from ..gram.call import check_features, check_mask
from . import reference
from .operator import relation
from .problem import EPS, MINIMUM

__all__ = ["pkt", "rkd_angle", "rkd_distance"]


def rkd_distance(
    x: torch.Tensor, y: torch.Tensor, *, mask: Mask = None, group: GroupLike = None, backend: Backend = "auto"
) -> torch.Tensor:
    """mean_ik smooth_l1(d_ik(x) / mu(x) - d_ik(y) / mu(y)), d Euclidean, mu the mean of the distances that are not 0.

    Source: RKD-D of Relational Knowledge Distillation, Park et al. 2019, arXiv 1904.05068; the mean over all n^2 pairs,
    self-pairs included, is that of its reference implementation.

    Args:
        x: features [n, p] or, for G independent groups at once, [G, n, p], n >= 2; float16, bfloat16, float32 or
            float64.
        y: features [n, q] or [G, n, q] of the same samples; its own width and float dtype.
        mask: bool [n] or [G, n]: False rows enter neither means nor counts and get gradient 0, whatever they hold.
        group: None, or "world" or a process group: the value for the rows of all its ranks, as in `kd.cka`; they are
            gathered, and n is then any number.
        backend: "auto", "cpp", "torch" or "reference" (the last one also gives higher derivatives).

    Returns:
        A scalar, or [G]; float32 for half inputs, else the promoted dtype of x and y. Pairs are computed in float64
        from the centred rows. Gradients to x and y, also through mu. Identical samples, and those closer than 1e-7 of
        their distance to the mean, have distance 0, which has gradient 0 and does not enter mu. 0 with zero gradient
        where a mask leaves fewer than 2 rows. NaN or infinity in a row that counts gives NaN.

    Raises:
        ValueError: shapes that do not fit, a single row. TypeError: a dtype that is not float.

    >>> x = torch.randn(16, 8)
    >>> rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    >>> bool(kd.rkd_distance(x, 3 * x @ rotation) < 1e-9)
    True
    """
    return _relation("rkd_distance", x, y, mask, group, backend)


def rkd_angle(
    x: torch.Tensor, y: torch.Tensor, *, mask: Mask = None, group: GroupLike = None, backend: Backend = "auto"
) -> torch.Tensor:
    """mean_vik smooth_l1(cos_vik(x) - cos_vik(y)), cos_vik that of the angle at v between samples i and k.

    Source: RKD-A of Relational Knowledge Distillation, Park et al. 2019, arXiv 1904.05068; the mean over all n^3
    triples is that of its reference implementation, as is cos = 0 where v is identical with i or k.

    The angles follow from the n x n distances (law of cosines): value and gradient take one pass over the triples, and
    nothing of n^2 p or n^3 numbers is stored. n >= 3; a mask that leaves fewer rows gives 0.

    Arguments (group too), dtypes, gradients, identical samples, NaN and errors as in `rkd_distance`, with
    backend: "auto", "triton", "cpp", "torch" or "reference".

    >>> x, y = torch.randn(16, 8, requires_grad=True), torch.randn(16, 32)
    >>> kd.rkd_angle(x, y).backward()
    >>> bool(kd.rkd_angle(x, 2 * x + 1) < 1e-9)
    True
    """
    return _relation("rkd_angle", x, y, mask, group, backend)


def pkt(
    x: torch.Tensor, y: torch.Tensor, *, mask: Mask = None, group: GroupLike = None, backend: Backend = "auto"
) -> torch.Tensor:
    """mean_ik T_ik log((T_ik + eps) / (P_ik + eps)), P and T rows of (cos + 1) / 2 scaled to sum 1, eps = 1e-7.

    P is of x, T of y; cos of two samples, with eps added to their norms. Source: Learning Deep Representations with
    Probabilistic Knowledge Transfer, Passalis and Tefas 2018, arXiv 1803.10837; eps, self-pairs and the mean over n^2
    as in its reference implementation, whose values for training are scaled up by 30000 (RepDistiller).

    Arguments (group too), dtypes, NaN, errors as in `rkd_distance`; nats. n >= 2; a mask that leaves fewer gives 0. A
    sample that is 0 has cosine 0 to all and gradient 0.

    >>> x = torch.randn(16, 8)
    >>> bool(kd.pkt(x, 3 * x).abs() < 1e-9)
    True
    """
    return _relation("pkt", x, y, mask, group, backend)


def _relation(kind, x, y, mask, group, backend):
    def check():
        check_features(x, y, empty=group is not None)
        if mask is not None:
            check_mask(mask, x, "mask")
        if group is not None:
            backends.resolve(kind, backend, device_type(x), (x.dtype, y.dtype))

    if group is not None:
        sides = [rows_first(side) for side in (x, y, mask)]
        group = agreed(sides, ("x", "y", "mask"), group, check, kind, {"backend": backend})
        if group.total < MINIMUM[kind]:
            raise ValueError(f"x and y have {group.total} rows on all ranks: {kind} needs at least {MINIMUM[kind]}")
        return _relation(kind, *map(rows_first, group.gather(*sides)), None, backend)
    check()
    least = MINIMUM[kind]
    if x.shape[-2] < least:
        raise ValueError(f"x and y have {x.shape[-2]} rows: {kind} needs at least {least}")
    if mask is not None:
        # a group left with too few rows is one with none: what those rows hold, even NaN, reaches no gradient
        mask = mask & (mask.sum(-1, keepdim=True) >= least)
    chosen = backends.resolve(kind, backend, device_type(x), (x.dtype, y.dtype))
    if chosen == "reference":
        return in_pytorch(_reference, (x, y, mask), kind)
    return relation(x, y, mask, kind, chosen)


def _reference(x, y, mask, kind):
    dtype = at_least_float32(x, y)
    if x.dim() == 3:
        masks = [None] * len(x) if mask is None else mask
        return torch.stack([_reference(a, b, m, kind) for a, b, m in zip(x, y, masks, strict=True)])
    x, y = x.to(dtype), y.to(dtype)
    if mask is not None:
        x, y = x[mask], y[mask]
    if len(x) < MINIMUM[kind]:
        return x.sum() + y.sum()  # of no rows
    return reference.pkt(x, y, EPS) if kind == "pkt" else getattr(reference, kind)(x, y)
