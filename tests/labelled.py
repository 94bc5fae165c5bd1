# SPDX-License-Identifier: Apache-2.0
"""Losses that take more than two sides of logits, called with two: labels and the mixed batch follow from the rows."""

import torch

import kdkernels as kd
from kdkernels import losses


def labels_of(logits):
    """A label for each row that depends on this row alone; 0 where there is nothing to choose from."""
    if not isinstance(logits, torch.Tensor) or logits.is_complex() or 0 in logits.shape[1:]:
        return torch.zeros(len(logits), dtype=torch.long)
    return logits.detach().argmax(-1)


class DKDLoss(losses.DKDLoss):
    def forward(self, student, teacher, **options):
        return super().forward(student, teacher, labels_of(teacher), **options)


class STKDLoss(losses.STKDLoss):
    def forward(self, student, teacher, **options):
        labels, other = labels_of(teacher), labels_of(-teacher)
        lam = torch.full((), 0.3, device=labels.device)
        batch = kd.MixupBatch(student, labels, other, lam, torch.arange(len(labels), device=labels.device))
        clean = -teacher if self.mix[1] else None
        return super().forward(student, teacher, batch, clean, **options)
