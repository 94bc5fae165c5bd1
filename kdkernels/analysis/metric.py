# SPDX-License-Identifier: Apache-2.0
"""CKA of two streams of features as a metric: O(1) state, three HSIC sums and what their standard error needs.

With torchmetrics installed, `CKAMetric(...)` makes an object that is also a `torchmetrics.Metric`, which its
`MetricCollection` asks for; without it the same class works alone. torchmetrics is imported when the first metric is
made, not before.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from typing import Any, Literal, overload

import torch
import torch.distributed as dist

from .. import checks, distributed
from .._types import Mask
from ..accumulator import Accumulator, summed, without_rounding
from ..autograd import at_least_float32, device_type, without_autocast
from ..distributed import GroupLike
from ..gram.call import check_bandwidths, minimum_rows
from ..gram.kernels import KernelLike, spec_of
from . import masks, matrix, stream, sums

COUNT, WIDE = stream.SUMS, stream.SUMS + 1  # batches that counted; of them, those in float64


class CKAMetric(Accumulator):
    """CKA of features that come in batches: `update(x, y)`, `compute()`, `reset()`, as torchmetrics has them.

    compute() = sum_batches h(K, L) / sqrt(sum_batches h(K, K) sum_batches h(L, L)), h the HSIC of one batch: a ratio of
    sums, never a mean of ratios. Source: Nguyen et al. 2021 (arXiv 2010.15327); HSIC_1: Song et al. 2012.

    What is unbiased: with `unbiased=True` each batch's HSICs (HSIC_1), and so the three sums, whatever the batch size.
    What is not: their ratio, whose bias falls as 1 / batches and is below the standard error. `unbiased=False`
    (HSIC_0) is biased by the batch size and does not approach the value of all data.

    Args:
        kernel: as in `kd.cka`; a bandwidth rule such as "median" is applied to each batch: for one fixed kernel over
            the stream give a number.
        unbiased: HSIC_1 (batches of at least 4 rows), else HSIC_0 (at least 2).
        process_group: over which processes compute() adds up; None: the default group.

    `update(x, y, mask=None)`: features [n, p] and [n, q] of the same n samples; any float dtypes. No gradient. mask:
        bool [n], which rows count (padded tokens do not). Every batch counts once, so a small last batch adds noise
        (`drop_last=True`). A batch below the minimum is left out, with one warning a metric: one does not lose an epoch
        to its last three rows.
    `compute(return_error=False)`: a scalar, float32, or float64 once an input was float64; with return_error=True a
        pair (value, standard error). Where torch.distributed is initialised it first adds up the state of all ranks:
        each has to call it, also one that saw nothing. 0 where a side was constant in every batch. ValueError where no
        batch counted, on every rank.
    `standard_error()`: of the value, by the delta method over batches (O(1) state), which takes batches for
        independent draws: shuffle the data. NaN for fewer than two batches.
    `metric(x, y, mask=None)`: adds a batch and returns its own CKA, NaN for one that was left out.
    `merge_state(other)`: adds what another metric (or its `state_dict()`) has seen. `.to(device)`, `state_dict`: the
        state is one float64 tensor `sums` [11], which half() and float() leave as it is.

    >>> metric = kd.CKAMetric()
    >>> for _ in range(8):
    ...     x = torch.randn(64, 16)
    ...     metric.update(x, 2 * x + 1)
    >>> round(metric.compute().item(), 4)
    1.0
    """

    unbiased: bool
    minimum: int
    sums: torch.Tensor

    def __new__(cls, *arguments: Any, **options: Any) -> CKAMetric:
        collected = _collected() if cls is CKAMetric else None
        return super().__new__(collected or cls)

    def __init__(self, kernel: KernelLike = "linear", unbiased: bool = True, *, process_group: GroupLike = None):
        super().__init__()
        self._set(kernel, unbiased)
        self.process_group = process_group
        self.register_buffer("sums", self._zeros())

    def _set(self, kernel: KernelLike, unbiased: bool) -> None:
        checks.flags(unbiased=unbiased)
        self.kernel, self.unbiased = kernel, unbiased
        self.minimum = minimum_rows(self.unbiased, True)
        self._kernels, self._warned = spec_of(kernel), False

    @property
    def process_group(self) -> GroupLike:
        """Over which processes compute() adds up; copies of the metric share it."""
        return None if self._group is None else self._group.group

    @process_group.setter
    def process_group(self, group: GroupLike) -> GroupLike:
        self._group = None if group is None else distributed.Held(group)

    @staticmethod
    def _zeros() -> torch.Tensor:
        return torch.zeros(stream.SUMS + 2, dtype=torch.float64)

    def update(self, x: torch.Tensor, y: torch.Tensor, mask: Mask = None) -> None:
        """Adds one batch."""
        self._add(*self._rows(x, y, mask))

    @overload
    def compute(self, return_error: Literal[False] = False) -> torch.Tensor: ...
    @overload
    def compute(self, return_error: Literal[True]) -> tuple[torch.Tensor, torch.Tensor]: ...
    @overload
    def compute(self, return_error: bool) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
    def compute(self, return_error: bool = False) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The CKA of all batches of all processes so far; with return_error also its standard error."""
        state = self.sums
        if dist.is_available() and dist.is_initialized():
            group = "world" if self.process_group is None else self.process_group
            options = {"kernel": self.kernel, "unbiased": self.unbiased}
            (state,) = summed([state], self._over_ranks(group, ("sums",), options=options))
        return self._result(state, return_error)

    def standard_error(self) -> torch.Tensor:
        """The standard error of compute()."""
        return self.compute(return_error=True)[1]

    def reset(self) -> None:
        """Forgets all batches."""
        self.sums.zero_()

    def forward(self, x: torch.Tensor, y: torch.Tensor, mask: Mask = None) -> torch.Tensor:
        """Adds one batch and returns its own CKA."""
        batch = self._add(*self._rows(x, y, mask))
        return _nan(x) if batch is None else self._result(batch, False)

    def merge_state(self, incoming_state: CKAMetric | dict[str, Any]) -> None:
        """Adds what `incoming_state`, a metric of the same kernel and estimator or its state_dict(), has seen."""
        self.sums += self._state_of(incoming_state)["sums"].to(self.sums.device)

    def _state_of(self, incoming) -> dict:
        if isinstance(incoming, dict):
            if "sums" not in incoming or incoming["sums"].shape != self.sums.shape:
                raise ValueError("incoming_state has no sums [11]: pass a CKAMetric, or its state_dict()")
            return {"sums": incoming["sums"]}
        if not isinstance(incoming, CKAMetric):
            raise TypeError(f"incoming_state is a {type(incoming).__name__}: merge_state takes a CKAMetric")
        if self._asked() != incoming._asked():
            raise ValueError(
                f"incoming_state is {incoming!r}, this metric {self!r}: their sums have no common meaning, use one "
                "kernel and one estimator"
            )
        return {"sums": incoming.sums}

    def _asked(self) -> list[tuple[str, bool]]:
        return [(repr(k), self.unbiased) for k in self._kernels]

    @torch.no_grad()
    def _rows(self, x: torch.Tensor, y: torch.Tensor, mask: Mask):
        """The rows of a batch that count."""
        matrix.check_layer(x, "x")
        matrix.check_layer(y, "y")
        checks.same_device(x, y, "x", "y")
        if x.shape[0] != y.shape[0]:
            raise ValueError(f"y has {y.shape[0]} rows, x has {x.shape[0]}: both must describe the same samples")
        if x.device != self.sums.device:
            raise ValueError(
                f"x is on {x.device}, the metric on {self.sums.device}: move one, e.g. metric.to({str(x.device)!r})"
            )
        return masks.counted([x, y], mask)

    @torch.no_grad()
    def _add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor | None:
        """Adds one batch and returns what it added, None for one that is left out."""
        if x.shape[0] < self.minimum:
            self._left_out(x.shape[0])
            return None
        check_bandwidths(self._kernels, x)
        dtype = at_least_float32(x, y)
        with without_autocast(device_type(x)):
            h = matrix.hsics([x], [y], self._kernels, self.unbiased, sums.choose_backend("auto", x), dtype)
        batch = stream.terms(h.kl[0, 0], h.kk[0], h.ll[0])
        batch = torch.cat([batch, batch.new_tensor([1.0, float(dtype == torch.float64)])])
        self.sums += batch
        return batch

    def _left_out(self, n: int):
        if not self._warned:
            self._warned = True
            checks.warn(
                f"CKAMetric got a batch of {n} rows and needs {self.minimum}: it is left out, as are others like it "
                "(drop_last=True in the data loader avoids it)"
            )

    def _result(self, state, return_error: bool):
        batches, wide = state[COUNT:].tolist()
        if not batches:
            raise ValueError(
                f"no batch of at least {self.minimum} rows was seen: call update(x, y) first, with larger batches"
            )
        dtype = torch.float64 if wide else torch.float32
        found = stream.value(state).to(dtype)
        return (found, stream.standard_error(state, batches).to(dtype)) if return_error else found

    def extra_repr(self) -> str:
        return f"kernel={self.kernel!r}, unbiased={self.unbiased}"

    def __repr__(self) -> str:
        return f"CKAMetric({self.extra_repr()})"


def _nan(x) -> torch.Tensor:
    return torch.full((), torch.nan, device=x.device)


@cache
def _collected():
    """The class that is a torchmetrics.Metric too, or None where torchmetrics is not installed or does not load."""
    if "torchmetrics" not in sys.modules and importlib.util.find_spec("torchmetrics") is None:
        return None
    try:
        from torchmetrics import Metric
    except Exception:  # a torchmetrics that does not fit this torch must not take the metric with it
        return None

    class TorchmetricsCKA(Metric, CKAMetric):
        __doc__ = CKAMetric.__doc__
        __module__, __qualname__ = CKAMetric.__module__, "TorchmetricsCKA"
        full_state_update = False  # batches only add up
        is_differentiable = False

        def __init__(self, kernel="linear", unbiased: bool = True, *, process_group=None, **options):
            # compute() may be asked for its value alone and then for the error: nothing to keep
            options = {"compute_with_cache": False, **options}
            Metric.__init__(self, process_group=process_group, **options)
            del self.sums
            self._set(kernel, unbiased)
            self.add_state("sums", self._zeros(), dist_reduce_fx="sum", persistent=True)

        def update(self, x, y, mask=None) -> None:
            self._add(*self._rows(x, y, mask))

        def compute(self, return_error: bool = False):
            try:
                return self._result(self.sums, return_error)
            except ValueError:
                # torchmetrics would leave it holding the sums of all ranks, and refuse the next update
                if getattr(self, "_is_synced", False):
                    self.unsync()
                raise

        def forward(self, x, y, mask=None):
            x, y = self._rows(x, y, mask)
            if x.shape[0] < self.minimum:
                self._add(x, y)
                return _nan(x)
            return Metric.forward(self, x, y)

        def reset(self) -> None:
            Metric.reset(self)

        def merge_state(self, incoming_state) -> None:
            Metric.merge_state(self, self._state_of(incoming_state))

        def _apply(self, fn, *more):
            return Metric._apply(self, without_rounding(fn), *more)

        extra_repr, __repr__ = CKAMetric.extra_repr, CKAMetric.__repr__

    return TorchmetricsCKA


def __getattr__(name: str):
    if name == "TorchmetricsCKA" and _collected() is not None:  # unpickling looks for it here
        return _collected()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
