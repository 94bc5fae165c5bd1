# SPDX-License-Identifier: Apache-2.0
"""Which modules of a network take part: by name, by pattern, or all without children."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

MANY = 3  # names that differ in numbers alone, from which on they are listed as one


def chosen_layers(model: nn.Module, wanted: list[str] | None, name: str, other: nn.Module | None = None) -> list[str]:
    """Names of the modules that are named or matched, in the order of the model; without any wish all leaves.

    `other`: a model for which the same list stands, so that an entry may be for that one alone.
    """
    modules = _names(model)
    if not modules:
        raise ValueError(f"{name} has no layers of its own: wrap it, e.g. nn.Sequential({name})")
    if wanted is None:
        return [layer for layer in modules if next(model.get_submodule(layer).children(), None) is None]
    elsewhere = [] if other is None else _names(other)
    found = set()
    for pattern in wanted:
        matched = _matching(pattern, modules)
        if not (matched or _matching(pattern, elsewhere)):
            raise ValueError(f"layers: {name} has no layer {pattern!r}; it has {listed(modules)}")
        found |= matched
    if not found:
        raise ValueError(f"layers: {name} has none of {', '.join(wanted)}; it has {listed(modules)}")
    return [layer for layer in modules if layer in found]


def _names(model: nn.Module) -> list[str]:
    return [layer for layer, _ in model.named_modules() if layer]


def _matching(pattern: str, names: list[str]) -> set[str]:
    if pattern in names:
        return {pattern}
    parts = pattern.split(".")
    return {name for name in names if _matches(name.split("."), parts)}


def _matches(levels: list[str], pattern: list[str]) -> bool:
    """fnmatch level by level: `*` stays within dots, `**` is any number of levels, at the end at least one."""
    if not pattern:
        return not levels
    first, *rest = pattern
    if first == "**":
        return any(_matches(levels[skipped:], rest) for skipped in range(0 if rest else 1, len(levels) + 1))
    return bool(levels) and fnmatchcase(levels[0], first) and _matches(levels[1:], rest)


def listed(names) -> str:
    """Names in a line; those that differ in numbers alone as one pattern."""
    alike = defaultdict(list)
    for name in names:
        alike[re.sub(r"(?<![^.])\d+(?![^.])", "*", name)].append(name)
    groups = (group if len(group) <= MANY else [f"{pattern} ({len(group)})"] for pattern, group in alike.items())
    return ", ".join(name for group in groups for name in group)


def patterns(layers) -> tuple[list[str] | None, list[str] | None]:
    """One list of names or patterns for both models, the same object, or a pair of them."""
    if layers is not None and not isinstance(layers, (str, Sequence)):
        raise TypeError(
            f"layers is a {type(layers).__name__}: give names or patterns such as 'conv*', or a pair of lists"
        )
    if not isinstance(layers, str) and layers and len(layers) == 2 and not all(isinstance(one, str) for one in layers):
        return _patterns(layers[0]), _patterns(layers[1])
    return (_patterns(layers),) * 2


def _patterns(layers) -> list[str] | None:
    if layers is None:
        return None
    layers = [layers] if isinstance(layers, str) else list(layers)
    for entry in layers:
        if not isinstance(entry, str):
            raise TypeError(f"layers holds a {type(entry).__name__}: give names or patterns such as 'conv*'")
    if not layers:
        raise ValueError("layers is empty: name at least one layer, or leave it out for all of them")
    return layers
