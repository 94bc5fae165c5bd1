# SPDX-License-Identifier: Apache-2.0
"""The cases of comparing networks in the benchmark: contenders compute what the op computes, the figures are there."""

import pytest
import torch

from bench import analysis_rows, cases, drive, measure


@pytest.mark.parametrize("name", ["eager", "algebra"])
def test_a_contender_computes_what_the_op_computes(name):
    case = analysis_rows.cpu_cases()[0]._replace(n=64, p=24, batch=32)
    (x, y), _ = drive.draw(case, "cpu", 0)
    found = drive.build(case, None, "kdkernels", "torch").function(x, y)
    expected = drive.build(case, None, name, None).function(x, y)
    assert found.shape == (20, 20) and found.isfinite().all()
    # the contender's float32 sums are not centred
    torch.testing.assert_close(found, expected.double(), rtol=0, atol=2e-3)


def test_what_has_no_gradient_is_timed_without_a_backward_pass():
    case = analysis_rows.cpu_cases()[0]._replace(n=8, p=4, batch=8)
    runner = measure.cpu_runner(drive.build(case, None, "kdkernels", "torch"), [drive.draw(case, "cpu", 0)[0]])
    times = runner.call(0)
    assert times["bwd"] < times["fwd"] <= times["step"]


def test_the_stated_figures_are_those_of_20_layers_and_10000_samples():
    stated = [case for case in cases.cases("cpu") if case.family == "analysis" and case.targets]
    assert all(case.shape["n"] == 10_000 and case.shape["layers"] == 20 for case in stated)
    assert [t for case in stated for t in case.targets if t.figure == "speed"][0].bound == 5.0
    (memory,) = [t for case in stated for t in case.targets if t.figure == "bytes"]
    assert memory.bound == 40 * 256 * 512 * 4 + 9 * 400 * 8
