# SPDX-License-Identifier: Apache-2.0
"""The landmark similarity loss of the rows of all ranks: two sums travel, and backward one number."""

from __future__ import annotations

from ... import backend as backends
from ...autograd import device_type
from ..distributed import agreed
from .checks import check_call
from .operator import similarity_over_ranks


def answer(s, t, s_centers, t_centers, group, backend: str):
    """(the value, None, None), or None, s and t of all ranks for the textbook, which sees rows: all of them travel."""
    landmarks = {"s_centers": s_centers, "t_centers": t_centers}
    check = lambda: check_call(s, t, s_centers, t_centers)  # noqa: E731
    group = agreed("landmark_similarity_loss", {"s": s, "t": t}, landmarks, group, check, {"backend": backend})
    chosen = backends.resolve("landmark_similarity_loss", backend, device_type(s), (s.dtype, t.dtype))
    t, s_centers, t_centers = t.detach(), s_centers.detach(), t_centers.detach()
    if chosen == "reference":
        return None, *group.gather(s, t)
    return similarity_over_ranks(s, t, s_centers, t_centers, chosen, group), None, None
