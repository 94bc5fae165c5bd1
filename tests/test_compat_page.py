# SPDX-License-Identifier: Apache-2.0
"""The table of replacements names what exists: imports run, names are there, keys are registered."""

import re

import pytest
from conftest import ROOT

from kdkernels.compat import mdistiller, mmrazor_losses, repdistiller, torchdistill_losses

SECTION = (ROOT / "docs" / "howto" / "porting.md").read_text().split("\n## ")[0]
ROWS = [line.strip("| ").split(" | ") for line in SECTION.splitlines() if line.startswith("| ")][1:]


def row(library):
    (found,) = (cells for cells in ROWS if library in cells[0])
    return [re.findall(r"`([^`]+)`", cell) for cell in found]


@pytest.mark.parametrize(
    "library", ["torchsort", "RepDistiller", "mdistiller", "torchdistill", "MMRazor", "TRL", "Liger"]
)
def test_what_the_table_says_to_write_runs(library):
    imports = [line.split(";")[0] for line in row(library)[1] if "import" in line]
    assert len(imports) == 1
    exec(imports[0], {})


@pytest.mark.parametrize("library, module", [("RepDistiller", repdistiller), ("mdistiller", mdistiller)])
def test_the_names_of_the_table_are_those_of_the_module(library, module):
    (first, *others), (written,) = row(library)
    names = {first.split()[-1], *others}
    assert first.split()[-1] == written.split()[-1]
    parts = {"poly_kernel", "similarity_loss", "single_stage_at_loss", "single_stage_nst_loss"}  # of those listed
    assert names == set(module.__all__) - parts


@pytest.mark.parametrize("library, module", [("torchdistill", torchdistill_losses), ("MMRazor", mmrazor_losses)])
def test_the_losses_of_the_table_are_those_that_are_replaced(library, module):
    (first, *others), (written,) = row(library)
    assert {first.split("'")[1], *others} == set(module.__all__)
    assert written.endswith(f"{library.lower()}.replace()")


def test_the_examples_of_the_section_exist():
    examples = re.findall(r"`(examples/\w+\.py)`", SECTION)
    assert len(examples) == 3 and all((ROOT / example).is_file() for example in examples)
