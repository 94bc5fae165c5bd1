# SPDX-License-Identifier: Apache-2.0
"""Which losses can be known to another library's configurations, and under which names."""

from .. import losses

# they need mixed images, a call after each epoch, another loss
OTHER_CALLS = ("STKDLoss", "KDALoss", "Ramp")

# registered name -> name in kd.losses. The others have a KDLoss and an ATLoss of their own, and read a dot as the name
# of another registry
NAMES = {f"KDKernels{name}": name for name in losses.__all__ if name not in OTHER_CALLS}


def chosen(names, replacements) -> dict[str, type]:
    """The losses of these names among those of a module of replacements; all of them where no name is given."""
    for name in names:
        if name not in replacements.__all__:
            raise ValueError(f"{name!r} is not replaced: give some of {', '.join(replacements.__all__)}")
    return {name: getattr(replacements, name) for name in names or replacements.__all__}
