# SPDX-License-Identifier: Apache-2.0
"""What every case of the tables may state: the figure it has to reach. The case itself is a record of its family."""

from __future__ import annotations

from typing import NamedTuple


class Target(NamedTuple):
    """`figure` of contender `ours` against `against`, at least (speed, roof) or at most (all others) `bound`."""

    # speed: ms of against / ms of ours; memory: peak bytes of ours / of against; overhead, microseconds: of host, of
    # device; launches; graph: ms of the replayed step / of an empty graph; ms; bytes: at the peak; roof: percent of it
    figure: str
    against: str
    bound: float
    phase: str = "step"
    backend: str | None = None  # the one that has to reach it; None: each

    def holds(self, value: float) -> bool:
        return value >= self.bound if self.figure in ("speed", "roof") else value <= self.bound
