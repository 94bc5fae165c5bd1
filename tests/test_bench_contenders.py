# SPDX-License-Identifier: Apache-2.0
"""The benchmark compares like with like: each contender computes, on small inputs, what the op or module computes."""

import pytest
import torch

from bench import cases, drive, head_rows, logit_rows, loss_rows, nystrom_rows, projecting

FLOAT64, FLOAT32 = 1e-10, 5e-6  # how near values and gradients are, relative to the largest


def gram():
    """One case of each kind that the CPU's list has, small: more samples than features where the original has."""
    kinds = {(c.op, c.kernel, str(c.options), c.transpose, c.groups > 0, c.n > 2 * c.p): c for c in cases.cpu_cases()}
    for (_, _, _, _, grouped, long), case in kinds.items():
        n, p = (40, 10) if long else (14, 20)
        case = case._replace(n=n, p=p, q=p, regime="randn", sigma="number", groups=2 * grouped, dtype="float64")
        yield case, ("eager", "algebra"), FLOAT64


def logits():
    for case in logit_rows.cpu_cases():
        yield case._replace(dims=(5, *(min(n, 9) for n in case.dims[1:])), dtype="float32"), ("eager",), FLOAT32


def modules():
    """Three channels of a quarter of the size for feature pyramids; the rest is small as it is."""
    for case in loss_rows.cases(map_size=(6, 5, 4, 4), logits=(9, 12), rows=(9, 6)):
        if case.loss == "pcka":
            case = case._replace(dims=tuple((B, 3, -(-H // 4) + 16, -(-W // 4)) for B, _, H, W in case.dims))
        # the public code has an eps beside norms
        yield case._replace(dtype="float64"), ("eager",), 1e-5 if case.loss == "dist" else FLOAT64


def landmarks():
    """In float64; the contenders' features are float32, and squaring them costs digits."""
    for case in nystrom_rows.cpu_cases():
        names = [name for name in ("eager", "algebra") if name == "eager" or name in nystrom_rows._PLAIN[case.op]]
        yield case._replace(n=40, p=5, m=7, dtype="float64"), names, 2e-4


def projections():
    for case in projecting.cpu_cases():
        dims = (3, *(min(n, 9) for n in case.dims[1:]))
        case = case._replace(dims=dims, inner=min(case.inner, 4), width=min(case.width, 7), dtype="float32")
        yield case, ("eager", "algebra"), FLOAT32


def heads():
    for case in head_rows.cpu_cases():
        yield case._replace(rows=6, classes=40, dtype="float32"), ("eager",), FLOAT32


ALL = [
    pytest.param(case, name, close, id=f"{case.name} {name}")
    for family in (gram, logits, heads, modules, landmarks, projections)
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
    for theirs, mine in zip(*found, strict=True):
        torch.testing.assert_close(theirs, mine, rtol=0, atol=close * float(mine.abs().max()))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_names_are_unique(device):
    names = [case.name for case in cases.cases(device)]
    assert len(names) == len(set(names))
