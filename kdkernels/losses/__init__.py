# SPDX-License-Identifier: Apache-2.0
"""Distillation losses as modules: loss(student, teacher, ...) -> scalar. `base.py` holds what all of them share."""

from .at import ATLoss
from .cc import CCLoss
from .cka import CKALoss
from .cmkd import CMKDLoss
from .dist import DISTLoss
from .dkd import DKDLoss
from .fsp import FSPLoss
from .gram_mse import GramMSELoss
from .ickd import ICKDLoss
from .kd import KDLoss
from .kda import KDALoss
from .mmd import MMDLoss
from .nst import NSTLoss
from .nystrom import NystromTransferLoss
from .pcka import PCKALoss
from .pkt import PKTLoss
from .ramp import Ramp
from .rcka import RCKALoss
from .rdimkd import RdimKDLoss
from .rkd import RKDAngleLoss, RKDDistanceLoss, RKDLoss
from .sp import SPLoss
from .stkd import STKDLoss

__all__ = [
    "ATLoss",
    "CCLoss",
    "CKALoss",
    "CMKDLoss",
    "DISTLoss",
    "DKDLoss",
    "FSPLoss",
    "GramMSELoss",
    "ICKDLoss",
    "KDALoss",
    "KDLoss",
    "MMDLoss",
    "NSTLoss",
    "NystromTransferLoss",
    "PCKALoss",
    "PKTLoss",
    "RCKALoss",
    "RKDAngleLoss",
    "RKDDistanceLoss",
    "RKDLoss",
    "Ramp",
    "RdimKDLoss",
    "SPLoss",
    "STKDLoss",
]
