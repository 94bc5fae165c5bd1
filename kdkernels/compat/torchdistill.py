# SPDX-License-Identifier: Apache-2.0
"""The losses of kdkernels in torchdistill's configurations, under torchdistill's names and under our own.

    from kdkernels.compat import torchdistill   # before the configuration is read, e.g. in a module of `dependencies`
    torchdistill.replace()                      # 'KDLoss', 'RKDLoss', ... (all of `torchdistill_losses`) run here
    torchdistill.register()                     # and all of kd.losses are known as 'KDKernels' + their name

After `replace` a configuration stays as it is: arguments, defaults, values and the gradient to the student are those of
torchdistill 1.1.5. What differs: half inputs are computed in float32 and give float32; only KDLoss has a gradient to
the teacher; what is not computed here raises, second derivatives of all but ATLoss too, and
`torchdistill.replace("RKDLoss")` replaces that one alone.

After `register`, wherever torchdistill takes a mid-level loss (a term of its WeightedSumLoss, for example):

    criterion:
      key: 'KDKernelsCKALoss'                   # 'KDKernels' + the name in kd.losses; see NAMES
      kwargs:
        arguments:                              # the arguments of the loss's forward, by name
          student_features: {path: 'layer3', io: 'output'}
          teacher_features: {path: 'layer3', io: 'output'}
        rows: 'gap'                             # everything else goes to the constructor
        ramp: [0, 2000]                         # and this wraps it in kd.losses.Ramp(loss, start, end)

Formula, arguments and defaults are then those of `kd.losses`, which for some names is not what torchdistill computes:

    KDLoss       there alpha CE + (1 - alpha) tau^2 KL; here tau^2 KL
    SPLoss       there SPKDLoss: rows over their L1 norms, not L2: up to B times smaller
    ICKDLoss     there ChSimLoss: the sum over the batch over B^2, here over B
    DISTLoss     there each norm is at least 1e-8, here 1e-8 is added to their product: 0.2 % apart at 1,000 classes
                 under tau = 4, more with more classes
    FSPLoss      there maps are pooled by maxima, and norms of the columns of differences summed, here means of squares
    CCLoss       there CCKDLoss: |K_s - K_t|_F / B^2 of kernel matrices, here variant "taylor", which is not the default
    ATLoss, PKTLoss, RKDLoss (factors 25 and 50 here) are the same

A list of {path, io} gives a list of levels. Losses whose call has labels (DKDLoss, NystromTransferLoss) get the targets
of the batch. Not registered: STKDLoss, which needs mixed images, and KDALoss, which needs a call after each epoch.
"""

from __future__ import annotations

import functools
import inspect

import torch
from torch import nn

from .. import losses
from . import torchdistill_losses
from .names import NAMES, chosen
from .torchdistill_losses import recorded

__all__ = ["NAMES", "IODictLoss", "register", "replace"]


def replace(*names: str) -> None:
    """torchdistill's losses of these names become those of `torchdistill_losses`: by default all that are there."""
    from torchdistill.losses import mid_level  # noqa: F401  registers its own first
    from torchdistill.losses.registry import register_mid_level_loss

    for name, loss in chosen(names, torchdistill_losses).items():
        register_mid_level_loss(key=name)(loss)


def register() -> None:
    """Makes every key of NAMES a mid-level loss of torchdistill, which is imported here; doing it twice is harmless."""
    from torchdistill.losses.registry import register_mid_level_loss

    for key, name in NAMES.items():
        register_mid_level_loss(key=key)(functools.partial(IODictLoss, name))


class IODictLoss(nn.Module):
    """A loss of `kd.losses` called as torchdistill calls its own: (student_io_dict, teacher_io_dict, targets).

    Args:
        loss: a name in `kd.losses`.
        arguments: {argument of the loss's forward: {"path": module path, "io": "input" or "output"}, or a list of
            those}; student_... is taken from the student's dict, teacher_... from the teacher's.
        ramp: None, or (start, end) of `kd.losses.Ramp`, in calls.
        options: of the loss's constructor.

    The value is that of the loss, a scalar tensor. torchdistill keeps its terms in a plain dict, so that nothing moves
    them to a device: the loss follows the student's tensors by itself.

    >>> from kdkernels.compat.torchdistill import IODictLoss
    >>> head = {"path": "fc", "io": "output"}
    >>> loss = IODictLoss("KDLoss", {"student_logits": head, "teacher_logits": head}, tau=2.0)
    >>> student, teacher = torch.randn(8, 10), torch.randn(8, 10)
    >>> value = loss({"fc": {"output": student}}, {"fc": {"output": teacher}}, None)
    >>> bool(value == kd.losses.KDLoss(tau=2.0)(student, teacher))
    True
    """

    def __init__(self, loss: str, arguments: dict, ramp=None, **options):
        super().__init__()
        if loss not in NAMES.values():
            raise ValueError(f"loss is {loss!r}: give one of {', '.join(NAMES.values())}")
        self.loss = getattr(losses, loss)(**options)
        known = inspect.signature(self.loss.forward).parameters
        sides = [name for name in known if name.startswith(("student_", "teacher_"))]
        needed = {name for name in sides if known[name].default is inspect.Parameter.empty}
        if not needed <= set(arguments) <= set(sides):
            raise ValueError(f"arguments names {', '.join(map(str, arguments)) or 'nothing'}: {loss} takes {sides}")
        self.arguments = {name: arguments[name] for name in sides if name in arguments}
        labels = known.get("labels")
        self.takes_labels = labels is not None and labels.kind is labels.POSITIONAL_OR_KEYWORD
        if ramp is not None:
            self.loss = losses.Ramp(self.loss, *ramp)

    def forward(self, student_io_dict, teacher_io_dict, targets=None, *args, **kwargs):
        given = {
            name: recorded(student_io_dict if name.startswith("student_") else teacher_io_dict, where)
            for name, where in self.arguments.items()
        }
        if self.takes_labels and targets is not None:
            given["labels"] = targets
        first = next(iter(given.values()))
        device = (first if isinstance(first, torch.Tensor) else first[0]).device
        if any(buffer.device != device for buffer in self.loss.buffers()):
            self.loss.to(device)
        return self.loss(**given)
