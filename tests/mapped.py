# SPDX-License-Identifier: Apache-2.0
"""Losses of feature maps called with rows: each row is the map, or the two layers, of one sample, and nothing else."""

import torch

from kdkernels import losses


def are_rows(*sides):
    """What is no such pair of rows goes through, for the loss to refuse."""
    tensors = all(isinstance(side, torch.Tensor) and side.is_floating_point() and side.dim() == 2 for side in sides)
    if not tensors or len({(len(side), side.device) for side in sides}) > 1:
        return False
    return all(side.shape[1] for side in sides)


def maps_of(rows):
    """[B, 2 c] as [B, c, 1, 2]."""
    return rows.reshape(len(rows), rows.shape[1] // 2, 1, 2)


class _OfMaps:
    def forward(self, student, teacher, **options):
        if not are_rows(student, teacher):
            return super().forward(student, teacher, **options)
        return super().forward(maps_of(student), maps_of(teacher), **options)


class ATLoss(_OfMaps, losses.ATLoss):
    pass


class ICKDLoss(_OfMaps, losses.ICKDLoss):
    pass


class NSTLoss(_OfMaps, losses.NSTLoss):
    pass


class FSPLoss(losses.FSPLoss):
    def forward(self, student, teacher, **options):
        if not are_rows(student, teacher):
            return super().forward(student, teacher, **options)
        layers = [[maps_of(side[:, :4]), maps_of(side[:, 4:10])] for side in (student, teacher)]
        return super().forward(*layers, **options)
