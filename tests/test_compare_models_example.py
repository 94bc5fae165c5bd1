# SPDX-License-Identifier: Apache-2.0
"""The example that shows what distillation moved: it runs small, and its picture, table and files are there."""

import csv
import sys

import pytest
from conftest import ROOT

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
sys.path.insert(0, str(ROOT / "examples"))

import compare_models


@pytest.mark.demo
@pytest.mark.usefixtures("threads")  # the example sets its own
def test_the_example_draws_teacher_and_students_before_and_after_distillation(tmp_path, capsys):
    out = tmp_path / "new" / "picture.png"
    assert compare_models.main(["--epochs", "2", "--losses", "cka", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "630 test images" in lines[1]
    rows = [line for line in lines if " +- " in line]
    assert [row.split("  ")[0] for row in rows] == ["as it starts", "labels alone", "CKA of features, ramp"]
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 30_000
    values = {}
    for name in ("as-it-starts", "CKA-of-features-ramp"):
        with out.with_name(f"picture-{name}.csv").open() as file:
            table = {(row["layer_a"], row["layer_b"]): float(row["cka"]) for row in csv.DictReader(file)}
        assert len(table) == len(compare_models.LAYERS) ** 2
        values[name] = table["features", "features"]
    # two epochs of it already bring the features it sees nearer to the teacher's
    assert values["CKA-of-features-ramp"] > values["as-it-starts"] + 0.05
