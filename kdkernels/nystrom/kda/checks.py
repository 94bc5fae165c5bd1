# SPDX-License-Identifier: Apache-2.0
"""What the landmark similarity loss requires of its arguments."""

from __future__ import annotations

from ... import checks


def check_call(s, t, s_centers, t_centers):
    named = ((s, "s"), (t, "t"), (s_centers, "s_centers"), (t_centers, "t_centers"))
    shapes = []
    for tensor, name in named:
        checks.floating(tensor, name)
        shape = tensor.shape
        if len(shape) != 2 or shape[1] == 0:
            raise ValueError(f"{name} has shape {tuple(shape)}: give rows of features, [rows, width]")
        if tensor is not s:
            checks.same_device(s, tensor, "s", name)
        shapes.append(shape)
    (B, d), (b, e), (C, width), (c, t_width) = shapes
    if B != b:
        raise ValueError(f"t has {b} rows, s has {B}: both sides must describe the same samples, in one order")
    if C != c:
        raise ValueError(f"t_centers has {c} rows, s_centers has {C}: landmarks come in pairs")
    if C == 0:
        raise ValueError("s_centers has no rows: it needs at least one landmark")
    if (d, e) != (width, t_width):
        name, own, other = ("s", d, width) if d != width else ("t", e, t_width)
        raise ValueError(
            f"{name}_centers has {other} columns, {name} has {own}: landmarks live in the space of their side's "
            "features"
        )
    if checks.debugging():
        for tensor, name in named:
            checks.finite(tensor, name)
