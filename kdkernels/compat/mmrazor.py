# SPDX-License-Identifier: Apache-2.0
"""The losses of kdkernels in MMRazor's configurations: one call registers them, one loss a level as MMRazor has it.

    from kdkernels.compat import mmrazor
    mmrazor.register()                          # before the configuration is built, e.g. in a module of custom_imports

Then in a ConfigurableDistiller:

    distill_losses=dict(loss_cka=dict(type='KDKernelsCKALoss', rows='gap', weight=2.0)),
    loss_forward_mappings=dict(loss_cka=dict(
        student_features=dict(from_student=True, recorder='feat'),
        teacher_features=dict(from_student=False, recorder='feat'))),

The type is 'KDKernels' + the name in `kd.losses` (see TYPES), its arguments are the constructor's, `weight` is what
MMRazor calls loss_weight, and the mapping names the arguments of the loss's forward. Losses whose call has labels take
MMRazor's `data_samples` in their place. Not registered: STKDLoss, which needs mixed images, KDALoss, which needs a call
after each epoch, and Ramp, which wraps another loss: `loss.weight.fill_(w)` in a hook of the runner is a schedule.
"""

from __future__ import annotations

import torch

from .. import losses
from .names import NAMES

__all__ = ["TYPES", "register"]

LABELLED = ("DKDLoss", "NystromTransferLoss")


def labels_of(data_samples) -> torch.Tensor:
    """Class indices [B] from samples that hold `gt_label`, a tensor or an object with `label`."""
    found = [getattr(sample.gt_label, "label", sample.gt_label) for sample in data_samples]
    return torch.cat([label.reshape(-1) for label in found])


class DKDLoss(losses.DKDLoss):
    """`kd.losses.DKDLoss` called with `(student_logits, teacher_logits, data_samples)`; samples hold `gt_label`."""

    def forward(self, student_logits, teacher_logits, data_samples):
        labels = labels_of(data_samples).to(student_logits.device)
        return super().forward(student_logits, teacher_logits, labels)


class NystromTransferLoss(losses.NystromTransferLoss):
    """`kd.losses.NystromTransferLoss` called with `(student_features, teacher_features, data_samples=None)`."""

    def forward(self, student_features, teacher_features, data_samples=None):
        labels = None if data_samples is None else labels_of(data_samples).to(student_features.device)
        return super().forward(student_features, teacher_features, labels)


TYPES = {
    registered: globals()[name] if name in LABELLED else getattr(losses, name) for registered, name in NAMES.items()
}


def register() -> None:
    """Makes every type of TYPES known to MMRazor's MODELS (imported here); doing it twice is harmless."""
    from mmrazor.registry import MODELS

    for name, loss in TYPES.items():
        MODELS.register_module(name=name, force=True, module=loss)
