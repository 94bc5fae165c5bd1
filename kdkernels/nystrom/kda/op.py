# SPDX-License-Identifier: Apache-2.0
"""KDA's landmark similarity loss: two thin products, smooth L1 and a norm, fused; what is kept is no more than [B, d].

Read on in `reference.py` (what is computed), `torch_impl.py` (how, in PyTorch) and `triton_impl.py` (how, on a GPU).
"""

from __future__ import annotations

from functools import partial

import torch

from ... import backend as backends
from ... import checks
from ..._types import Backend
from ...autograd import at_least_float32, device_type, in_pytorch
from ...distributed import GroupLike
from ..distributed import agreed
from . import reference
from .operator import similarity, similarity_over_ranks

__all__ = ["landmark_similarity_loss"]


def landmark_similarity_loss(
    s: torch.Tensor,
    t: torch.Tensor,
    s_centers: torch.Tensor,
    t_centers: torch.Tensor,
    *,
    group: GroupLike = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """sum smooth_l1(S - T) / |T|_F with S = s s_centers', T = t t_centers' [B, C]: similarity to C landmarks.

    Source: KDA, Improved KD via Full Kernel Matrix Transfer (arXiv 2009.14416), as its public code computes it: a sum,
    not a mean; smooth L1 with beta = 1; features not normalised. Its weight there is 0.04.

    Args:
        s: student features [B, d]; t: teacher features [B, e] of the same samples; float16, bfloat16, float32, float64,
            each its own dtype.
        s_centers: landmarks of the student's space [C, d], e.g. class means; t_centers: those of the teacher's, [C, e],
            in the same order. See `kd.ClassCenters`.
        group: None, or "world" or a process group: sum and norm over the rows of all its ranks, which hold the same
            landmarks and any number of rows; the same value on each, whose gradient averaged over the ranks is that of
            one process (`kdkernels/distributed.py`). A rank sends 16 bytes, and backward one number.
        backend: "auto", "triton", "cpp", "torch" or "reference" (the last one also gives higher derivatives).

    Returns:
        A scalar; float32 for half inputs, else the promoted dtype of s and t, in which all is computed. Gradient to s
        only: t and both sets of landmarks are constants, as in the paper. Where T is all zero the loss has no scale: it
        is 0 with zero gradient (the public code divides by zero). NaN in any row gives NaN.

    Raises:
        ValueError: shapes that do not fit. TypeError: a dtype that is not float.

    >>> s, t = torch.randn(8, 16, requires_grad=True), torch.randn(8, 32)
    >>> s_centers, t_centers = torch.randn(10, 16), torch.randn(10, 32)
    >>> plain = torch.nn.functional.smooth_l1_loss(s @ s_centers.T, t @ t_centers.T, reduction="sum")
    >>> torch.allclose(kd.landmark_similarity_loss(s, t, s_centers, t_centers), plain / (t @ t_centers.T).norm())
    True
    """
    if group is None:
        _check(s, t, s_centers, t_centers)
    else:
        landmarks, check = {"s_centers": s_centers, "t_centers": t_centers}, partial(_check, s, t, s_centers, t_centers)
        group = agreed("landmark_similarity_loss", {"s": s, "t": t}, landmarks, group, check, {"backend": backend})
    if t.requires_grad or s_centers.requires_grad or t_centers.requires_grad:
        t, s_centers, t_centers = t.detach(), s_centers.detach(), t_centers.detach()
    chosen = backends.resolve("landmark_similarity_loss", backend, device_type(s), (s.dtype, t.dtype))
    if chosen == "reference":
        s, t = (s, t) if group is None else group.gather(s, t)  # the textbook sees rows: all of them travel
        return in_pytorch(_reference, (s, t, s_centers, t_centers))
    if group is not None:
        return similarity_over_ranks(s, t, s_centers, t_centers, chosen, group)
    return similarity(s, t, s_centers, t_centers, chosen)


def _check(s, t, s_centers, t_centers):
    named = ((s, "s"), (t, "t"), (s_centers, "s_centers"), (t_centers, "t_centers"))
    shapes = []
    for tensor, name in named:
        checks.floating(tensor, name)
        shape = tensor.shape
        if len(shape) != 2 or shape[1] == 0:
            raise ValueError(f"{name} has shape {tuple(shape)}: give rows of features, [rows, width]")
        if tensor is not s:
            checks.same_device(s, tensor, "s", name)
        shapes.append(shape)
    (B, d), (b, e), (C, width), (c, t_width) = shapes
    if B != b:
        raise ValueError(f"t has {b} rows, s has {B}: both sides must describe the same samples, in one order")
    if C != c:
        raise ValueError(f"t_centers has {c} rows, s_centers has {C}: landmarks come in pairs")
    if C == 0:
        raise ValueError("s_centers has no rows: it needs at least one landmark")
    if (d, e) != (width, t_width):
        name, own, other = ("s", d, width) if d != width else ("t", e, t_width)
        raise ValueError(
            f"{name}_centers has {other} columns, {name} has {own}: landmarks live in the space of their side's "
            "features"
        )
    if checks.debugging():
        for tensor, name in named:
            checks.finite(tensor, name)


def _reference(*tensors):
    dtype = at_least_float32(*tensors[:2])
    return reference.landmark_similarity(*(t.to(dtype) for t in tensors))
