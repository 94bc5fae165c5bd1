# SPDX-License-Identifier: Apache-2.0
"""CKA over batches as a ratio of sums, with its standard error, from nine sums that any number of batches add to.

With a, b, c the HSICs h(K, L), h(K, K), h(L, L) of a batch: CKA = sum a / sqrt(sum b sum c), each batch counted once
(Nguyen et al. 2021, arXiv 2010.15327). To first order a batch moves it by

    e = a / sqrt(B C) - CKA (b / (2 B) + c / (2 C)),    A = sum a, B = sum b, C = sum c,

which sums to zero over batches, so the variance over N independent batches is N / (N - 1) sum e^2 (the delta method,
to first order the jackknife over batches), and sum e^2 needs the sums of squares and products only.
"""

from __future__ import annotations

import torch

A, B, C, AA, BB, CC, AB, AC, BC = range(9)
SUMS = 9


def terms(a, b, c) -> torch.Tensor:
    """[9, ...] that one batch adds, in the order of the names above; a, b, c float64 and broadcast together."""
    a, b, c = torch.broadcast_tensors(a, b, c)
    return torch.stack([a, b, c, a * a, b * b, c * c, a * b, a * c, b * c])


def value(sums) -> torch.Tensor:
    """CKA from the sums; 0 where a side was constant in every batch."""
    return sums[A] / _norm(sums)


def standard_error(sums, batches) -> torch.Tensor:
    """Of `value`; NaN for fewer than two batches."""
    r, half = value(sums), _norm(sums)
    b, c = (torch.where(s == 0, 1, s) for s in (sums[B], sums[C]))
    squares = (
        sums[AA] / half.square()
        + (r / (2 * b)).square() * sums[BB]
        + (r / (2 * c)).square() * sums[CC]
        - r / (half * b) * sums[AB]
        - r / (half * c) * sums[AC]
        + r * r / (2 * b * c) * sums[BC]
    )
    # equal batches: what is left of the squares is rounding
    variance = squares.clamp(min=0) * batches / (batches - 1) if batches > 1 else squares * torch.nan
    return variance.sqrt()


def _norm(sums):
    b, c = sums[B], sums[C]
    return torch.where((b == 0) | (c == 0), 1, b.sqrt() * c.sqrt())
