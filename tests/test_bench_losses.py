# SPDX-License-Identifier: Apache-2.0
"""The loss cases of the benchmark: contenders compute what the modules compute, the stated figures are there."""

import pytest
import torch

from bench import cases, drive, loss_rows

LISTED = loss_rows.cases(map_size=(6, 5, 4, 4), logits=(9, 12), rows=(9, 6))


def small(case):
    """Three channels of a quarter of the size for feature pyramids; the rest is small as it is."""
    if case.loss != "pcka":
        return case
    return case._replace(dims=tuple((B, 3, -(-H // 4) + 16, -(-W // 4)) for B, _, H, W in case.dims))


@pytest.mark.parametrize("case", LISTED, ids=lambda case: case.name.replace(" ", "-"))
def test_both_contenders_compute_one_loss(case):
    case = small(case)._replace(dtype="float64")
    (x, y), _ = drive.draw(case, "cpu", 0)
    values, gradients = [], []
    for backend in (None, drive.usable_backends(case.op, "cpu", ("torch",))[0]):
        leaf = x.detach().requires_grad_()
        value = drive.build(case, None, "kdkernels" if backend else "eager", backend).function(leaf, y)
        value.backward()
        values.append(value.detach())
        gradients.append(leaf.grad)
    torch.testing.assert_close(values[1], values[0], rtol=RTOL.get(case.loss, 1e-6), atol=1e-9)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4 * gradients[0].abs().max().item())


# the public code's eps beside norms and logarithms
RTOL = {"pkt": 1e-4, "dist": 1e-5}


def test_the_stated_figures_are_listed():
    asked = {case.name: case for case in cases.cases("cpu") if case.family == "losses"}
    figures = {
        "NSTLoss 64 x 256 x 8 x 8": [("speed", 30), ("memory", 1 / 50)],
        "PCKALoss 2 x 256 x 100 x 168": [("speed", 15)],
        "PCKALoss 4 levels": [("speed", 15)],
        "RCKALoss 256 x 1000": [("speed", 10)],
        "RKDAngleLoss 256 x 512": [("speed", 10), ("memory", 1 / 50)],
        "KDLoss 64 x 10": [("speed", 1)],
    }
    for name, wanted in figures.items():
        assert [(t.figure, t.bound) for t in asked[name].targets] == wanted
        assert all(t.against == "eager" and t.backend == "cpp" for t in asked[name].targets)
    assert all(t.backend == "torch" for t in asked["ATLoss 64 x 256 x 8 x 8"].targets)


def test_levels_are_views_of_one_tensor_and_the_work_counts_them_all():
    case = next(case for case in loss_rows.cpu_cases() if len(case.dims) == 4)
    small = case._replace(dims=tuple((1, 2, 3, n) for n in (8, 4, 2, 1)))
    (x, _), _ = drive.draw(small, "cpu", 0)
    levels = loss_rows.cut(small, x)
    assert [tuple(level.shape) for level in levels] == list(small.dims)
    assert torch.cat([level.flatten() for level in levels]).equal(x) and levels[0].data_ptr() == x.data_ptr()
    assert small.work("step") == (3 * 4 * 6 * 15, 0)
    assert case.smaller().dims[0] == (2, 256, 100, 168)
