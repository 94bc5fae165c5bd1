# SPDX-License-Identifier: Apache-2.0
"""Predicted times. Nothing is measured: each row says which machine is modelled, and when.

A kernel's blocks that one of the multiprocessors would get are executed instruction by instruction (tests/machine) and
played on the model of tests/machine/core/cycles.h with the table of rates.py. Its memory floor is what DRAM has to move
at the rate that copies reach, its arithmetic floor what the formula needs at the peak. README.md: what that is worth.
"""

import sys

from ..machine import ROOT

# the emulator is a part of the tests, where it checks what it runs; its modules import each other by their names
sys.path.insert(0, str(ROOT / "tests" / "machine"))
