# SPDX-License-Identifier: Apache-2.0
"""The family in Triton: `schedule` picks among the launches of `small` (n <= 1024) and of `tiles` (above)."""

from .direct import direct
from .rule import rule
from .schedule import backward, forward, kept

__all__ = ["backward", "direct", "forward", "kept", "rule"]
