# SPDX-License-Identifier: Apache-2.0
"""The family in Triton: `schedule` picks among the launches of `small` (n <= 1024) and of `tiles` (above)."""

from .schedule import backward, forward, kept

__all__ = ["backward", "forward", "kept"]
