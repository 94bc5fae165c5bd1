# SPDX-License-Identifier: Apache-2.0
"""Distillation losses as modules: loss(student, teacher, ...) -> scalar. `base.py` holds what all of them share."""

from .cka import CKALoss
from .cmkd import CMKDLoss
from .dist import DISTLoss
from .dkd import DKDLoss
from .kd import KDLoss
from .kda import KDALoss
from .nystrom import NystromTransferLoss
from .pcka import PCKALoss
from .ramp import Ramp
from .rcka import RCKALoss
from .rdimkd import RdimKDLoss
from .stkd import STKDLoss

__all__ = [
    "CKALoss",
    "CMKDLoss",
    "DISTLoss",
    "DKDLoss",
    "KDALoss",
    "KDLoss",
    "NystromTransferLoss",
    "PCKALoss",
    "RCKALoss",
    "Ramp",
    "RdimKDLoss",
    "STKDLoss",
]
