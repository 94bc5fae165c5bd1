# SPDX-License-Identifier: Apache-2.0
"""What travels: a question as it was written, the rows it is asked of, and the call that is made of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .. import backend as backends
from .. import checks
from ..autograd import device_type
from ..gram.bandwidth import bandwidth, sigma_of
from ..gram.kernels import Kernel, KernelSpec, spec_of
from .checks import check_bandwidths, check_mask, check_same_rows, check_side, check_whitening


class Question(NamedTuple):
    """The options of a call. Built without a check: of several processes, one would raise before the others know."""

    stat: str  # hsic, cka: of the Nystrom kernels; transfer: |K~_S - K~_T|^2; features: no statistic, Phi itself
    kernel: object  # as written; of a `checked` question those of both sides
    whiten: str
    jitter: float
    unbiased: bool = False
    normalize: bool = False
    backend: str = "auto"

    # methods, no properties: see gram/call.py
    def op(self) -> str:
        return f"nystrom_{self.stat}"

    def names(self) -> tuple[str, str, str, str]:
        """What the caller knows `Rows` by."""
        x, y = "st" if self.stat == "transfer" else "xy"
        return x, y, f"{x}_landmarks", f"{y}_landmarks"

    def least(self) -> int:
        """The fewest rows for which the statistic is defined."""
        return 1 if self.stat == "transfer" else 4 if self.unbiased else 2

    def checked(self) -> Question:
        jitter, kernels = check_whitening(self.whiten, self.jitter), spec_of(self.kernel)
        checks.flags(unbiased=self.unbiased, normalize=self.normalize)
        check_bandwidths(kernels)
        return Question(self.stat, kernels, self.whiten, jitter, *self[4:])  # `_replace` takes a microsecond

    def check_number(self, n: int, where: str = ""):
        least = self.least()
        if n < least:
            x, y, *_ = self.names()
            raise ValueError(
                f"{x} and {y} have {n} rows{where}: {self.op()} with unbiased={self.unbiased} needs at least {least}"
            )

    def resolved(self, *tensors) -> Question:
        """With the backend that runs it."""
        dtypes = tuple([t.dtype for t in tensors])
        return Question(*self[:-1], backends.resolve(self.op(), self.backend, device_type(tensors[0]), dtypes))


class Side(NamedTuple):
    rows: torch.Tensor  # [n, d]
    landmarks: torch.Tensor  # [m, d]
    sigma: torch.Tensor | None  # [1], of a bandwidth that is no number
    kernel: Kernel | KernelSpec  # as written, or what an operator carries of it


class Call(NamedTuple):
    """A question and all that its answer is made of."""

    question: Question
    x: Side
    y: Side
    mask: torch.Tensor | None  # [n] bool


class Rows(NamedTuple):
    """What a statistic is asked of."""

    x: torch.Tensor
    y: torch.Tensor
    x_landmarks: torch.Tensor
    y_landmarks: torch.Tensor
    mask: torch.Tensor | None

    def check(self, question: Question, empty: bool = False):
        """empty: whether no rows at all are fine, those of one rank."""
        x, y, x_landmarks, y_landmarks = question.names()
        check_side(self.x, self.x_landmarks, x, x_landmarks, empty)
        check_side(self.y, self.y_landmarks, y, y_landmarks, empty)
        check_same_rows(self.x, self.y, x, y)
        check_mask(self.mask, self.x, x)

    def call(self, question: Question, rule: Callable = bandwidth, total: Callable = lambda t: t) -> Call:
        """rule, total: the bandwidth and the sum over rows, of those of all ranks where there are several."""
        x, y, zx, zy, mask = self
        if mask is not None:
            # too few kept rows are none: what they hold, even NaN, reaches no gradient
            mask = mask & (total(mask.sum()) >= question.least())
        kx, ky = question.kernel
        wide = torch.float64 in (x.dtype, y.dtype, zx.dtype, zy.dtype)
        sigmas = (sigma_of(k, t.double() if wide else t, mask, rule) for k, t in ((kx, x), (ky, y)))
        sides = (Side(t, z, sigma, k) for t, z, sigma, k in zip((x, y), (zx, zy), sigmas, (kx, ky), strict=True))
        return Call(question, *sides, mask)
