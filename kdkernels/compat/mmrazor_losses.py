# SPDX-License-Identifier: Apache-2.0
"""Losses of MMRazor 1.0.0 with its names, arguments, defaults and values, computed by kdkernels: see `mmrazor.replace`.

`KLDivergence` (with teacher_detach=False) and `ChannelWiseDivergence` have a gradient to the teacher; in the others it
is detached, also where it is not in MMRazor.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import normalize

from ..autograd import at_least_float32
from .shared import check_reduction, kl_div, shared

__all__ = [
    "ATLoss",
    "AngleWiseRKD",
    "ChannelWiseDivergence",
    "DISTLoss",
    "DKDLoss",
    "DistanceWiseRKD",
    "KLDivergence",
]


class _Loss(nn.Module):
    """loss_weight times `value`."""

    def __init__(self, loss_weight: float):
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, preds_S: torch.Tensor, preds_T: torch.Tensor) -> torch.Tensor:
        return self.loss_weight * self.value(preds_S, preds_T)


class KLDivergence(_Loss):
    """tau^2 KL(p_t || p_s) of logits [B, C, ...], summed over positions. `kd.losses.KDLoss`.

    reduction: "batchmean" (the sum over B), "sum" or "mean" of the entries.
    """

    def __init__(
        self, tau: float = 1.0, reduction: str = "batchmean", loss_weight: float = 1.0, teacher_detach: bool = True
    ):
        super().__init__(loss_weight)
        self.tau, self.reduction, self.teacher_detach = tau, check_reduction(reduction), teacher_detach

    def value(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return kl_div(student, teacher.detach() if self.teacher_detach else teacher, self.tau, self.reduction)


class ChannelWiseDivergence(_Loss):
    """tau^2 KL between each channel's softmax over the positions of maps [B, C, H, W]. `kd.losses.KDLoss`."""

    def __init__(self, tau: float = 1.0, loss_weight: float = 1.0):
        super().__init__(loss_weight)
        self.tau = tau

    def value(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return kl_div(student.flatten(2).flatten(0, 1), teacher.flatten(2).flatten(0, 1), self.tau)


class DKDLoss(nn.Module):
    """alpha TCKD + beta NCKD of logits [B, C], labels [B]. `kd.losses.DKDLoss`, finite where a softmax underflows.

    Reductions "mean" and "none" are refused: MMRazor gives the sum for them.
    """

    def __init__(
        self,
        tau: float = 1.0,
        alpha: float = 1.0,
        beta: float = 1.0,
        reduction: str = "batchmean",
        loss_weight: float = 1.0,
    ):
        super().__init__()
        self.tau, self.alpha, self.beta, self.loss_weight = tau, alpha, beta, loss_weight
        self.reduction = {"batchmean": "mean", "sum": "sum"}[check_reduction(reduction, ("batchmean", "sum"))]

    def forward(self, preds_S: torch.Tensor, preds_T: torch.Tensor, gt_labels: torch.Tensor) -> torch.Tensor:
        loss = shared(preds_S, "DKDLoss", self.alpha, self.beta, self.tau, reduction=self.reduction)
        return self.loss_weight * loss(preds_S, preds_T, gt_labels.reshape(-1))


class DISTLoss(_Loss):
    """`kd.losses.DISTLoss` of logits [B, C]: inter_loss_weight its beta, of rows, intra_loss_weight its gamma.

    A batch of one has no column term; there it is the constant intra_loss_weight tau^2.
    """

    def __init__(
        self,
        inter_loss_weight: float = 1.0,
        intra_loss_weight: float = 1.0,
        tau: float = 1.0,
        loss_weight: float = 1.0,
        teacher_detach: bool = True,
    ):
        super().__init__(loss_weight)
        if not teacher_detach:
            raise ValueError("teacher_detach is False: only the gradient to the student is computed here")
        self.constants = inter_loss_weight, intra_loss_weight, tau

    def forward(self, logits_S: torch.Tensor, logits_T: torch.Tensor) -> torch.Tensor:
        return self.loss_weight * shared(logits_S, "DISTLoss", *self.constants)(logits_S, logits_T)


class ATLoss(_Loss):
    """`kd.losses.ATLoss` of maps [B, C, H, W]."""

    def __init__(self, loss_weight: float = 1.0):
        super().__init__(loss_weight)

    def forward(self, s_feature: torch.Tensor, t_feature: torch.Tensor) -> torch.Tensor:
        return self.loss_weight * shared(s_feature, "ATLoss")(s_feature, t_feature)


class DistanceWiseRKD(_Loss):
    """`kd.losses.RKDDistanceLoss` of features [B, ...], of norm 1 with with_l2_norm.

    A batch of one gives 0 and warns once (there NaN). Identical samples have distance 0 (there 1e-6).
    """

    name = "RKDDistanceLoss"

    def __init__(self, loss_weight: float = 25.0, with_l2_norm: bool = True):
        super().__init__(loss_weight)
        self.with_l2_norm = with_l2_norm

    def value(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        rows = [side.flatten(1).to(at_least_float32(side)) for side in (student, teacher)]
        return shared(student, self.name)(*(map(normalize, rows) if self.with_l2_norm else rows))


class AngleWiseRKD(DistanceWiseRKD):
    """`kd.losses.RKDAngleLoss` of features [B, ...], of norm 1 with with_l2_norm."""

    name = "RKDAngleLoss"

    def __init__(self, loss_weight: float = 50.0, with_l2_norm: bool = True):
        super().__init__(loss_weight, with_l2_norm)
