# SPDX-License-Identifier: Apache-2.0
"""The logits cases of the benchmark: contenders compute what the op computes, the stated figures are there."""

import pytest
import torch

from bench import cases, drive, logit_rows


def small():
    for case in logit_rows.cpu_cases():
        yield case._replace(dims=(5, *(min(n, 9) for n in case.dims[1:])), dtype="float32")


@pytest.mark.parametrize("case", list(small()), ids=lambda case: case.name)
def test_the_eager_contender_computes_what_the_op_computes(case):
    (x, y), _ = drive.draw(case, "cpu", 0)
    values, gradients = [], []
    for built in (drive.build(case, None, "eager", None), drive.build(case, None, "kdkernels", "torch")):
        torch.manual_seed(3)  # mixup draws its permutation in the call
        leaf = x.detach().requires_grad_()
        value = built.function(leaf, y)
        value.sum().backward()
        values.append(value.detach())
        gradients.append(leaf.grad)
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_the_stated_cases_and_their_figures_are_listed():
    by_name = {case.name: case for case in cases.cases("cpu")}
    for name, bound in (("mixed_distillation 1024 x 1000", 2.0), ("distillation_kl 1024 x 1000", 1.0)):
        case = by_name[name]
        assert case.shape == {"rows": 1024, "C": 1000} and case.dtype == "float32"
        assert [(t.figure, t.against, t.bound, t.phase) for t in case.targets] == [("speed", "eager", bound, "step")]
    assert {case.name for case in cases.cases("cuda")} >= {"distillation_kl 8192 x 1000 bfloat16"}


def test_work_reads_both_rows_twice_and_writes_one_gradient():
    case = logit_rows.cpu_cases()[0]
    assert case.work("fwd")[0] == 2 * 1024 * 1000 * 4 and case.work("step")[0] == 5 * 1024 * 1000 * 4
    assert case.work("fwd")[0] + case.work("bwd")[0] == case.work("step")[0]
    full = next(c for c in logit_rows.cpu_cases() if c.kernel == "full")
    assert full.work("step")[0] == 7 * 1024 * 1000 * 4
    mixing = next(c for c in logit_rows.cpu_cases() if c.op == "mixup")
    assert mixing.work("fwd")[0] == 2 * 256 * 3 * 32 * 32 * 4


def test_names_are_unique_on_every_device():
    for device in ("cpu", "cuda"):
        names = [case.name for case in cases.cases(device)]
        assert len(names) == len(set(names))
