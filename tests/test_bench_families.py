# SPDX-License-Identifier: Apache-2.0
"""The families of the benchmark list the stated figures on the stated cases, and count their work and memory."""

import pytest
import torch

from bench import analysis_rows, cases, drive, logit_rows, loss_rows, measure, nystrom_rows, projecting
from bench.case import Target


@pytest.mark.parametrize("name", ["eager", "algebra"])
def test_a_contender_computes_what_the_op_computes(name):
    case = analysis_rows.cpu_cases()[0]._replace(n=64, p=24, batch=32)
    (x, y), _ = drive.draw(case, "cpu", 0)
    found = drive.build(case, None, "kdkernels", "torch").function(x, y)
    expected = drive.build(case, None, name, None).function(x, y)
    assert found.shape == (20, 20) and found.isfinite().all()
    # the contender's float32 sums are not centred
    torch.testing.assert_close(found, expected.double(), rtol=0, atol=2e-5)


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


def stated():
    return next(case for case in cases.cases("cpu") if case.name == "nystrom_cka n 200000, p 64, m 256")


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
