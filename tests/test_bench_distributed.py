# SPDX-License-Identifier: Apache-2.0
"""The rows over ranks: bytes by each way are those that its formula says, and a report shows them."""

import subprocess
import sys

import pytest
from ranked import needs_distributed

from bench import __main__ as command
from bench import cases, distributed_rows, drive, report

pytestmark = needs_distributed


@pytest.mark.slow
def test_bytes_of_each_way_are_counted_between_two_ranks(tmp_path):
    path = tmp_path / "rows.jsonl"
    options = ("--quick", "--family", "distributed", "--device", "cpu", "--out", str(path))
    assert command.main(["run", *options]) == 0
    rows = report.load([path])
    found = {(row["op"], row["kernel"], row["way"]): row for row in rows if row["kind"] == "traffic"}
    assert {way for _, _, way in found} == {"moments", "gather", "ring"}
    shape = found["cka", "rbf", "ring"]["shape"]
    features = shape["n"] * shape["p"] * 4
    assert found["cka", "rbf", "ring"]["own_bytes"] == 2 * features
    assert found["cka", "rbf", "ring"]["received"]["ring"] == 2 * 2 * features + shape["n"] * (2 + 5) * 4
    gathered = found["cka", "rbf", "gather"]["received"]
    assert gathered["reduce_scatter"] == features and 2 * features <= gathered["all_gather"] < 2 * features + 1000
    assert "ring" not in gathered
    assert found["cka", "rbf", "ring"]["value"] == pytest.approx(found["cka", "rbf", "gather"]["value"], abs=1e-5)
    text = report.markdown(rows)
    assert text.count("| rbf CKA, 512 rows a rank | n=32 p=256 q=256 | 2 | ring |") == 1


def test_a_launch_that_fails_gives_a_row_that_says_so():
    written = []
    drive._measure_ranks(distributed_rows.cpu_cases()[0]._replace(op="no_such_op", ranks=(1,)), written.append)
    (row,) = written
    assert row["status"] == "failed" and row["kind"] == "time" and "no attribute 'no_such_op'" in row["note"]


def test_a_rank_that_is_killed_is_reported_by_its_signal(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", str(script)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "Signal 9 (SIGKILL)" in distributed_rows._said(done.stderr)


def test_each_kind_of_traffic_is_among_the_cases():
    listed = [case for case in cases.cases("cpu") if case.family == "distributed"]
    assert {way for case in listed for way in case.ways} == set(distributed_rows.WAYS)
    assert all(case.ranks == (2, 4) for case in listed)
    assert not [case for case in cases.cases("cuda") if case.family == "distributed"]
