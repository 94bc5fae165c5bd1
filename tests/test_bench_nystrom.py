# SPDX-License-Identifier: Apache-2.0
"""The Nystrom cases of the benchmark: contenders compute what the op computes, the stated figures are asked."""

import pytest
import torch

from bench import cases, drive, nystrom_rows
from bench.case import Target


def small():
    for case in nystrom_rows.cpu_cases():
        yield case._replace(n=40, p=5, m=7), ("eager", "algebra") if "algebra" in plain(case) else ("eager",)


def plain(case):
    return nystrom_rows._PLAIN[case.op]


def stated():
    return next(case for case in cases.cases("cpu") if case.name == "nystrom_cka n 200000, p 64, m 256")


@pytest.mark.parametrize("case, name", [(case, name) for case, who in small() for name in who], ids=str)
def test_every_contender_computes_what_the_op_computes(case, name):
    # in float64, where the contenders' cancellation does not show
    case = case._replace(dtype="float64")
    (x, y), _ = drive.draw(case, "cpu", 0)
    found = []
    for built in (drive.build(case, None, name, None), drive.build(case, None, "kdkernels", "torch")):
        leaf = x.detach().requires_grad_()
        value = built.function(leaf, y).double()
        value.backward(y if value.shape == y.shape else None)
        found.append((value.detach(), leaf.grad))
    # float32 in the contenders' features
    torch.testing.assert_close(found[0][0], found[1][0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=2e-2, atol=2e-3 * float(found[1][1].abs().max()))


def test_the_stated_figures_are_asked_of_the_stated_case():
    asked = {(t.figure, t.bound) for t in stated().targets}
    assert ("ms", 10_000) in asked and ("bytes", 3 * 200_000 * 256 * 4) in asked
    assert stated().shape == {"n": 200_000, "p": 64, "m": 256} and stated().dtype == "float32"


def test_nobody_is_asked_for_a_matrix_that_does_not_fit():
    for device in ("cpu", "cuda"):
        for case in (case for case in cases.cases(device) if case.family == "nystrom"):
            names = nystrom_rows.names(case, device, False)
            assert names and ("eager" in names) == (case.n <= nystrom_rows.MOST_ROWS or case.op == "nystrom_features")


def test_limits_become_targets_with_what_was_measured():
    case, extras = stated(), {("kdkernels", "torch"): {"peak_bytes": 10**9, "launches": None}}
    contender = drive.Contender("kdkernels", "torch", None)
    runner = drive.measure.Runner(contender, "eager", None)
    found = drive._targets(case, runner, "step", 2500.0, {"algebra": (1, 2, 3)}, extras, [], 1000.0)
    assert {(t["figure"], t["value"], t["holds"]) for t in found} == {
        ("ms", 2500.0, True), ("bytes", 10**9, False), ("speed", 2, True),
    }  # fmt: skip
    roof = case._replace(targets=(Target("roof", "the ceiling", 60.0),))
    (found,) = drive._targets(roof, runner, "step", 2500.0, {}, extras, [], 1000.0)
    assert found["value"] == 40 and not found["holds"]


def test_work_of_the_features_is_the_product_and_the_solve():
    case = next(case for case in nystrom_rows.cuda_cases() if case.op == "nystrom_features")
    n, p, m = 65536, 512, 512
    assert case.work("fwd")[1] == 2 * n * m * p + n * m * m + m**3 // 3
    assert case.work("fwd")[0] == 4 * n * (p + m)
    for k in (0, 1):
        assert case.work("fwd")[k] + case.work("bwd")[k] == case.work("step")[k]
