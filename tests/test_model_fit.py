# SPDX-License-Identifier: Apache-2.0
"""Holding the table of costs against a GPU: here another table is the GPU, and is found from its kernels' cycles."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "machine"))

from machine_build import native_build, simt_build

from bench.model import fit, micro

pytestmark = [
    pytest.mark.machine,
    pytest.mark.compile_only,
    pytest.mark.skipif(simt_build.compiler() is None, reason="no C++ compiler"),
    pytest.mark.skipif(native_build().find_nvcc() is None, reason="no nvcc"),
]
# a latency, a pipe, a latency and a rate of memory, with what a GPU could have instead; all else is as in the table
OTHER = {"MUFU.latency": 31, "MUFU.interval": 6.0, "l1": 33, "dram_bytes": 14.5}


def test_another_machine_is_found_from_its_cycles():
    other = fit.Table()
    for entry, value in OTHER.items():
        other = other.with_entry(entry, value)
    measured = {m.entry: other.cycles(m) for m in micro.MICROS if m.entry in OTHER}
    found = fit.fitted(measured, fit.Table())
    assert {entry: found[entry] for entry in OTHER} == pytest.approx(OTHER, rel=0.01)
    assert fit.Table()["l1"] == 40 and found["dram"] == fit.Table()["dram"]


def test_every_kernel_feels_the_entry_that_it_is_there_for():
    table = fit.Table()
    for one in micro.MICROS:
        cycles = [table.with_entry(one.entry, table[one.entry] * factor).cycles(one) for factor in (1, 1.5)]
        assert abs(cycles[1] / cycles[0] - 1) > 0.03, one


def test_rows_are_held_against_a_profile_by_kernel():
    row = {"case": "kl", "shape": "8x9", "dtype": "float32", "grid": (4, 1, 1), "blocks": 2, "microseconds": 3.0}
    rows = [row | {"kernel": "loss_rows", "instructions": 50}, row | {"kernel": "other", "instructions": 1}]
    name_of = "void (anonymous namespace)::loss_rows<float, (int)4>(Call)"
    profile = [
        {"Kernel Name": name_of, "Metric Name": name, "Metric Value": value}
        for name, value in (("gpu__time_duration.sum", "2,000"), ("smsp__inst_executed.sum", "100"))
    ]
    assert fit.held(rows, profile) == [
        "kl 8x9 float32 loss_rows: 1.50 x, counts 1.000 x",
        "kl other: not in the profile",
    ]
