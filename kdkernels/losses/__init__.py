# SPDX-License-Identifier: Apache-2.0
"""Distillation losses as modules: loss(student, teacher, ...) -> scalar. `base.py` holds what all of them share."""

from .cka import CKALoss
from .cmkd import CMKDLoss
from .kd import KDLoss
from .kda import KDALoss
from .ramp import Ramp
from .rcka import RCKALoss
from .rdimkd import RdimKDLoss

__all__ = ["CKALoss", "CMKDLoss", "KDALoss", "KDLoss", "RCKALoss", "Ramp", "RdimKDLoss"]
