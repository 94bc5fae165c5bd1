# SPDX-License-Identifier: Apache-2.0
"""The benchmark driver on tiny sizes, end to end: what a row holds, what it refuses, what a report may not drop.

No test here asserts a time: a shared machine would fail it.
"""

import json
import re
import socket
import time

import pytest
import torch

import kdkernels as kd
from bench import __main__ as command
from bench import accuracy, cases, contenders, data, drive, machine, measure, memory, overhead, plots, report, roof
from bench.case import Target
from kdkernels import testing
from kdkernels.testing import Result

PROVENANCE = {
    *("run", "utc", "commit", "dirty", "device", "cpu", "threads", "load", "gpu", "clocks", "driver"),
    *("python", "torch", "triton", "cuda", "fp_fusion"),
}
MODELLED = {"run", "commit", "modelled", "version", "architecture", "kernel", "cycles", "microseconds", "memory_floor"}
TIMED = PROVENANCE | {
    *("kind", "status", "op", "case", "contender", "backend", "phase", "dtype", "shape", "regime", "reps", "l2"),
    *("method", "ms_p20", "ms_p50", "ms_p80", "launches", "peak_bytes", "minimum_bytes", "flops"),
    *("roof", "roof_percent", "ratios", "targets"),
}
TINY = [
    cases.Case("linear tiny", "cka", 12, 6, 6, targets=(Target("speed", "eager", 1e9),)),
    cases.Case("rbf tiny", "cka", 12, 6, 6, "rbf"),
    cases.Case("mse tiny", "gram_mse", 12, 6, 6),
]


def main(*arguments):
    return command.main(list(arguments))


def rows_of(path):
    return report.load([path])


@pytest.fixture
def tiny(monkeypatch):
    """Three small cases, small ceilings, and a contract that passed."""
    monkeypatch.setattr(drive, "listed", lambda device, quick: TINY)
    monkeypatch.setattr(testing, "contract", lambda *a, **k: [Result("value", "c", 0.0, 1.0, True)])
    measured = roof.measure
    monkeypatch.setattr(roof, "measure", lambda device, quick, clock: measured(device, True, clock))


def run_tiny(path, *more):
    arguments = ("--device", "cpu", "--backends", "torch", "--reps", "3", "--case-seconds", "0.01", "--out", str(path))
    return main("run", *arguments, *more)


def test_a_run_times_every_case_contender_and_phase_with_full_rows(tiny, tmp_path):
    path = tmp_path / "rows.jsonl"
    assert run_tiny(path, "--case", "tiny") == 0
    rows = rows_of(path)
    timed = [row for row in rows if row["kind"] == "time"]
    found = {(row["case"], row["contender"], row["phase"]) for row in timed}
    assert found == {
        (case.name, who, phase)
        for case in TINY
        for who in ("eager", "algebra", "kdkernels")
        for phase in ("fwd", "bwd", "step")
    }
    assert {row["case"] for row in rows if row["kind"] == "roof"} == {"copy", "gemm"}
    for row in timed:
        assert TIMED <= row.keys(), TIMED - row.keys()
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert row["roof_percent"] > 0 and row["minimum_bytes"] > 0 and row["flops"] > 0
        assert row["launches"] is None and row["status"] == "ok"
        assert set(row["ratios"]) == ({"eager", "algebra"} if row["contender"] == "kdkernels" else set())


def test_the_processor_clock_does_not_count_waiting(tiny, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    waiting = lambda case, sigma: lambda x, y: (time.sleep(0.05), (x * y).sum())[1]  # noqa: E731
    monkeypatch.setattr(contenders, "eager", waiting)
    assert run_tiny(path, "--case", "mse tiny", "--clock", "cpu") == 0
    (row,) = [r for r in rows_of(path) if r.get("contender") == "eager" and r["phase"] == "step"]
    assert row["clock"] == "cpu" and row["ms_p20"] < 50
    assert "processor time" in report.markdown(rows_of(path))


def test_a_row_names_no_host_and_no_folder(tiny, tmp_path):
    path = tmp_path / "rows.jsonl"
    run_tiny(path, "--case", "tiny")
    for row in rows_of(path):
        text = json.dumps(row)
        assert str(machine.ROOT) not in text and str(tmp_path) not in text
        assert len(socket.gethostname()) < 4 or socket.gethostname() not in text
    note = drive._note(RuntimeError("no /home/someone/.cache/x.so here"))
    assert note == "RuntimeError: no x.so here"


def test_a_figure_that_is_missed_is_recorded_as_missed(tiny, tmp_path):
    path = tmp_path / "rows.jsonl"
    run_tiny(path, "--case", "linear tiny")
    targets = [target for row in rows_of(path) for target in row.get("targets") or ()]
    assert [(t["figure"], t["against"], t["holds"]) for t in targets] == [("speed", "eager", False)]
    assert "**missed** | linear tiny (torch, eager)" in report.markdown(rows_of(path))


def test_an_op_whose_contract_fails_is_refused_and_not_timed(tiny, monkeypatch, tmp_path):
    def contract(op, backend, device, quick):
        return [Result("value", "linear 5x3x3", 0.5, 1e-6, op != "cka", "sabotaged")]

    monkeypatch.setattr(testing, "contract", contract)
    path = tmp_path / "rows.jsonl"
    assert run_tiny(path) == 1
    rows = [row for row in rows_of(path) if row["kind"] in ("time", "overhead")]
    refused = [row for row in rows if row["status"] == "refused"]
    assert {row["case"] for row in refused} == {"linear tiny", "rbf tiny"}
    assert "value of linear 5x3x3: sabotaged" in refused[0]["note"]
    assert {row["case"] for row in rows if row["status"] == "ok"} == {"mse tiny"}
    assert "| linear tiny | kdkernels | torch | refused |" in report.markdown(rows_of(path))


def test_the_gate_is_the_shipped_contract(monkeypatch):
    assert drive.gate("gram_mse", "torch", "cpu") is None
    from kdkernels.gram import torch_impl

    forward = torch_impl.forward
    monkeypatch.setattr(torch_impl, "forward", lambda *a: (forward(*a)[0] * 1.05, *forward(*a)[1:]))
    assert "failed" in drive.gate("gram_mse", "torch", "cpu")


def test_a_contender_that_cannot_run_leaves_a_row_and_the_others_run(tiny, monkeypatch, tmp_path):
    def eager(case, sigma):
        raise MemoryError("no room for n x n")

    monkeypatch.setattr(contenders, "eager", eager)
    path = tmp_path / "rows.jsonl"
    run_tiny(path, "--case", "mse tiny")
    rows = [row for row in rows_of(path) if row["kind"] == "time"]
    failed = [row for row in rows if row["status"] == "failed"]
    assert [(row["contender"], row["note"]) for row in failed] == [("eager", "MemoryError: no room for n x n")]
    assert {row["contender"] for row in rows if row["status"] == "ok"} == {"algebra", "kdkernels"}


def test_cases_that_the_time_does_not_reach_are_named(tiny, tmp_path):
    path = tmp_path / "rows.jsonl"
    run_tiny(path, "--seconds", "0", "--case", "tiny")
    rows = [row for row in rows_of(path) if row["kind"] == "time"]
    assert [(row["case"], row["status"]) for row in rows] == [(case.name, "not run") for case in TINY]
    assert "linear tiny" in report.markdown(rows_of(path))


def test_cuda_without_a_device_is_an_error(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit) as exit:
        main("run", "--device", "cuda", "--out", "unused.jsonl")
    assert exit.value.code == 2 and "no CUDA device" in capsys.readouterr().err


def test_an_unknown_case_is_an_error_that_says_how_to_list(tiny, tmp_path, capsys):
    assert run_tiny(tmp_path / "rows.jsonl", "--case", "nonsense") == 2
    assert "python -m bench list" in capsys.readouterr().err


def test_every_round_runs_every_contender_once_and_starts_with_another():
    order = []

    def runner(name):
        def call(k):
            order.append((k, name))
            return {"step": float(k + 1)}

        return measure.Runner(measure.Contender(name, None, None), "eager", call)

    results = measure.interleave([runner("a"), runner("b"), runner("c")], seconds=0.0, least=4, most=4)
    rounds = [[name for _, name in order[6 + 3 * k : 9 + 3 * k]] for k in range(4)]  # two rounds of warm-up before
    assert [r[0] for r in rounds] == ["a", "b", "c", "a"]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert all(result == {"step": [1.0, 2.0, 3.0, 4.0]} for result in results)


def test_ratios_compare_one_round_with_itself():
    # the machine doubled its speed half-way: medians of each side alone would say anything from 1 to 4
    assert measure.pair_ratios([20.0, 20.0, 10.0, 10.0], [10.0, 10.0, 5.0, 5.0]) == (2.0, 2.0, 2.0)


def test_relu_features_have_the_mean_scale_and_the_common_signal_they_are_named_for():
    x, y = data.features(256, 64, 64, "relu:30:1000", 0)
    assert x.mean().item() == pytest.approx(30e3) and x.std().item() == pytest.approx(1e3)
    assert (x == x.min()).double().mean() > 0.3  # the entries that the ReLU cut off
    same, other = (contenders.algebra(cases.Case("", "cka", 256, 64, 64), None)(x, t).item() for t in (y, y.flip(0)))
    assert same > 0.15 > 0.05 > abs(other)


def test_the_median_bandwidth_is_numpys():
    import numpy as np

    x = data.features(50, 8, 8, "randn", 0)[0]
    d2 = torch.cdist(x, x).square().numpy()
    assert data.median_sigma(x) == pytest.approx(float(np.sqrt(np.median(d2))))


@pytest.mark.slow
@pytest.mark.skipif(not memory.supported(), reason="reads /proc")
def test_peak_memory_sees_the_matrices_of_the_obvious_formula_and_not_ours():
    listing = drive.listed("cpu", False)
    index = [case.name for case in listing].index("cka rbf n 4096")
    n2 = 4 * 4096**2
    eager = memory.cpu_peak(index, False, "eager", None, 1, 300)
    ours = memory.cpu_peak(index, False, "kdkernels", "torch", 1, 300)
    assert 5 * n2 < eager < 40 * n2
    assert ours < 2 * n2


def test_accuracy_figures_hold_at_64_samples_and_the_naive_formula_misses_them(tmp_path):
    path = tmp_path / "rows.jsonl"
    what = ("--quick", "--family", "gram", "--device", "cpu", "--backends", "torch")
    assert main("accuracy", *what, "--out", str(path)) == 0
    rows = rows_of(path)
    ours = [row for row in rows if row["contender"] == "kdkernels"]
    assert len(ours) == len(accuracy.points(True)) and all(row["holds"] for row in ours)
    naive = [row for row in rows if row["contender"] == "eager" and row["dtype"] == "float32"]
    assert not any(row["holds"] for row in naive)
    assert "nan" in report.markdown(rows) or "inf" in report.markdown(rows)


@pytest.mark.parametrize("value_off, gradient_scale", [(2e-6, 1.0), (0.0, 1.01)])
def test_accuracy_catches_a_value_or_a_gradient_that_is_off(monkeypatch, value_off, gradient_scale):
    true = contenders.ours

    def off(case, sigma, backend):
        function = true(case, sigma, backend)
        if backend == "reference":
            return function
        return lambda x, y: (
            function(x, y) * gradient_scale - (function(x, y) * (gradient_scale - 1)).detach() + value_off
        )

    monkeypatch.setattr(contenders, "ours", off)
    point = accuracy.Point("linear", 1.0, "relu:3:1", 64, "float32" if value_off else "bfloat16")
    row = accuracy.measure(point, ["torch"], "cpu")[0]
    assert row["contender"] == "kdkernels" and not row["holds"]


def test_the_overhead_is_that_of_the_whole_call_and_leaves_the_op_as_it_was():
    row = overhead.measure("torch", "cpu", 20)
    assert [target["against"] for target in row["targets"]] == ["bare_forward", "floor", "bare"]
    forward, floor, bare = (target["value"] for target in row["targets"])
    assert forward > 0 and bare > floor
    x = torch.randn(8, 4)
    assert kd.cka(x, x, backend="torch").item() == pytest.approx(1)


def timed_row(case, ratio, n=64, contender="kdkernels", roof_percent=10.0):
    shared = dict.fromkeys(PROVENANCE) | {"run": "r", "device": "cpu", "cpu": "Some CPU", "threads": 2}
    mine = contender == "kdkernels"
    return shared | {
        **{"kind": "time", "status": "ok", "op": "cka", "case": case, "contender": contender, "phase": "step"},
        **{"kernel": "rbf", "options": {}, "dtype": "float32", "regime": "randn", "method": "eager", "launches": None},
        **{"backend": "torch" if mine else None, "shape": {"groups": 1, "n": n, "p": 8, "q": 8}, "peak_bytes": None},
        **{"ms_p20": 1.0, "ms_p50": n / ratio, "ms_p80": 3.0, "roof": "gemm", "roof_percent": roof_percent},
        **{"ratios": {"eager": [ratio] * 3, "algebra": [ratio + 1] * 3} if mine else {}, "targets": []},
    }


def test_a_report_puts_losses_first_and_drops_none():
    rows = [timed_row(f"case {ratio}", ratio) for ratio in (3.0, 0.5, 1.5)]
    text = report.markdown(rows)
    assert re.findall(r"case (\d\.\d)", text) == ["0.5", "1.5", "3.0"]
    assert "**0.50 x**" in text and "**1.50 x**" not in text


def test_plots_have_a_line_for_every_contender_and_the_roof(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [timed_row(f"n {n}", 2.0, n, who) for n in (64, 128, 256) for who in ("kdkernels", "eager", "algebra")]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main("report", str(source), "--plots", str(tmp_path / "plots")) == 0
    (svg,) = (tmp_path / "plots").glob("*.svg")
    assert svg.with_suffix(".png").stat().st_size > 1000
    figure = svg.read_text()
    labels = "kdkernels (torch)", plots.THEIRS["eager"][1], plots.THEIRS["algebra"][1], "roof (measured)"
    assert all(f">{label}</text>" in figure for label in labels)
    assert all(f">{n}</text>" in figure for n in (64, 128, 256))  # the sizes, and no other ticks


def test_the_committed_rows_can_be_read_reported_and_drawn():
    paths = sorted((machine.ROOT / "bench" / "results").glob("*.jsonl"))
    assert paths
    for path in paths:
        rows = report.load([path])
        assert rows and all(row["dirty"] is False for row in rows), path.name
        assert rows[0]["commit"] in report.markdown(rows)
        if path.name.startswith("model-"):
            assert all(row["kind"] == "model" and row.keys() >= MODELLED for row in rows), path.name
            continue
        assert all(row.keys() >= PROVENANCE for row in rows), path.name
        first, last = drive.default_path(rows[0], path.stem.split("-")[-1]).name.split(f"{rows[0]['threads']}-thread")
        assert re.fullmatch(rf"{first}([a-z]+-)*{rows[0]['threads']}-thread{last}", path.name), path.name
        assert all(len(series["roof"]) >= 3 for series in plots.series(rows).values())


def test_nothing_is_measured_twice_among_the_committed_rows():
    rows = report.load(sorted((machine.ROOT / "bench" / "results").glob("*.jsonl")))
    said = "cpu case contender backend method phase dtype".split()
    times = [tuple(row[key] for key in said) for row in rows if row["kind"] == "time" and row["status"] == "ok"]
    assert len(times) > 500 and len(set(times)) == len(times)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory"),
        ("", "no rows"),
        ('{"kind": "time"}', "line 1 is no row that"),
        (json.dumps(timed_row("a", 2.0)) + '\n{"kind": "ti', "line 2 is not JSON"),
    ],
)
def test_a_file_that_cannot_be_reported_is_named_in_one_line(text, message, tmp_path, capsys):
    source = tmp_path / "rows.jsonl"
    if text is not None:
        source.write_text(text)
    assert main("report", str(source)) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and message in shown.err and "rows.jsonl" in shown.err


def test_without_triton_there_is_help_and_no_model(python):
    code = (
        "import sys; sys.modules['triton'] = None; from bench.__main__ import main, parser; parser(); main(['model'])"
    )
    done = python("-c", code)
    assert done.returncode == 2 and "pip install triton" in done.stderr, done.stderr
