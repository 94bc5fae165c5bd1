# SPDX-License-Identifier: Apache-2.0
"""The family in PyTorch: `forms` chooses between feature space and Gram space in tiles (`panels`).

A side is `prepared` first: its rows, and the kernel maps of their products; `combine` makes the value of row sums.
"""

from .forms import STEPS, backward, forward, kept

__all__ = ["STEPS", "backward", "forward", "kept"]
