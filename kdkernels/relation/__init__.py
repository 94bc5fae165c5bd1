# SPDX-License-Identifier: Apache-2.0
"""What the samples of a batch are to each other, student against teacher: distances, angles, similarities."""

from .op import pkt, rkd_angle, rkd_distance

__all__ = ["pkt", "rkd_angle", "rkd_distance"]
