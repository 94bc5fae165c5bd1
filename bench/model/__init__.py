# SPDX-License-Identifier: Apache-2.0
"""Predicted times: compiled kernels executed on the CPU (tests/machine), their trace played on a model of an H200."""

import sys

from ..machine import ROOT

# the emulator is a part of the tests, where it checks what it runs; its modules import each other by their names
sys.path.insert(0, str(ROOT / "tests" / "machine"))
