# SPDX-License-Identifier: Apache-2.0
"""The figures on landmark rules are what the script measures, and every rule does what the page says of it."""

import re
import sys

import pytest
from conftest import ROOT

import kdkernels as kd

sys.path.insert(0, str(ROOT / "examples"))

import landmarks

PAGE = landmarks.PLOT.with_name("MATH.md")


def written():
    rows = re.findall(r"^\| (\d+) \| (.*e-.*) \|$", PAGE.read_text(), re.M)
    return {int(m): [tuple(map(float, cell.split(" / "))) for cell in cells.split(" | ")] for m, cells in rows}


def test_the_table_is_what_the_script_measures():
    x, y = landmarks.features()
    exact = float(kd.cka(x, y, kernel="rbf"))
    assert sorted(written()) == sorted(landmarks.SIZES)
    for m in (16, 64):  # two rows of it: the whole takes a minute
        for rule, (trace, cka) in zip(landmarks.RULES, written()[m], strict=True):
            found = landmarks.errors(x, y, rule, m, exact)
            assert found[0] == pytest.approx(trace, rel=0.1), rule
            assert found[1] == pytest.approx(cka, rel=0.2, abs=2e-5), rule


def test_adaptive_rules_beat_the_uniform_one_and_the_error_falls_with_m():
    table = written()
    for k in range(3):
        assert all(table[m][k][0] < table[m][3][0] for m in table if m > 8)
    for k in range(4):
        traces = [table[m][k][0] for m in sorted(table)]
        assert traces == sorted(traces, reverse=True)


def test_the_plot_is_drawn_and_the_page_shows_it(tmp_path):
    found = {rule: [(10.0 / m, 1.0 / m) for m in landmarks.SIZES] for rule in landmarks.RULES}
    landmarks.draw(found, tmp_path / "plot.svg")
    for path in (tmp_path / "plot.svg", landmarks.PLOT):
        assert all(rule in path.read_text() for rule in landmarks.RULES)
    assert "](landmarks.svg)" in PAGE.read_text()
