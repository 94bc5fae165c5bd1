# SPDX-License-Identifier: Apache-2.0
"""The short way of small batches: no mask, no side that is prepared, and tensors go to the kernels as they are."""

from __future__ import annotations

from ...triton_launch import Layout, layout, on_device_of
from ..call import Problem
from ..torch_impl.forms import sigma_gradient
from .maps import KINDS, Map, constant, precision
from .schedule import few
from .small import TERMS, fits, plan_of, side_of
from .small_kernels import Side

_ONE = constant(1)


class _Direct:
    """A `differentiable.Plan` of [n, p] or [G, n, p]."""

    def __init__(self, problem: Problem, text: str, precision: str, need: int, x: Layout, y: Layout):
        self.plan, self.specs, self.need = plan_of(problem, precision, need, x, y), problem.specs, need
        self.how = text, need
        self.asked = [own for own in (0, 1) if need & (0b101 << own)]
        # of a kernel without numbers the bandwidths come with each call, a tensor [G]
        self.kinds = [KINDS[spec.name] for spec in self.specs]
        self.sides = [side_of(spec, None, None) if spec.params or not spec.of_distance else None for spec in self.specs]
        self.step = int(len(x.shape) == 3 and x.shape[0] > 1)

    def _sides(self, *sigmas):
        if sigmas[0] is None and sigmas[1] is None:
            return self.sides
        return [
            side if sigma is None else Side(Map(kind, _ONE, _ONE, sigma, self.step, ()), None, None)
            for side, kind, sigma in zip(self.sides, self.kinds, sigmas, strict=True)
        ]

    @on_device_of
    def forward(self, x, y, _, sigma_x, sigma_y):
        of_x, of_y = self._sides(sigma_x, sigma_y)
        return self.plan.forward(x, y, of_x, of_y, None, None, None)

    @on_device_of
    def backward(self, grad, x, y, _, sigma_x, sigma_y, *saved):
        sides, features, out = self._sides(sigma_x, sigma_y), (x, y), [None] * 4
        grad = grad.float().contiguous()
        for own in self.asked:
            dx, _, dsigma = self.plan.backward(
                own, features[own], sides[own], sides[1 - own], grad, saved, None, None, False
            )
            if self.need & (1 << own):
                out[own] = dx
            if dsigma is not None:
                out[2 + own] = sigma_gradient(dsigma.sum(-1).reshape(-1), (sigma_x, sigma_y)[own])
        return out


def direct(problem: Problem, text: str, need: int, x, y) -> _Direct | None:
    """The way of such calls, where they have one: without a mask."""
    steps = *x.stride()[-2:], *y.stride()[-2:]
    if not few(x.shape[-2]) or problem.prepared or (problem.row_normalize and problem.center) or not fits(*steps):
        return None
    if any(len(spec.params) > 1 for spec in problem.specs):  # bandwidths that are added up lie in a tensor
        return None
    return _Direct(problem, text, precision(x, y, exact=TERMS), need, layout(x), layout(y))
