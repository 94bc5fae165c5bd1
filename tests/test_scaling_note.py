# SPDX-License-Identifier: Apache-2.0
"""The table of the scaling note is what its model gives, and its crossovers are those of the code."""

import re

import pytest
from conftest import ROOT

from kdkernels.gram.distributed import ring

NOTE = (ROOT / "kdkernels" / "gram" / "SCALING.md").read_text()
SPACE: dict = {}
exec(re.search(r"```python\n(.*?)```", NOTE, re.S)[1], SPACE)
ROWS = re.findall(r"^\| (\d+) \| (\d+) \| ([\d,]+) \| (.*) \|$", NOTE, re.M)


def shown(number: float) -> str:
    return f"{number:.0f}" if 100 <= number < 1000 and number == round(number) else f"{number:.2g}"


@pytest.mark.parametrize("row", ROWS, ids=" ".join)
def test_a_row_of_the_table_is_what_the_model_gives(row):
    n, p, W = (int(cell.replace(",", "")) for cell in row[:3])
    for way, cell in zip(("moments", "gather", "ring"), row[3].split(" | "), strict=True):
        assert cell == " / ".join(map(shown, SPACE["modelled"](way, W, n, p))), way


def test_the_note_says_first_that_nothing_was_measured_and_has_the_bound_of_the_code():
    assert len(ROWS) >= 6 and NOTE.index("Nothing on this page was measured") < NOTE.index("|")
    assert f"below {ring.RING_FROM // 2**20} MiB" in NOTE
