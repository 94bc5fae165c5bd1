# SPDX-License-Identifier: Apache-2.0
"""The example that shows what distillation moved: it runs small, and its files are there, or are refused at once."""

import csv
import json
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
sys.path.insert(0, str(ROOT / "examples"))

import compare_models
import distill


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


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("example", [compare_models, distill])
def test_a_folder_that_cannot_be_written_is_one_line_before_any_training(example, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "load", lambda *_: pytest.fail("it began"))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="error: --out: .*file cannot be written: File exists"):
        example.main(["--out", str(tmp_path / "file" / "picture.png")])


def test_a_record_of_weights_stays_whole_where_writing_fails(tmp_path, monkeypatch):
    record = tmp_path / "weights.json"
    record.write_text(json.dumps({"digits": {"B": {"kd": {"weight": 7}}}}))
    before = record.read_text()
    options = SimpleNamespace(record=record, data="digits", setup="A", losses=[])
    write = type(record).write_text

    def torn(path, text):
        write(path, text[: len(text) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr(type(record), "write_text", torn)
    with pytest.raises(OSError, match="No space"):
        distill.record_weights(options, [])
    assert record.read_text() == before
    monkeypatch.setattr(type(record), "write_text", write)
    distill.record_weights(options, [])
    assert json.loads(record.read_text())["digits"] == {"B": {"kd": {"weight": 7}}, "A": {}}
