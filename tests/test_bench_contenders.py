# SPDX-License-Identifier: Apache-2.0
"""The benchmark compares like with like: each contender computes, on small inputs, what the op or module computes."""

from typing import NamedTuple

import pytest
import torch

from bench import cases, drive, logit_rows, loss_rows, nystrom_rows, projecting


class Close(NamedTuple):
    """How near two contenders must be: rtol and atol of a value; of a gradient, its atol relative to its largest."""

    value: float = 1e-5
    value_atol: float = 1e-6
    gradient: float = 1e-4
    gradient_atol: float = 1e-6


def gram():
    """One case of each kind that the CPU's list has, small: more samples than features where the original has."""
    kinds = {(c.op, c.kernel, str(c.options), c.transpose, c.groups > 0, c.n > 2 * c.p): c for c in cases.cpu_cases()}
    for (_, _, _, _, grouped, long), case in kinds.items():
        n, p = (40, 10) if long else (14, 20)
        case = case._replace(n=n, p=p, q=p, regime="randn", sigma="number", groups=2 * grouped, dtype="float64")
        yield case, ("eager", "algebra"), Close(1e-9, 1e-12, 1e-7, 1e-12)


def logits():
    for case in logit_rows.cpu_cases():
        yield case._replace(dims=(5, *(min(n, 9) for n in case.dims[1:])), dtype="float32"), ("eager",), Close()


def modules():
    """Three channels of a quarter of the size for feature pyramids; the rest is small as it is."""
    # the public code's eps beside norms and logarithms
    apart = {"pkt": 1e-4, "dist": 1e-5}
    for case in loss_rows.cases(map_size=(6, 5, 4, 4), logits=(9, 12), rows=(9, 6)):
        if case.loss == "pcka":
            case = case._replace(dims=tuple((B, 3, -(-H // 4) + 16, -(-W // 4)) for B, _, H, W in case.dims))
        yield case._replace(dtype="float64"), ("eager",), Close(apart.get(case.loss, 1e-6), 1e-9, 1e-4, 1e-4)


def landmarks():
    """In float64, where the contenders' cancellation does not show; their features are float32."""
    for case in nystrom_rows.cpu_cases():
        names = [name for name in ("eager", "algebra") if name == "eager" or name in nystrom_rows._PLAIN[case.op]]
        yield case._replace(n=40, p=5, m=7, dtype="float64"), names, Close(2e-3, 2e-3, 2e-2, 2e-3)


def projections():
    for case in projecting.cpu_cases():
        dims = (3, *(min(n, 9) for n in case.dims[1:]))
        case = case._replace(dims=dims, inner=min(case.inner, 4), width=min(case.width, 7), dtype="float32")
        yield case, ("eager", "algebra"), Close(1e-5, 0.0, 1e-4, 1e-7)


ALL = [
    pytest.param(case, name, close, id=f"{case.name} {name}")
    for family in (gram, logits, modules, landmarks, projections)
    for case, names, close in family()
    for name in names
]


@pytest.mark.parametrize("case, name, close", ALL)
def test_a_contender_computes_what_the_op_computes(case, name, close):
    (x, y), sigma = drive.draw(case, "cpu", 0)
    x, y = (t.double() if case.dtype == "float64" else t for t in (x, y))
    ours = drive.usable_backends(case.op, "cpu", ("torch",))[0]
    found = []
    for built in (drive.build(case, sigma, name, None), drive.build(case, sigma, "kdkernels", ours)):
        torch.manual_seed(3)  # mixup draws its permutation in the call
        leaf = x.detach().requires_grad_()
        value = built.function(leaf, y)
        upstream = y.to(value.dtype) if value.shape == y.shape else torch.ones_like(value)
        found.append((value.detach().double(), *torch.autograd.grad(value, leaf, upstream)))
    (theirs, slope), (value, gradient) = found
    torch.testing.assert_close(theirs, value, rtol=close.value, atol=close.value_atol)
    atol = close.gradient_atol * float(gradient.abs().max())
    torch.testing.assert_close(slope, gradient, rtol=close.gradient, atol=atol)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_names_are_unique(device):
    names = [case.name for case in cases.cases(device)]
    assert len(names) == len(set(names))
