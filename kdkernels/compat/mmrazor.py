# SPDX-License-Identifier: Apache-2.0
"""The losses of kdkernels in MMRazor's configurations, under MMRazor's names and under our own.

    from kdkernels.compat import mmrazor        # before the configuration is built, e.g. in a module of custom_imports
    mmrazor.replace()                           # 'KLDivergence', 'DKDLoss', ... (all of `mmrazor_losses`) run here
    mmrazor.register()                          # and all of kd.losses are known as 'KDKernels' + their name

After `replace` a configuration stays as it is: arguments, defaults, values and the gradient to the student are those of
MMRazor 1.0.0. What differs: half inputs are computed in float32 and give float32; what is not computed here raises,
second derivatives of all but ATLoss and DISTLoss too, and `mmrazor.replace("DKDLoss", "ATLoss")` replaces those alone.

After `register`, in a ConfigurableDistiller:

    distill_losses=dict(loss_cka=dict(type='KDKernelsCKALoss', rows='gap', weight=2.0)),
    loss_forward_mappings=dict(loss_cka=dict(
        student_features=dict(from_student=True, recorder='feat'),
        teacher_features=dict(from_student=False, recorder='feat'))),

The type is 'KDKernels' + the name in `kd.losses` (see TYPES). Formula, defaults and arguments are those of `kd.losses`:
`weight` is loss_weight, and the mapping names the arguments of the loss's forward. So DKDLoss has beta = 8 and tau = 4
there and 1 and 1 in MMRazor; KDLoss (KLDivergence) tau = 4, and on logits of maps the mean over positions where MMRazor
divides their sum by B; RKDLoss (DistanceWiseRKD, AngleWiseRKD) does not divide rows by their norms. ATLoss and DISTLoss
are the same. Losses whose call has labels take MMRazor's `data_samples` in their place. Not registered: STKDLoss, which
needs mixed images, KDALoss, which needs a call after each epoch, and Ramp, which wraps another loss:
`loss.weight.fill_(w)` in a hook of the runner is a schedule.
"""

from __future__ import annotations

import torch

from .. import losses
from . import mmrazor_losses
from .names import NAMES, chosen

__all__ = ["TYPES", "register", "replace"]

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


def replace(*names: str) -> None:
    """MMRazor's losses of these names become those of `mmrazor_losses`: by default all that are there."""
    import mmrazor.models.losses  # noqa: F401  registers its own first
    from mmrazor.registry import MODELS

    for name, loss in chosen(names, mmrazor_losses).items():
        MODELS.register_module(name=name, force=True, module=loss)
