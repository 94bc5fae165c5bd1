# SPDX-License-Identifier: Apache-2.0
"""What one call asks of an implementation: `Problem` is what shapes the code, the tensors beside the logits `Extras`.

Statistics saved of each row, [statistics, R] in the compute dtype; every log is that of a sum of exp(logit - maximum):
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

# maxima and logs of the normalisers at tau, student and teacher; KL; then the student's log at temperature 1, and
# maxima and logs of the two clean rows
M_S, L_S, M_T, L_T, K, L_1, M_A, L_A, M_B, L_B = range(10)

STUDENT, TEACHER = 1, 2  # bits of `need`

# of `Measure`: maxima and inverses of the normalisers, log of the teacher's normaliser by the student's, and sums of
# p d term / dp and q d term / dq
MAX_S, INVERSE_S, MAX_T, INVERSE_T, RATIO, MEAN_S, MEAN_T = range(7)
KEPT = 7


class Problem(NamedTuple):
    """Numbers alone, which a graph takes, and no defaults, which it would take for numbers that change."""

    tau: float
    alpha: float  # weight of the divergence; 1 - alpha is that of the cross-entropy
    k1: float  # of the target: the teacher's part, that of its clean rows, that of the labels
    k2: float
    k3: float
    lam: float  # where `Extras.lam` is None
    mixed: bool  # False: the plain divergence, which reads no `Extras`

    @property
    def hard(self) -> bool:
        return self.alpha < 1

    @property
    def soft(self) -> bool:
        return self.alpha > 0

    @property
    def labelled(self) -> bool:
        """Labels and lambda are read."""
        return self.mixed and (self.hard or self.k1 < 1)

    def cleaned(self) -> bool:  # no property: Dynamo of torch 2.10 takes none of numbers that a graph holds open
        """The clean rows are read."""
        return self.mixed and self.alpha > 0 and self.k2 > 0

    @property
    def plain_target(self) -> bool:
        """q is the teacher's softmax itself."""
        return not self.mixed or self.k1 == 1

    @property
    def statistics(self) -> int:
        return 10 if self.cleaned() else 6 if self.mixed else 5


def rows_of(logits) -> int:
    """How many rows [R, C], or [B, T, C], has."""
    return math.prod(logits.shape[:-1])


class Extras(NamedTuple):
    labels: torch.Tensor | None = None  # int64 [R]
    permuted: torch.Tensor | None = None  # int64 [R]
    lam: torch.Tensor | None = None  # [] or [R]
    clean: torch.Tensor | None = None  # [R, C], its own dtype
    permutation: torch.Tensor | None = None  # int64 [R]


class Measure(NamedTuple):
    """u KL(q || m) + v KL(p || m), m = b q + (1 - b) p; u = v = 0: half of sum_c |p_c - q_c|."""

    tau: float  # where no tensor has one a row
    b: float
    u: float
    v: float

    @property
    def variation(self) -> bool:
        return self.u == self.v == 0

    @property
    def forward(self) -> bool:
        """Whether this is u KL(q || p)."""
        return self.b == 0 and not self.variation

    @property
    def tilt(self) -> float:
        return self.u * (1 - self.b) - self.v * self.b

    @property
    def curvature(self) -> float:
        """Of the divergence, by the offset of w: its value is that times offset^2 / 2."""
        return self.u * (1 - self.b) ** 2 + self.v * self.b**2

    def swapped(self, statistics):
        """The same divergence with student and teacher in each other's place, and the statistics of that."""
        rows = [statistics[k] for k in (MAX_T, INVERSE_T, MAX_S, INVERSE_S, RATIO, MEAN_T, MEAN_S)]
        rows[RATIO] = -rows[RATIO]
        return Measure(self.tau, 1 - self.b, self.v, self.u), torch.stack(rows)


def measure_of(name: str, tau: float, beta: float = 0.5, skew: float = 0.1) -> Measure:
    """That of the name, which is one of DIVERGENCES."""
    return Measure(tau, *DIVERGENCES[name](beta, skew))


DIVERGENCES = {
    "forward": lambda beta, skew: (0.0, 1.0, 0.0),
    "reverse": lambda beta, skew: (1.0, 0.0, 1.0),
    "jsd": lambda beta, skew: (beta, beta, 1 - beta),
    "skew": lambda beta, skew: (skew, 1.0, 0.0),
    "skew_reverse": lambda beta, skew: (1 - skew, 0.0, 1.0),
    "tvd": lambda beta, skew: (0.0, 0.0, 0.0),
}
