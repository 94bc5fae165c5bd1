# SPDX-License-Identifier: Apache-2.0
"""The loss functions of mdistiller with its names, signatures and values, computed by kdkernels without its tensors.

    from kdkernels.compat.mdistiller import dkd_loss    # in place of: from mdistiller.distillers.DKD import dkd_loss

Formulas, defaults and shapes of the results (`similarity_loss` and `sp_loss` are [1]) are the original's, and what it
sums over lists here is summed too: a longer list is cut to the shorter. Of two heights the higher map is pooled to
H x H, H the lower height, as there; where that leaves two sizes, an error or worse there, to the lesser height and
width.

What differs: half inputs are computed in float32 and give float32. Only `kd_loss` has a gradient to the teacher; in the
others the teacher is detached (there it is differentiated wherever it requires a gradient, which its distillers never
let it). Second derivatives raise in all but the attention losses. No function waits for the GPU or changes its input.
Where the original is NaN or wrong the functions say so.
The methods without a counterpart in kdkernels (CRD, OFD, VID, ReviewKD, KDSVD, FitNet's mean square) stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..logits.op import distillation_kl
from ..losses.maps import pooled
from .shared import shared

__all__ = [
    "at_loss",
    "dkd_loss",
    "kd_loss",
    "nst_loss",
    "pkt_loss",
    "poly_kernel",
    "rkd_loss",
    "similarity_loss",
    "single_stage_at_loss",
    "single_stage_nst_loss",
    "sp_loss",
]


def kd_loss(logits_student: torch.Tensor, logits_teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """temperature^2 KL(p_t || p_s) of logits [B, C, ...], mean over rows and positions. `kd.losses.KDLoss`.

    A class with logit -inf on both sides adds nothing (there NaN).

    >>> from kdkernels.compat.mdistiller import kd_loss
    >>> kd_loss(torch.randn(8, 10, requires_grad=True), torch.randn(8, 10), 4).backward()
    """
    return distillation_kl(logits_student.movedim(1, -1), logits_teacher.movedim(1, -1), tau=temperature)


def dkd_loss(
    logits_student: torch.Tensor,
    logits_teacher: torch.Tensor,
    target: torch.Tensor,
    alpha: float,
    beta: float,
    temperature: float,
) -> torch.Tensor:
    """alpha TCKD + beta NCKD of logits [B, C], target int [B]. `kd.losses.DKDLoss`, without its warm-up.

    Finite where a softmax underflows: the original takes log(0) as soon as the logits of a row are 104 temperatures
    apart (in float32), giving inf or NaN, and hides the label by -1000, which is too little for logits beyond that.
    """
    loss = shared(logits_student, "DKDLoss", alpha, beta, temperature)
    return loss(logits_student, logits_teacher, target.reshape(-1))


def at_loss(g_s: Sequence[torch.Tensor], g_t: Sequence[torch.Tensor], p: float) -> torch.Tensor:
    """Sum over the pairs of maps of `single_stage_at_loss`."""
    return sum(single_stage_at_loss(f_s, f_t, p) for f_s, f_t in zip(g_s, g_t))  # noqa: B905


def single_stage_at_loss(f_s: torch.Tensor, f_t: torch.Tensor, p: float) -> torch.Tensor:
    """Mean square between unit maps of mean_c |f_c|^p, f [B, C, H, W]. `kd.losses.ATLoss`.

    |f|^p is the paper's: for odd p the original keeps the sign of negative features, for other p it is NaN there.
    """
    return shared(f_s, "ATLoss", p)(*to_lower(f_s, f_t))


def nst_loss(g_s: Sequence[torch.Tensor], g_t: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum over the pairs of maps of `single_stage_nst_loss`."""
    return sum(single_stage_nst_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t))  # noqa: B905


def single_stage_nst_loss(f_s: torch.Tensor, f_t: torch.Tensor) -> torch.Tensor:
    """Squared MMD between channels, kernel (s.t)^2, of maps [B, C, H, W]; never B x C x C x HW. `kd.losses.NSTLoss`."""
    return shared(f_s, "NSTLoss")(*to_lower(f_s, f_t))


def poly_kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(b_j . a_i)^2 of channels a [B, C, L] and b [B, D, L]: [B, D, C]."""
    return (b @ a.mT).square()


def to_lower(f_s: torch.Tensor, f_t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both maps [B, C, H, W] in one size, the original's where it has one."""
    sizes = f_s.shape[2:], f_t.shape[2:]
    lower = min(sizes)
    square = sizes[0][0] != sizes[1][0] and lower[0] == lower[1]
    size = lower if square else tuple(map(min, *sizes))
    return pooled(f_s, size), pooled(f_t, size)


def sp_loss(g_s: Sequence[torch.Tensor], g_t: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum over the pairs of features of `similarity_loss`: [1]."""
    return sum(similarity_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t))  # noqa: B905


def similarity_loss(f_s: torch.Tensor, f_t: torch.Tensor) -> torch.Tensor:
    """|K - L|_F^2 / B^2 of the row-normalised Gram matrices of features [B, ...]: [1]. `kd.losses.SPLoss`."""
    return shared(f_s, "SPLoss")(f_s.flatten(1), f_t.flatten(1)).reshape(1)


def rkd_loss(
    f_s: torch.Tensor,
    f_t: torch.Tensor,
    squared: bool = False,
    eps: float = 1e-12,
    distance_weight: float = 25,
    angle_weight: float = 50,
) -> torch.Tensor:
    """Weighted sum of RKD's distances and angles between samples of features [B, ...]. `kd.losses.RKDLoss`.

    Memory B x B, where the original stores B x B x d and B^3. A batch of one gives 0 and warns once (there NaN).
    Identical samples have distance 0 (there 1e-6, which counts in the mean distance that all are divided by).

    Raises:
        ValueError: squared=True, or another eps than the default, below which there all squared distances are raised to
            it; no configuration of mdistiller has either.
    """
    if squared or eps != 1e-12:
        raise ValueError(f"squared is {squared!r}, eps is {eps!r}: only squared=False, eps=1e-12 are computed here")
    return shared(f_s, "RKDLoss", distance_weight, angle_weight)(f_s.flatten(1), f_t.flatten(1))


def pkt_loss(f_s: torch.Tensor, f_t: torch.Tensor, eps: float = 1e-7) -> torch.Tensor:
    """Mean over all pairs of t log((t + eps) / (s + eps)), similarities of features [B, d]. `kd.losses.PKTLoss`.

    A sample of zeros has cosine 0 to all and the gradient 0; there its norm has a NaN gradient. eps must be the
    default. The original writes zeros over NaN features in a copy; here NaN gives NaN.
    """
    if eps != 1e-7:
        raise ValueError(f"eps is {eps!r}: only eps=1e-7, the default, is computed here")
    return shared(f_s, "PKTLoss")(f_s, f_t)
