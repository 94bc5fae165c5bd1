# SPDX-License-Identifier: Apache-2.0
"""The benchmark: one driver, `python -m bench`, every row with its provenance; see `python -m bench --help`."""
