# SPDX-License-Identifier: Apache-2.0
"""PCKALoss called with rows: each row is the map of one sample, two patches tall, made of this row's numbers alone."""

import torch

from kdkernels import losses

SIZE = (17, 6)


class PCKALoss(losses.PCKALoss):
    def forward(self, student, teacher, **options):
        return super().forward(*(maps_of(side) for side in (student, teacher)), **options)


def maps_of(rows):
    """[B, 10] as [B, 2, 17, 6]; what is no such rows goes through."""
    if not isinstance(rows, torch.Tensor) or not rows.is_floating_point() or rows.dim() != 2 or 0 in rows.shape[1:]:
        return rows
    count = 2 * SIZE[0] * SIZE[1]
    places = torch.arange(count, device=rows.device)
    # powers of two: nothing rounds, whatever the dtype
    signs = torch.where(places * 7 % 11 > 4, 1, -2).to(rows.dtype)
    return (rows[:, places * 3 % rows.shape[1]] * signs).reshape(len(rows), 2, *SIZE)
