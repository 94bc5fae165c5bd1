# SPDX-License-Identifier: Apache-2.0
"""What every implementation of the family knows: how few samples have a relation, and whose gradient is asked for."""

from __future__ import annotations

EPS = 1e-7  # of PKT, as in its reference implementation

# the fewest samples that have the relation at all: a distance, an angle, another sample
MINIMUM = {"rkd_distance": 2, "rkd_angle": 3, "pkt": 2}


def sides(need: int) -> list[int]:
    """Which of (x, y) get a gradient: the bits of `need`."""
    return [k for k in (0, 1) if need >> k & 1]
