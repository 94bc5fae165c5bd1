# SPDX-License-Identifier: Apache-2.0
"""Rows of any finite size: float32 squares leave its range beyond 1e19 and below 1e-19, and the work is then float64.

Only the CPU looks: a GPU would have to wait for the answer.
"""

import torch


def outside(sizes, least: float, most: float) -> bool:
    """Whether one of a few float32 numbers [G] on the CPU is not between the two. NaN has no size: its group changes
    nothing for the others."""
    if not sizes.is_cpu or sizes.dtype != torch.float32:
        return False
    return any(size <= least or size >= most for size in sizes.tolist())
