# SPDX-License-Identifier: Apache-2.0
"""A group of ranks around the op: `ways` chooses what travels, moments, rows round a ring, or all rows."""

from .ways import agreed, answer, samples

__all__ = ["agreed", "answer", "samples"]
