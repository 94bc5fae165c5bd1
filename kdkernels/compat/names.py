# SPDX-License-Identifier: Apache-2.0
"""Which losses can be registered with another library's configurations, and under which names."""

from .. import losses

# they need mixed images, a call after each epoch, another loss
OTHER_CALLS = ("STKDLoss", "KDALoss", "Ramp")

# registered name -> name in kd.losses. The others have a KDLoss and an ATLoss of their own, and read a dot as the name
# of another registry
NAMES = {f"KDKernels{name}": name for name in losses.__all__ if name not in OTHER_CALLS}
