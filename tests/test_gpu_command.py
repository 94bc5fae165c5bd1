# SPDX-License-Identifier: Apache-2.0
"""make gpu refuses at once without a device, keeps what passed, ends what hangs, and never calls a failure a pass."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, load_by_path

gpu = load_by_path(ROOT / "bench" / "gpu.py")

MACHINE = {"device": "a device", "torch": "2.13"}
SOURCE = {"commit": "c", "dirty": False, "sources": "s"}


@pytest.mark.parametrize("stage", [gpu.STAGES[0], "all"])
def test_every_stage_says_no_cuda_device_and_fails(tmp_path, stage):
    out = tmp_path / "out"
    command = ["make", "gpu", f"PYTHON={sys.executable}", f"OUT={out}", f"STAGE={stage}"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    for name in gpu.STAGES if stage == "all" else [stage]:
        assert f"{name}: no CUDA device" in result.stderr
    assert not out.exists()


def test_an_unknown_stage_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as refused:
        gpu.main(["--stage", "tests"])
    assert refused.value.code != 0 and "sanitize" in capsys.readouterr().err


@pytest.fixture
def stage(monkeypatch, tmp_path):
    """Runs a made-up stage of shell commands; returns whether it passed and what it wrote."""

    def run(commands, source=SOURCE, force=False):
        steps = [gpu.Step(name, ["sh", "-c", command]) for name, command in commands.items()]
        monkeypatch.setattr(gpu, "steps", lambda stage, out: steps)
        passed = gpu.run_stage("test", tmp_path, MACHINE, source, force)
        return passed, json.loads((tmp_path / "test.json").read_text())

    return run


def test_a_failed_step_fails_the_stage_and_shows_its_last_lines(stage, capsys):
    passed, record = stage({"good": "echo fine", "bad": "echo the reason; exit 3", "last": "true"})
    assert not passed and record["status"] == "failed"
    assert [step["status"] for step in record["steps"].values()] == ["passed", "failed", "passed"]
    assert record["steps"]["bad"]["rc"] == 3
    assert "  the reason" in capsys.readouterr().out


def test_only_what_passed_on_the_same_sources_is_not_run_again(stage, tmp_path):
    count = tmp_path / "count"
    commands = {"counted": f"echo x >> {count}", "flaky": f"[ -e {tmp_path}/fixed ]"}
    assert stage(commands)[0] is False
    (tmp_path / "fixed").touch()
    assert stage(commands)[0] is True
    assert count.read_text() == "x\n"
    stage(commands, source={**SOURCE, "sources": "other"})
    stage(commands, source={**SOURCE, "sources": "other"}, force=True)
    assert count.read_text() == "x\n" * 3


def test_a_hanging_step_is_ended_with_its_children_in_time(stage, monkeypatch):
    monkeypatch.setattr(gpu, "STAGE_SECONDS", 1.5)
    started = time.monotonic()
    passed, record = stage({"hang": "sleep 60 & sleep 60", "next": "true"})
    assert time.monotonic() - started < 20
    assert not passed and record["steps"]["hang"]["status"] == "timed out"


def test_a_missing_program_is_a_failure_in_words(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "steps", lambda stage, out: [gpu.Step("memcheck", ["no-such-sanitizer"])])
    assert not gpu.run_stage("sanitize", tmp_path, MACHINE, SOURCE, False)
    record = json.loads((tmp_path / "sanitize.json").read_text())
    assert record["steps"]["memcheck"]["tail"] == ["no-such-sanitizer: No such file or directory"]


def test_the_stages_write_at_most_ten_files(tmp_path):
    files = {f"{stage}.json" for stage in gpu.STAGES} | {"gpu.log"}
    for stage in gpu.STAGES:
        for step in gpu.steps(stage, tmp_path):
            files |= {step.output} - {None}
            files |= {Path(word).name for word in step.command if word.startswith(str(tmp_path))}
    assert len(files) <= 10


def test_both_families_with_pointers_of_their_own_are_sanitized(tmp_path):
    sanitized = gpu.steps("sanitize", tmp_path)
    watched = {(step.command[2], "bench.rank_schedules" in step.command) for step in sanitized}
    assert watched == {(tool, ranking) for tool in ("memcheck", "racecheck") for ranking in (True, False)}
    assert all(step.command.count("--error-exitcode") == 1 for step in sanitized)
    from kdkernels.registry import OPS

    assert set(gpu.GRAM) == {op.name for op in OPS.values() if op.family == "gram"}


def test_every_family_is_measured_within_the_time_of_its_stage_and_reported(tmp_path):
    from bench import cases
    from bench.__main__ import parser

    families = []
    for name in ("bench", "losses"):
        *runs, report = gpu.steps(name, tmp_path)
        options = [parser().parse_args(step.command[3:]) for step in runs]
        if name == "losses":
            *options, held = options
            assert (held.command, held.out) == ("held", options[-1].out)
        families += [family for run in options for family in run.family]
        assert sum(run.seconds for run in options) < gpu.STAGE_SECONDS - 60
        assert sum(step.share for step in runs) < 1
        for run in options:
            assert run.out in report.command
            (tmp_path / run.out).touch()
    assert sorted(families) == sorted({case.family for case in cases.cases("cuda")})
    # the last report is one of all rows there are
    assert {path.name for path in tmp_path.iterdir()} == {word.rpartition("/")[2] for word in report.command[4:]}


def test_predicted_kernels_are_held_against_those_that_ran(monkeypatch, tmp_path, capsys):
    """The path of a GPU, with a profiler of its own in the place of the device."""
    from types import SimpleNamespace

    from bench import machine, measure, report
    from bench.model import cases, held

    ran = []
    works = cases.Case("kl", "2x8", "float32", ran.append, {"loss_rows": cases.Work(1)})
    lacks = works._replace(name="none", call=lambda _: (_ for _ in ()).throw(RuntimeError("no library")))
    times = iter([3.0, 5.0, 4.0] * held.REPS)
    shared = {
        **dict.fromkeys(report.HEADING | {"driver", "clocks", "cuda"}),
        "run": "now",
        "commit": "c",
        "gpu": "mock",
    }
    monkeypatch.setattr(machine, "provenance", lambda device: shared)
    monkeypatch.setattr(measure, "flush_buffer", lambda: None)
    monkeypatch.setattr(held, "cases", lambda: [works, lacks, works._replace(backend="nvcc")])
    monkeypatch.setattr(held, "DEVICE", "cpu")
    monkeypatch.setattr(held, "launched", lambda case, flush: [("void kdk::loss_rows<float>(float*)", next(times))])
    rows = tmp_path / "model-rows.jsonl"
    key = {"case": "kl", "shape": "2x8", "dtype": "float32"}
    rows.write_text(
        "".join(json.dumps({**key, "kernel": k, "microseconds": 8.0}) + "\n" for k in ("loss_rows", "gone"))
    )
    out = tmp_path / "held.jsonl"
    assert held.run(SimpleNamespace(rows=[rows], out=out)) == 1  # one of the calls did not run
    said = capsys.readouterr()
    assert "0.50 x" in said.out and "none 2x8 float32: not measured: no library" in said.err and ran == [None]
    text = report.markdown(report.load([out]))
    assert "| kl 2x8 float32 | loss_rows | 8.0 | 4.0 | 0.50 x |" in text and "| gone | 8.0 |  |  |" in text


def test_changed_sources_are_another_run(monkeypatch, tmp_path):
    (tmp_path / "csrc").mkdir()
    source = tmp_path / "csrc" / "a.cu"
    source.write_text("one")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    before = gpu.provenance()
    source.write_text("two")
    assert gpu.provenance()["sources"] != before["sources"]
