# SPDX-License-Identifier: Apache-2.0
"""Ranking cases of the benchmark: contenders compute the same, figures can be missed, rows say what did not run."""

import json

import pytest
import torch

import kdkernels as kd
from bench import __main__ as command
from bench import cases, drive, measure, plots, rank_accuracy, rank_schedules, ranking, report, roof
from bench.case import Target
from kdkernels import testing
from kdkernels.testing import Result

TINY = [
    ranking._case(6, 12, (Target("speed", "reference", 1e9, backend="torch"),)),
    ranking._case(6, 12, (), kernel="kl", dtype="bfloat16"),
    ranking._case(6, 12, (), op="soft_sort", relative=None),
    ranking._case(6, 12, (), op="spearman"),
]


def run(path, monkeypatch, *more):
    monkeypatch.setattr(drive, "listed", lambda device, quick: TINY)
    monkeypatch.setattr(testing, "contract", lambda *a, **k: [Result("value", "c", 0.0, 1.0, True)])
    measured = roof.measure
    monkeypatch.setattr(roof, "measure", lambda device, quick, clock: measured(device, True, clock))
    few = ("--backends", "torch", "--reps", "3", "--case-seconds", "0.01")
    assert command.main(["run", "--device", "cpu", "--family", "rank", *few, "--out", str(path), *more]) == 0
    return report.load([path])


def test_a_run_times_sort_rivals_and_ours_on_every_case(tmp_path, monkeypatch):
    rows = run(tmp_path / "rows.jsonl", monkeypatch)
    timed = {(r["case"], r["contender"]): r for r in rows if r["kind"] == "time" and r.get("phase", "step") == "step"}
    for case in TINY:
        for who in ("sort", "reference", "kdkernels"):
            row = timed[case.name, who]
            assert row["status"] == "ok" and row["shape"] == {"rows": 6, "n": 12} and row["minimum_bytes"] > 0
        assert set(timed[case.name, "kdkernels"]["ratios"]) >= {"sort", "reference"}
        assert ((case.name, "eager") in timed) == (case.op != "soft_sort")
    assert all(row["status"] == "ok" for row in timed.values())
    assert "overhead" not in {row["kind"] for row in rows}
    (target,) = timed[TINY[0].name, "kdkernels"]["targets"]
    assert target["against"] == "reference" and target["holds"] is False


def test_the_report_has_a_table_of_its_own_for_ranking_and_names_what_did_not_run(tmp_path, monkeypatch):
    text = report.markdown(run(tmp_path / "rows.jsonl", monkeypatch))
    assert "Ranking: forward + backward" in text and "speed vs torchsort" in text
    assert all(f"| {case.name} |" in text for case in TINY)
    assert "failed" not in text
    assert f"**missed** | {TINY[0].name} (torch, eager)" in text


def test_sorting_alone_is_a_floor_and_not_a_rival():
    row = {"ratios": {"sort": [0.1] * 3, "cpp": [0.2] * 3, "torchsort": [3.0] * 3, "eager": [9.0] * 3}}
    assert report.speed(row) == 3.0


@pytest.mark.parametrize("case", [*TINY[:1], *TINY[2:]], ids=lambda case: case.name)
def test_gradient_and_value_are_timed_with_an_upstream_gradient_that_is_not_ones(case):
    # ones have no gradient through ranks: a contender could skip the work
    x, y = measure.leaves([ranking.draw(case, "cpu", 0)])[0]
    value = measure.step(ranking.ours(case, "torch"), x, y)
    assert value.shape == ((6,) if case.op == "spearman" else (6, 12))
    assert x.grad.abs().max() > 1e-3


@pytest.mark.parametrize("op", ["soft_rank", "soft_sort", "spearman"])
@pytest.mark.parametrize("kernel", ["l2", "kl"])
def test_torchsorts_contender_is_its_public_function_at_the_strength_of_the_case(op, kernel, monkeypatch):
    from kdkernels.compat import torchsort

    monkeypatch.setitem(__import__("sys").modules, "torchsort", torchsort)
    case = ranking._case(6, 12, (), op=op, kernel=kernel)._replace(dtype="float64")
    x, y = (t.double() for t in ranking.draw(case, "cpu", 0))
    torch.testing.assert_close(ranking.contender(case, "torchsort")(x, y), ranking.ours(case, "reference")(x, y))


def test_the_obvious_form_approaches_hard_ranks_and_is_refused_where_it_does_not_fit():
    case = ranking._case(4, 9, ())._replace(relative=None, number=1e-6)
    x = torch.randn(4, 9)
    torch.testing.assert_close(ranking.contender(case, "eager")(x, None), x.argsort().argsort() + 1.0)
    with pytest.raises(MemoryError, match="n x n form"):
        ranking.contender(ranking._case(256, 1000, ()), "eager")(torch.randn(256, 1000), None)


def test_a_relative_strength_is_that_of_auto():
    case = ranking._case(64, 100, ())
    x = ranking.draw(case, "cpu", 0)[0].double()
    pooled = kd.rank_diagnostics(x, case.strength).fraction_pooled.mean()
    auto = kd.rank_diagnostics(x, "auto").fraction_pooled.mean()
    assert 0.2 < pooled < 1 and abs(pooled - auto) < 0.05


def test_the_stated_figures_stand_on_the_cases():
    for device, listing in (("cpu", ranking.cpu_cases()), ("cuda", ranking.cuda_cases())):
        assert {case.name for case in cases.cases(device)} > {case.name for case in listing}
    speeds = {(c.rows, c.n): t.bound for c in ranking.cpu_cases() if c.op == "soft_rank" and c.kernel == "l2"
              for t in c.targets if t.against == "torchsort" and t.bound > 1}  # fmt: skip
    assert speeds == {(256, 1000): 3.0, (1024, 100): 3.0, (64, 21841): 2.0, (8, 128256): 4.0}
    assert all(t.backend == "cuda" for c in ranking.cuda_cases() for t in c.targets)


@pytest.mark.parametrize(
    "figure, method, expected", [("launches", "eager", 5), ("graph", "graph", 4.0), ("microseconds", "graph", 20.0)]
)
def test_device_figures_come_from_the_profiler_and_the_graph(figure, method, expected):
    case = TINY[0]._replace(targets=(Target(figure, "x", 1.0, backend="cuda"),))
    runner = measure.Runner(measure.Contender("kdkernels", "cuda", None), method, None)
    extras, ceilings = {("kdkernels", "cuda"): {"launches": 5, "peak_bytes": 1}}, [{"case": "graph", "ms_p50": 0.005}]
    (target,) = drive._targets(case, runner, "step", 0.02, {}, extras, ceilings, None)
    assert target["value"] == pytest.approx(expected) and target["holds"] is False
    assert drive._targets(case, runner, "fwd", 0.02, {}, extras, ceilings, None) == []
    other = runner._replace(contender=measure.Contender("kdkernels", "torch", None))
    assert drive._targets(case, other, "step", 0.02, {}, extras, ceilings, None) == []


def test_an_error_of_one_ulp_is_one_ulp_and_a_nan_is_missed():
    truth = torch.tensor([[1.0, 1.5, 5000.0]], dtype=torch.float64)
    off = truth + torch.tensor([0.0, 0.0, 2.0**-11])
    assert rank_accuracy.ulps(truth, truth) == 0 and rank_accuracy.ulps(off, truth) == 1
    assert 4.8e-4 < 2.0**-11 < 4.9e-4
    row = rank_accuracy._row(rank_accuracy.Point("l2", 3, "float32"), "kdkernels", "cpp", float("nan"), 1.0)
    assert row["holds"] is False


def test_rank_errors_are_measured_over_all_strengths_and_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_accuracy, "SIZES", (10, 33))
    path = tmp_path / "rows.jsonl"
    what = ["--quick", "--family", "rank", "--device", "cpu", "--backends", "torch"]
    assert command.main(["accuracy", *what, "--out", str(path)]) == 0
    rows = [row for row in report.load([path]) if row["contender"] == "kdkernels"]
    assert len(rows) == len(rank_accuracy.points(True)) == 12 and all(row["holds"] for row in rows)
    assert rows[0]["strengths"][0] == 1e-9 and rows[0]["strengths"][-1] == 1e3
    assert "| l2 | float32 | torch |" in report.markdown(report.load([path]))
    true = kd.soft_rank

    def slip(x, kernel, strength, backend):
        return true(x, kernel, strength, backend=backend) * (1 if backend == "reference" else 1.0001)

    monkeypatch.setattr(kd, "soft_rank", slip)
    assert command.main(["accuracy", *what, "--out", str(path)]) == 1


def test_ranking_series_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    row = {"run": "r", "device": "cpu", "commit": "c", "cpu": "CPU", "gpu": None, "threads": 2, "kind": "time",
           "status": "ok", "op": "soft_rank", "kernel": "l2", "dtype": "float32", "method": "eager", "phase": "step",
           "ms_p50": 2.0, "roof_percent": 5.0}  # fmt: skip
    rows = [
        {**row, "contender": who, "backend": backend, "shape": {"rows": 64, "n": n}, "options": {"relative": 1.0}}
        for n in (32, 128, 1024)
        for who, backend in (("kdkernels", "cpp"), ("torchsort", None))
    ]
    rows.append({**rows[0], "options": {"relative": None}, "ms_p50": 1e6})
    (series,) = plots.series(rows).values()
    assert series["lines"]["kdkernels", "cpp"] == [(32, 2.0), (128, 2.0), (1024, 2.0)]
    (svg,) = plots.plots(json.loads(json.dumps(rows)), tmp_path)
    assert svg.name == "cpu-soft_rank-l2-rows64-float32-eager.svg"
    assert ">torchsort</text>" in svg.read_text()


def schedules(monkeypatch, *more):
    monkeypatch.setitem(rank_schedules.BACKEND, "cpu", "reference")
    monkeypatch.setattr(rank_schedules, "SHAPES", ((9, 1), (9, 2), (5, 33)))
    monkeypatch.setattr(rank_schedules, "LONG", ((2, 70),))
    return rank_schedules.main(["--device", "cpu", *more])


def test_every_schedule_is_run_forward_and_backward_and_a_wrong_one_is_found(monkeypatch, capsys):
    assert schedules(monkeypatch) == 0
    # three dtypes and one more kind in float32 (two in long rows), two regularizations, three ops, four shapes
    assert "102 calls forward and backward, 0 wrong" in capsys.readouterr().out
    assert schedules(monkeypatch, "--longest", "33") == 0
    assert "72 calls" in capsys.readouterr().out
    true = kd.soft_rank

    def shifted(x, **how):
        return true(x, **how) + (how["backend"] == "reference" and x.shape[-1] == 33)

    monkeypatch.setattr(kd, "soft_rank", shifted)
    assert schedules(monkeypatch) == 1
    out = capsys.readouterr().out
    assert "FAILED ('soft_rank', 5, 33, torch.float32, 'plain', 'l2'): value off by" in out and "8 wrong" in out


def test_a_missing_library_is_said_and_is_no_pass_of_anything(monkeypatch, capsys):
    assert rank_schedules.main(["--device", "cuda"]) == (2 if torch.version.cuda else 0)
    text = capsys.readouterr()
    assert "no CUDA device" in text.err or "left out: the ranking kernels of backend cuda cannot run" in text.out


def test_a_difference_is_seen_where_a_value_should_be_nan():
    nan = torch.tensor([1.0, float("nan")])
    assert rank_schedules.apart(nan, nan) == 0
    assert rank_schedules.apart(torch.tensor([1.0, 2.0]), nan) == float("inf")
    assert rank_schedules.apart(nan, torch.tensor([1.0, 2.0])) == float("inf")
    assert rank_schedules.apart(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0])) == pytest.approx(0.5 / 3)
