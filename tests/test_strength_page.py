# SPDX-License-Identifier: Apache-2.0
"""The page on choosing the strength says what its script measures, and the script measures what the page is about."""

import math
import re
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "examples"))

import strength

PAGE = strength.PLOT.with_name("STRENGTH.md")


def test_the_table_of_the_page_is_what_the_script_prints(capsys):
    strength.main(["--table"])
    printed = re.findall(r"^\| [\d,]+ \|.*$", capsys.readouterr().out, re.M)
    written = re.findall(r"^\| [\d,]+ \|.*$", PAGE.read_text(), re.M)
    assert len(printed) == len(written) == 8
    for ours, theirs in zip(printed, written, strict=True):
        assert ours.split("|")[1:3] == theirs.split("|")[1:3]
        numbers = [[float(n) for n in re.findall(r"[\d.]+", line.split("|", 3)[3])] for line in (ours, theirs)]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.02, abs=2e-4)


def test_the_three_regimes_of_the_page_are_there():
    hard, middle, one = (strength.measure(100, c * math.sqrt(12) / 100) for c in (1e-6, 1.0, 100.0))
    assert hard["pooled"] == 0 and hard["blocks"] == 100 and hard["to_hard"] < 1e-9 < hard["to_pearson"]
    assert 0.8 < middle["pooled"] < 1 and min(middle["to_pearson"], middle["to_hard"]) > 0.01
    assert one["pooled"] == 1 and one["blocks"] == 1 and one["to_pearson"] < 1e-9 < one["to_hard"]


@pytest.mark.parametrize("n", strength.SIZES)
def test_the_usual_default_is_one_block_on_standardised_rows(n):
    found = strength.measure(n, 1.0)
    assert found["blocks"] < 1.05 and found["to_pearson"] < 1e-3


def test_the_plot_is_drawn_with_a_line_for_each_size_like_the_committed_one(tmp_path):
    pytest.importorskip("matplotlib")
    strength.draw(tmp_path / "plot.svg", points=3)
    for path in (tmp_path / "plot.svg", PAGE.with_name("strength.svg")):
        said = set(re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text()))
        assert {*(f"n = {n:,}" for n in strength.SIZES), *(label for _, label, _ in strength.ROWS)} <= said
    assert "](strength.svg)" in PAGE.read_text()
