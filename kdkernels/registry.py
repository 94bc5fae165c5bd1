# SPDX-License-Identifier: Apache-2.0
"""The only list of ops: name, family folder, and the backends it has in the order `auto` prefers them."""

from __future__ import annotations

from typing import NamedTuple


class Op(NamedTuple):
    name: str
    family: str  # kdkernels/<family>/ holds op.py, reference.py, spec.py, MATH.md and the implementations
    backends: tuple[str, ...]


_GRAM = ("triton", "cpp", "torch", "reference")

OPS = {
    op.name: op
    for op in (
        Op("cka", "gram", _GRAM),
        Op("hsic", "gram", _GRAM),
        Op("mmd", "gram", _GRAM),
        Op("gram_mse", "gram", _GRAM),
    )
}
