# SPDX-License-Identifier: Apache-2.0
"""The projection and KDA cases of the benchmark: contenders compute what the op computes, the stated case is there."""

import pytest
import torch

from bench import cases, drive, projecting


def small():
    for case in projecting.cpu_cases():
        dims = (3, *(min(n, 9) for n in case.dims[1:]))
        yield case._replace(dims=dims, inner=min(case.inner, 4), width=min(case.width, 7), dtype="float32")


@pytest.mark.parametrize("case", list(small()), ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["eager", "algebra"])
def test_every_contender_computes_what_the_op_computes(case, name):
    (x, y), _ = drive.draw(case, "cpu", 0)
    values, gradients = [], []
    for built in (drive.build(case, None, name, None), drive.build(case, None, "kdkernels", "torch")):
        leaf = x.detach().requires_grad_()
        value = built.function(leaf, y)
        value.backward()
        values.append(value.detach())
        gradients.append(leaf.grad)
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


def test_the_stated_case_and_its_figure_are_listed():
    case = next(case for case in cases.cases("cpu") if case.name == "projected_mse 32 x 256 x 28 x 28 k 64")
    assert case.shape == {"rows": 25088, "c": 256, "k": 64} and case.dtype == "float32"
    assert [(t.figure, t.against, t.bound, t.phase) for t in case.targets] == [("speed", "eager", 1.5, "step")]


def test_inputs_lie_in_memory_as_the_case_says():
    for case in projecting.cpu_cases():
        x, _ = drive.draw(case.smaller(), "cpu", 0)[0]
        assert x.is_contiguous(memory_format=torch.channels_last) == (case.kernel == "channels_last") or x.dim() != 4


def test_work_counts_one_product_forward_and_one_backward():
    case = projecting.cpu_cases()[0]
    moved, flops = case.work("step")
    assert flops == 2 * case.work("fwd")[1] == 4 * 25088 * 256 * 64
    assert moved == 25088 * (3 * 256 * 4 + 8 * 64)
    assert case.work("fwd")[0] + case.work("bwd")[0] == moved


def test_names_are_unique_on_every_device():
    for device in ("cpu", "cuda"):
        names = [case.name for case in cases.cases(device)]
        assert len(names) == len(set(names))
