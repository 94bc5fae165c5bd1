# SPDX-License-Identifier: Apache-2.0
"""Drop-in modules with the names, signatures and results of the packages that people come from.

from kdkernels.compat import torchsort              # in place of: import torchsort
from kdkernels.compat.repdistiller import NSTLoss   # in place of: from distiller_zoo import NSTLoss
from kdkernels.compat.mdistiller import dkd_loss    # in place of: from mdistiller.distillers.DKD import dkd_loss
from kdkernels.compat.trl import generalized_jsd_loss          # in place of: GKDTrainer.generalized_jsd_loss
from kdkernels.compat.liger import LigerFusedLinearJSDLoss      # in place of: from liger_kernel.chunked_loss import

`torchdistill.replace()` and `mmrazor.replace()` take the places of these two's own losses in their configurations, and
`register()` there makes every loss of `kd.losses` known to them.
"""
